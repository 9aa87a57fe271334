"""Fields of diffusers' scheduler classes: their names, their defaults, and the corresponding options here.

``READERS`` lists the fields of each class with the class's own defaults (they differ: by default DDIM clips and Euler
uses linspace). ``OPTIONS`` lists the options that are not simply a field of the same name, with the way there and back,
and ``refusals`` the settings that can't go together. config.py applies them. A new class is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any, NamedTuple

from minidiff.config import check, quote
from minidiff.config import one_of as config_one_of
from minidiff.samplers.method import Method
from minidiff.samplers.registry import SAMPLERS

Config = Mapping[str, Any]
INFINITE = float("inf")
LEARNED = ("learned", "learned_range")


def one_of(config: Config, key: str, *known: str) -> str:
    """Return field ``key``. Raises ConfigError unless it is one of ``known``."""
    config_one_of(known, **{key: config[key]})
    return str(config[key])


# --- options ----------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option here: ``read`` from the fields of a class that has all of ``needs``, and the fields to ``write`` for
    it. Of several entries with a name, the first that fits a class applies; fields that the class lacks are not
    written."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Config], Any]
    write: Callable[[Any], dict[str, Any]]


def renamed(name: str, key: str, *needs: str, words: Mapping[str, str] = {}) -> Option:
    """Return the option ``name`` that is field ``key`` there; ``words`` are other values of the same meaning."""
    return Option(name, (key, *needs), lambda c: words.get(c[key], c[key]) if words else c[key], lambda v: {key: v})


def switched(name: str, key: str, off: str, on: str, *words: str) -> Option:
    """Return the option that is True if field ``key`` is ``on``; ``words``: further values that mean ``off``."""
    known = (off, on, *words)
    return Option(name, (key,), lambda c: one_of(c, key, *known) == on, lambda v: {key: on if v else off})


def optional(name: str, flag: str, key: str) -> Option:
    """Return the option that is field ``key``, or None if ``flag`` is not set."""
    return Option(
        name, (flag, key), lambda c: c[key] if c[flag] else None, lambda v: {flag: v is not None} | without_none(key, v)
    )


def bounded(name: str, none: float) -> Option:
    """Return the option of the same name for which None stands here and ``none`` there (JSON has no infinity)."""
    return Option(name, (name,), lambda c: None if c[name] == none else c[name], lambda v: without_none(name, v))


def without_none(key: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {key: value}


def _sigma_spacing(c: Config) -> str:
    if c.get("use_lu_lambdas") and not c["use_karras_sigmas"]:
        return "lu"
    return next((name for name in ("karras", "exponential", "beta") if c[f"use_{name}_sigmas"]), "timesteps")


def _sigma_flags(kind: str) -> dict[str, Any]:
    flags = {f"use_{name}_sigmas": name == kind for name in ("karras", "exponential", "beta")}
    return {**flags, "use_lu_lambdas": kind == "lu"}


def _learned(variance: bool) -> dict[str, Any]:
    return {"variance_type": "learned_range" if variance else None}


def _clip_denoised(clip: float | None) -> dict[str, Any]:
    return {"clip_denoised": bool(clip)}


def _past_end(c: Config) -> Any:
    return c["set_alpha_to_one" if c["set_alpha_to_zero"] is None else "set_alpha_to_zero"]


def _corrected(c: Config) -> tuple[Any, ...]:
    value = c["disable_corrector"]
    check(isinstance(value, (list, tuple)), f"disable_corrector={quote(value)} must be a list of rows")
    return tuple(value)


OPTIONS = (
    renamed("algorithm", "algorithm_type", "solver_type", words={"deis": "dpmsolver++"}),  # DPM-Solver
    renamed("algorithm", "algorithm_type"),
    optional("clip", "clip_sample", "clip_sample_range"),
    Option("clip", ("clip_denoised",), lambda c: 1.0 if c["clip_denoised"] else None, _clip_denoised),
    switched("continuous", "timestep_type", "discrete", "continuous"),
    # the multistep DPM-Solver alone cuts
    Option("cut_timesteps", ("use_lu_lambdas",), lambda c: c["beta_schedule"] == "squaredcos_cap_v2", lambda v: {}),
    Option("disable_corrector", ("disable_corrector",), _corrected, lambda v: {"disable_corrector": list(v)}),
    renamed("final_sigma", "final_sigmas_type"),
    switched("heun", "solver_type", "midpoint", "heun", "logrho", "bh1", "bh2"),
    renamed("interpolation", "interpolation_type"),
    bounded("lambda_min_clipped", -INFINITE),
    Option("learned_variance", ("variance_type",), lambda c: c["variance_type"] in LEARNED, _learned),
    renamed("noise_seed", "noise_sampler_seed"),
    renamed("original_steps", "original_inference_steps"),
    Option("runge_kutta", ("skip_prk_steps",), lambda c: not c["skip_prk_steps"], lambda v: {"skip_prk_steps": not v}),
    bounded("s_tmax", INFINITE),
    switched("sde", "algorithm_type", "dpmsolver++", "sde-dpmsolver++", "deis"),
    Option("set_alpha_to_one", ("set_alpha_to_zero",), _past_end, lambda v: {"set_alpha_to_one": v}),
    Option("sigma_spacing", ("use_karras_sigmas",), _sigma_spacing, _sigma_flags),
    renamed("sigma_spacing", "sigma_schedule"),
    renamed("solver_order", "order"),
    renamed("solver_type", "solver_type", "solver_p", words=dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")),
    renamed("solver_type", "solver_type", words=dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")),  # all but UniPC
    renamed("spacing", "timestep_spacing"),
    optional("threshold", "thresholding", "dynamic_thresholding_ratio"),
    renamed("threshold_max", "sample_max_value"),
    renamed("train_steps", "num_train_timesteps"),
    renamed("use_clipped", "use_clipped_model_output"),
    renamed("variance", "variance_type"),
)


def refusals(name: str, c: Config) -> Iterator[str]:
    """Yield the reasons why class ``name`` can't be run with fields ``c``, here or in diffusers itself."""
    learned, of = c.get("variance_type") in LEARNED, name.startswith
    thresholds, algorithm = c.get("thresholding"), c.get("algorithm_type")
    if of("DDPM") and c["variance_type"] == "fixed_large_log":
        yield "variance_type='fixed_large_log' gives NaN in diffusers 0.42.1: use fixed_large, which it stands for"
    if of("DDIMInverse") and c["timestep_spacing"] == "linspace":
        yield "there is no timestep_spacing='linspace': use leading or trailing"
    if of("DPMSolverSinglestep") and thresholds and algorithm == "dpmsolver":
        yield "thresholding raises with algorithm_type='dpmsolver' in diffusers 0.42.1: use 'dpmsolver++'"
    if of("DPMSolver") and learned and c["prediction_type"] != "epsilon":
        yield f"variance_type={c['variance_type']!r} goes with prediction_type='epsilon' only"
    if of(("DPMSolver", "EDMDPMSolver")) and algorithm == "deis" and c.get("final_sigmas_type") == "zero":
        yield "algorithm_type='deis' (read as dpmsolver++) needs final_sigmas_type='sigma_min'"
    if of("UniPC") and c["solver_p"] is not None:
        yield "a scheduler as solver_p is not supported: use its own predictor, solver_p=None"
    for key in ("use_dynamic_shifting", "shift_terminal"):
        if c.get(key):
            yield f"{key} belongs to flow matching: leave it out"
    if of("SASolver") and c["tau_func"] is not None:
        yield "a tau_func can't be read from a config: leave it out for the default, tau 1 in timesteps 200 to 800"
    if of("SASolver") and learned:
        yield "a learned variance raises in diffusers 0.42.1, whose noise has its channels too: leave it out"
    if of("SASolver") and thresholds and algorithm == "noise_prediction":
        yield "thresholding raises with noise_prediction in diffusers 0.42.1: use data_prediction"
    if of("IPNDM") and c["trained_betas"] is not None:
        yield "trained_betas are the noise of every row here, whatever the number of steps; only the default is known"
    curves = [key for key in CURVES if c.get(key)]
    if len(curves) > 1:
        yield f"{' and '.join(curves)} exclude each other: keep one"


# --- the classes ------------------------------------------------------------------------------------------------------


class Reader:
    """Description of one scheduler class.

    ``name``: that of our sampler. ``fields``: the class's own, with their defaults. ``predictions``: its prediction
    types. ``betas``: its curves of betas. ``known``: the values of further fields that are not refused.
    """

    def __init__(
        self,
        name: str,
        *groups: Config,
        predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample"),
        more_betas: tuple[str, ...] = (),
        known: Mapping[str, tuple[str, ...]] = {},
        **own: Any,
    ) -> None:
        self.name = name
        self.fields: dict[str, Any] = {key: default for group in (*groups, own) for key, default in group.items()}
        self.predictions = predictions
        self.betas = ("linear", "scaled_linear", "squaredcos_cap_v2", *more_betas)
        self.known = known

    @property
    def sampler(self) -> type[Method[Any, Any]]:
        """Our sampler."""
        return SAMPLERS[self.name]

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The options of our sampler that the class has."""
        known = SCHEDULE | self.fields
        fitting = [option for option in OPTIONS if all(key in known for key in option.needs)]
        found = {option.name: option for option in [*(renamed(key, key) for key in self.fields), *reversed(fitting)]}
        return tuple(found[f.name] for f in fields(self.sampler) if f.name in found)


SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = {"rescale_betas_zero_snr": False}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
LIMITS = CLIP | THRESHOLD
CURVES = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ENDS = {"sigma_min": None, "sigma_max": None}
TO_ZERO = {"final_sigmas_type": "zero"}
CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0}
EULER = CURVES | ENDS | TO_ZERO | CHURN | {"interpolation_type": "linear", "timestep_type": "discrete"}
FINAL = {"lower_order_final": True}
LAMBDA = CURVES | THRESHOLD | ENDS | FINAL
VARIANCE = {"lambda_min_clipped": -INFINITE, "variance_type": None}
SECOND_ORDER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
DPM = LAMBDA | VARIANCE | SECOND_ORDER
DEIS_WORDS = {
    "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
    "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
}
UNIPC = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None}
SA = {"predictor_order": 2, "corrector_order": 2, "algorithm_type": "data_prediction", "tau_func": None}
KARRAS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
EDM = KARRAS | TO_ZERO | {"sigma_schedule": "karras"}
# common to LCM and TCD; alpha_to_one, spacing and offset have no effect on them in the reference
DISTILLED = SD_BETAS | LIMITS | ZERO_SNR | LEADING | {"beta_schedule": "scaled_linear", "set_alpha_to_one": True}
DISTILLED |= {"clip_sample": False, "original_inference_steps": 50, "strength": 1.0, "timestep_scaling": 10.0}
NO_SAMPLE = ("epsilon", "v_prediction")

READERS: dict[str, Reader] = {
    "DDPMScheduler": Reader(
        "ddpm", LIMITS, ZERO_SNR, LEADING, variance_type="fixed_small", more_betas=("laplace", "sigmoid")
    ),
    "DDIMScheduler": Reader(
        "ddim", LIMITS, ZERO_SNR, LEADING, set_alpha_to_one=True, eta=0.0, use_clipped_model_output=False
    ),
    "DDIMInverseScheduler": Reader(
        "ddim_inverse", ZERO_SNR, LEADING, CLIP, set_alpha_to_one=True, set_alpha_to_zero=None
    ),
    "PNDMScheduler": Reader("pndm", LEADING, predictions=NO_SAMPLE, set_alpha_to_one=False, skip_prk_steps=False),
    "IPNDMScheduler": Reader("ipndm"),
    "EulerDiscreteScheduler": Reader(
        "euler", ZERO_SNR, LINSPACE, EULER, predictions=(*NO_SAMPLE, "sample", "original_sample")
    ),
    "EulerAncestralDiscreteScheduler": Reader("euler_ancestral", ZERO_SNR, LINSPACE, predictions=NO_SAMPLE),
    "HeunDiscreteScheduler": Reader("heun", SD_BETAS, CURVES, LINSPACE, CLIP, clip_sample=False, more_betas=("exp",)),
    "LMSDiscreteScheduler": Reader("lms", CURVES, LINSPACE, order=4),
    "KDPM2DiscreteScheduler": Reader("dpm2", SD_BETAS, CURVES, LINSPACE, predictions=NO_SAMPLE),
    "KDPM2AncestralDiscreteScheduler": Reader("dpm2_ancestral", SD_BETAS, CURVES, LINSPACE, predictions=NO_SAMPLE),
    "DPMSolverSDEScheduler": Reader(
        "dpmpp_sde", SD_BETAS, CURVES, LINSPACE, predictions=NO_SAMPLE, noise_sampler_seed=None, s_noise=1.0
    ),
    "DPMSolverMultistepScheduler": Reader(
        "dpmpp_2m", DPM, ZERO_SNR, LINSPACE, TO_ZERO, euler_at_final=False, use_lu_lambdas=False
    ),
    "DPMSolverSinglestepScheduler": Reader("dpmpp_2s", DPM, TO_ZERO, lower_order_final=False),
    "DPMSolverMultistepInverseScheduler": Reader("dpmpp_2m_inverse", DPM, LINSPACE, euler_at_final=False),
    "DEISMultistepScheduler": Reader(
        "deis", LAMBDA, LINSPACE, SECOND_ORDER, algorithm_type="deis", solver_type="logrho", known=DEIS_WORDS
    ),
    "UniPCMultistepScheduler": Reader(
        "unipc", LAMBDA, ZERO_SNR, LINSPACE, TO_ZERO, UNIPC, use_dynamic_shifting=False, shift_terminal=None
    ),
    "SASolverScheduler": Reader("sa_solver", LAMBDA, VARIANCE, LINSPACE, SA),
    "EDMEulerScheduler": Reader("edm_euler", EDM, CHURN, predictions=NO_SAMPLE),
    "EDMDPMSolverMultistepScheduler": Reader(
        "edm_dpmpp_2m", EDM, THRESHOLD, SECOND_ORDER, FINAL, euler_at_final=False, predictions=NO_SAMPLE
    ),
    "CMStochasticIterativeScheduler": Reader("cm", KARRAS, num_train_timesteps=40, s_noise=1.0, clip_denoised=True),
    "LCMScheduler": Reader("lcm", DISTILLED),
    "TCDScheduler": Reader("tcd", DISTILLED, eta=0.3),
}
