"""Fields of diffusers' scheduler classes: their names, their defaults, and the corresponding options here.

A :class:`Reader` lists the fields of a class with the class's own defaults (they differ: by default DDIM clips and
Euler uses linspace), and maps them to options here. read.py applies the table; a new class is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minidiff.config import check, quote
from minidiff.config import one_of as config_one_of
from minidiff.samplers.consistency import CM, LCM, TCD
from minidiff.samplers.ddim import DDIM, DDIMInverse
from minidiff.samplers.ddpm import DDPM, FIXED_LARGE_LOG
from minidiff.samplers.deis import DEIS
from minidiff.samplers.dpm2 import DPM2, DPM2Ancestral
from minidiff.samplers.dpm_singlestep import DPMSolverSinglestep
from minidiff.samplers.dpm_solver import DPMSolver, DPMSolverInverse
from minidiff.samplers.dpmpp_sde import DPMSDE
from minidiff.samplers.edm import EDMEuler, EDMMultistep
from minidiff.samplers.euler import Euler, EulerAncestral
from minidiff.samplers.heun import Heun
from minidiff.samplers.lms import LMS
from minidiff.samplers.method import Method
from minidiff.samplers.pndm import IPNDM, PNDM
from minidiff.samplers.sa_solver import SASolver
from minidiff.samplers.unipc import UniPC

Config = Mapping[str, Any]
Source = str | Callable[[Config], Any]
"""Source of an option: the name of a field, or a function of all fields with defaults filled in."""

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
# common to LCM and TCD; alpha_to_one, spacing and offset have no effect on them in the reference
DISTILLED = {
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "strength": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "clip_sample": False,
}
SIGMA_SPACINGS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
LIMITS = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
LIMIT_OPTIONS: dict[str, Source] = {
    "clip": lambda c: c["clip_sample_range"] if c["clip_sample"] else None,
    "threshold": lambda c: c["dynamic_thresholding_ratio"] if c["thresholding"] else None,
    "threshold_max": "sample_max_value",
}
SPACING_OPTIONS: dict[str, Source] = {"spacing": "timestep_spacing", "steps_offset": "steps_offset"}
EDM: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
EDM |= {"sigma_schedule": "karras", "final_sigmas_type": "zero"}
EDM_OPTIONS: dict[str, Source] = {"sigma_spacing": "sigma_schedule", "final_sigma": "final_sigmas_type"}
EDM_OPTIONS |= {name: name for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}
IPNDM_BETAS = "trained_betas are the noise of every row here, whatever the number of steps; only the default is known"
DEIS_LANDS = "algorithm_type='deis' (read as dpmsolver++) needs final_sigmas_type='sigma_min'"


@dataclass(frozen=True)
class Reader:
    """Description of one scheduler class: our ``sampler``, the class's ``fields`` with defaults, the ``options``."""

    sampler: type[Method[Any, Any]]
    fields: dict[str, Any]
    options: dict[str, Source]
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    beta_schedules: tuple[str, ...] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    refuse: Callable[[Config], str | None] = field(default=lambda c: None)  # why these fields can't go together


def one_of(config: Config, key: str, known: tuple[str, ...]) -> str:
    config_one_of(known, **{key: config[key]})
    return str(config[key])


def _rows(c: Config) -> tuple[Any, ...]:
    value = c["disable_corrector"]
    check(isinstance(value, (list, tuple)), f"disable_corrector={quote(value)} must be a list of rows")
    return tuple(value)


def _sigma_spacing(c: Config) -> str:
    chosen = [name for name in ("karras", "exponential", "beta") if c[f"use_{name}_sigmas"]]
    return chosen[0] if chosen else "timesteps"


def _one_sigma_spacing(c: Config) -> str | None:
    chosen = [name for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if c[name]]
    return f"{' and '.join(chosen)} exclude each other: keep one" if len(chosen) > 1 else None


LAMBDA = SIGMA_SPACINGS | {
    "solver_order": 2,
    "lower_order_final": True,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "sigma_min": None,
    "sigma_max": None,
}
LAMBDA_OPTIONS: dict[str, Source] = {
    "threshold": LIMIT_OPTIONS["threshold"],
    "threshold_max": "sample_max_value",
    "sigma_spacing": _sigma_spacing,
} | {name: name for name in ("solver_order", "lower_order_final", "sigma_min", "sigma_max")}
DPM = LAMBDA | {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}
DPM_OPTIONS: dict[str, Source] = LAMBDA_OPTIONS | {
    "algorithm": lambda c: "dpmsolver++" if c["algorithm_type"] == "deis" else c["algorithm_type"],
    "solver_type": lambda c: "midpoint" if c["solver_type"] in ("logrho", "bh1", "bh2") else c["solver_type"],
    "lambda_min_clipped": lambda c: None if c["lambda_min_clipped"] == -float("inf") else c["lambda_min_clipped"],
    "learned_variance": lambda c: c["variance_type"] in ("learned", "learned_range"),
}

SA_OPTIONS: dict[str, Source] = {
    **{name: source for name, source in LAMBDA_OPTIONS.items() if name != "solver_order"},
    "predictor_order": "predictor_order",
    "corrector_order": "corrector_order",
    "algorithm": "algorithm_type",
    "lambda_min_clipped": DPM_OPTIONS["lambda_min_clipped"],
}


def _sigma_spacing_or_lu(c: Config) -> str:
    return "lu" if c["use_lu_lambdas"] and not c["use_karras_sigmas"] else _sigma_spacing(c)


def _unfit_for_dpm(c: Config) -> str | None:
    learned = c["variance_type"] in ("learned", "learned_range")
    if learned and c["prediction_type"] != "epsilon":
        return f"variance_type={c['variance_type']!r} goes with prediction_type='epsilon' only"
    if c["algorithm_type"] == "deis" and c.get("final_sigmas_type") == "zero":
        return "algorithm_type='deis' needs final_sigmas_type='sigma_min'"
    return _one_sigma_spacing(c)


def _unfit_for_deis(c: Config) -> str | None:
    one_of(c, "algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))
    one_of(c, "solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    return _one_sigma_spacing(c)


def _unfit_for_unipc(c: Config) -> str | None:
    if c["solver_p"] is not None:
        return "a scheduler as solver_p is not supported: use its own predictor, solver_p=None"
    flow = [name for name in ("use_dynamic_shifting", "shift_terminal") if c[name]]
    return f"{flow[0]} belongs to flow matching: leave it out" if flow else _one_sigma_spacing(c)


def _unfit_for_singlestep(c: Config) -> str | None:
    if c["thresholding"] and c["algorithm_type"] == "dpmsolver":
        return "thresholding raises with algorithm_type='dpmsolver' in diffusers 0.42.1: use 'dpmsolver++'"
    return _unfit_for_dpm(c)


def _unfit_for_sa(c: Config) -> str | None:
    if c["tau_func"] is not None:
        return "a tau_func can't be read from a config: leave it out for the default, tau 1 in timesteps 200 to 800"
    if c["variance_type"] in ("learned", "learned_range"):
        return "a learned variance raises in diffusers 0.42.1, whose noise has its channels too: leave it out"
    if c["thresholding"] and c["algorithm_type"] == "noise_prediction":
        return "thresholding raises with noise_prediction in diffusers 0.42.1: use data_prediction"
    return _one_sigma_spacing(c)


READERS: dict[str, Reader] = {
    "DDPMScheduler": Reader(
        sampler=DDPM,
        fields=LIMITS | ZERO_SNR | {"variance_type": "fixed_small", "timestep_spacing": "leading", "steps_offset": 0},
        options=SPACING_OPTIONS | LIMIT_OPTIONS | {"variance": "variance_type"},
        beta_schedules=("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
        refuse=lambda c: FIXED_LARGE_LOG if c["variance_type"] == "fixed_large_log" else None,
    ),
    "DDIMScheduler": Reader(
        sampler=DDIM,
        fields=LIMITS
        | ZERO_SNR
        | {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
        | {"eta": 0.0, "use_clipped_model_output": False},
        options=SPACING_OPTIONS
        | LIMIT_OPTIONS
        | {"set_alpha_to_one": "set_alpha_to_one", "eta": "eta", "use_clipped": "use_clipped_model_output"},
    ),
    "PNDMScheduler": Reader(
        sampler=PNDM,
        fields={
            "timestep_spacing": "leading",
            "steps_offset": 0,
            "set_alpha_to_one": False,
            "skip_prk_steps": False,
        },
        options=SPACING_OPTIONS
        | {"set_alpha_to_one": "set_alpha_to_one", "runge_kutta": lambda c: not c["skip_prk_steps"]},
        predictions=("epsilon", "v_prediction"),
    ),
    "EulerDiscreteScheduler": Reader(
        sampler=Euler,
        fields=ZERO_SNR
        | {"timestep_spacing": "linspace", "steps_offset": 0, "interpolation_type": "linear"}
        | {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
        | {"sigma_min": None, "sigma_max": None, "timestep_type": "discrete", "final_sigmas_type": "zero"}
        | {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0},
        options=SPACING_OPTIONS
        | {
            "interpolation": "interpolation_type",
            "sigma_spacing": _sigma_spacing,
            "continuous": lambda c: one_of(c, "timestep_type", ("discrete", "continuous")) == "continuous",
            "final_sigma": "final_sigmas_type",
            "s_tmax": lambda c: None if c["s_tmax"] == float("inf") else c["s_tmax"],
        }
        | {name: name for name in ("sigma_min", "sigma_max", "s_churn", "s_tmin", "s_noise")},
        predictions=("epsilon", "v_prediction", "sample", "original_sample"),
        refuse=_one_sigma_spacing,
    ),
    "EulerAncestralDiscreteScheduler": Reader(
        sampler=EulerAncestral,
        fields=ZERO_SNR | {"timestep_spacing": "linspace", "steps_offset": 0},
        options=SPACING_OPTIONS,
        predictions=("epsilon", "v_prediction"),
    ),
    "HeunDiscreteScheduler": Reader(
        sampler=Heun,
        fields=SD_BETAS
        | SIGMA_SPACINGS
        | {"timestep_spacing": "linspace", "steps_offset": 0, "clip_sample": False, "clip_sample_range": 1.0},
        options=SPACING_OPTIONS | {"sigma_spacing": _sigma_spacing, "clip": LIMIT_OPTIONS["clip"]},
        beta_schedules=("linear", "scaled_linear", "squaredcos_cap_v2", "exp"),
        refuse=_one_sigma_spacing,
    ),
    "LMSDiscreteScheduler": Reader(
        sampler=LMS,
        fields=SIGMA_SPACINGS | {"timestep_spacing": "linspace", "steps_offset": 0, "order": 4},
        options=SPACING_OPTIONS | {"sigma_spacing": _sigma_spacing, "solver_order": "order"},
        refuse=_one_sigma_spacing,
    ),
    "DPMSolverMultistepScheduler": Reader(
        sampler=DPMSolver,
        fields=DPM
        | ZERO_SNR
        | {"timestep_spacing": "linspace", "steps_offset": 0, "final_sigmas_type": "zero"}
        | {"euler_at_final": False, "use_lu_lambdas": False},
        options=SPACING_OPTIONS
        | DPM_OPTIONS
        | {
            "sigma_spacing": _sigma_spacing_or_lu,
            "final_sigma": "final_sigmas_type",
            "euler_at_final": "euler_at_final",
            "cut_timesteps": lambda c: c["beta_schedule"] == "squaredcos_cap_v2",
        },
        refuse=_unfit_for_dpm,
    ),
    "KDPM2DiscreteScheduler": Reader(
        sampler=DPM2,
        fields=SD_BETAS | SIGMA_SPACINGS | {"timestep_spacing": "linspace", "steps_offset": 0},
        options=SPACING_OPTIONS | {"sigma_spacing": _sigma_spacing},
        predictions=("epsilon", "v_prediction"),
        refuse=_one_sigma_spacing,
    ),
    "KDPM2AncestralDiscreteScheduler": Reader(
        sampler=DPM2Ancestral,
        fields=SD_BETAS | SIGMA_SPACINGS | {"timestep_spacing": "linspace", "steps_offset": 0},
        options=SPACING_OPTIONS | {"sigma_spacing": _sigma_spacing},
        predictions=("epsilon", "v_prediction"),
        refuse=_one_sigma_spacing,
    ),
    "DEISMultistepScheduler": Reader(
        sampler=DEIS,
        fields=LAMBDA
        | {"timestep_spacing": "linspace", "steps_offset": 0, "algorithm_type": "deis", "solver_type": "logrho"},
        options=SPACING_OPTIONS | LAMBDA_OPTIONS,
        refuse=_unfit_for_deis,
    ),
    "UniPCMultistepScheduler": Reader(
        sampler=UniPC,
        fields=LAMBDA
        | ZERO_SNR
        | {"timestep_spacing": "linspace", "steps_offset": 0, "final_sigmas_type": "zero", "solver_type": "bh2"}
        | {"predict_x0": True, "disable_corrector": [], "solver_p": None}
        | {"use_dynamic_shifting": False, "shift_terminal": None},
        options=SPACING_OPTIONS
        | LAMBDA_OPTIONS
        | {
            "solver_type": lambda c: "bh2" if c["solver_type"] in ("midpoint", "heun", "logrho") else c["solver_type"],
            "predict_x0": "predict_x0",
            "disable_corrector": _rows,
            "final_sigma": "final_sigmas_type",
        },
        refuse=_unfit_for_unipc,
    ),
    "LCMScheduler": Reader(
        sampler=LCM,
        fields=SD_BETAS | LIMITS | ZERO_SNR | DISTILLED | {"timestep_scaling": 10.0},
        options=LIMIT_OPTIONS
        | {
            "original_steps": "original_inference_steps",
            "strength": "strength",
            "timestep_scaling": "timestep_scaling",
        },
    ),
    "TCDScheduler": Reader(
        sampler=TCD,
        fields=SD_BETAS | LIMITS | ZERO_SNR | DISTILLED | {"timestep_scaling": 10.0, "eta": 0.3},
        options={"original_steps": "original_inference_steps", "strength": "strength", "eta": "eta"},
    ),
    "DDIMInverseScheduler": Reader(
        sampler=DDIMInverse,
        fields=ZERO_SNR
        | {"timestep_spacing": "leading", "steps_offset": 0, "clip_sample": True, "clip_sample_range": 1.0}
        | {"set_alpha_to_one": True, "set_alpha_to_zero": None},
        options=SPACING_OPTIONS
        | {
            "clip": LIMIT_OPTIONS["clip"],
            "set_alpha_to_one": lambda c: c[
                "set_alpha_to_one" if c["set_alpha_to_zero"] is None else "set_alpha_to_zero"
            ],
        },
    ),
    "EDMEulerScheduler": Reader(
        sampler=EDMEuler,
        fields=EDM | {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0},
        options=EDM_OPTIONS
        | {"s_tmax": lambda c: None if c["s_tmax"] == float("inf") else c["s_tmax"]}
        | {name: name for name in ("s_churn", "s_tmin", "s_noise")},
        predictions=("epsilon", "v_prediction"),
    ),
    "EDMDPMSolverMultistepScheduler": Reader(
        sampler=EDMMultistep,
        fields=EDM
        | {name: LIMITS[name] for name in ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")}
        | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
        | {"lower_order_final": True, "euler_at_final": False},
        options=EDM_OPTIONS
        | {name: LIMIT_OPTIONS[name] for name in ("threshold", "threshold_max")}
        | {
            "sde": lambda c: (
                one_of(c, "algorithm_type", ("dpmsolver++", "sde-dpmsolver++", "deis")) == "sde-dpmsolver++"
            ),
            "heun": lambda c: one_of(c, "solver_type", ("midpoint", "heun", "logrho", "bh1", "bh2")) == "heun",
        }
        | {name: name for name in ("solver_order", "lower_order_final", "euler_at_final")},
        predictions=("epsilon", "v_prediction"),
        refuse=lambda c: DEIS_LANDS if c["algorithm_type"] == "deis" and c["final_sigmas_type"] == "zero" else None,
    ),
    "DPMSolverSinglestepScheduler": Reader(
        sampler=DPMSolverSinglestep,
        fields=DPM | {"lower_order_final": False, "final_sigmas_type": "zero"},
        options=DPM_OPTIONS | {"final_sigma": "final_sigmas_type"},
        refuse=_unfit_for_singlestep,
    ),
    "DPMSolverMultistepInverseScheduler": Reader(
        sampler=DPMSolverInverse,
        fields=DPM | {"timestep_spacing": "linspace", "steps_offset": 0, "euler_at_final": False},
        options=SPACING_OPTIONS
        | DPM_OPTIONS
        | {"euler_at_final": "euler_at_final", "final_sigma": lambda c: "sigma_min"},
        refuse=_unfit_for_dpm,
    ),
    "CMStochasticIterativeScheduler": Reader(
        sampler=CM,
        fields={"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
        | {"s_noise": 1.0, "rho": 7.0, "clip_denoised": True},
        options={
            "train_steps": "num_train_timesteps",
            "clip": lambda c: 1.0 if c["clip_denoised"] else None,
            **{name: name for name in ("sigma_min", "sigma_max", "sigma_data", "s_noise", "rho")},
        },
    ),
    "IPNDMScheduler": Reader(
        sampler=IPNDM,
        fields={},
        options={},
        refuse=lambda c: None if c["trained_betas"] is None else IPNDM_BETAS,
    ),
    "SASolverScheduler": Reader(
        sampler=SASolver,
        fields={name: default for name, default in LAMBDA.items() if name != "solver_order"}
        | {"timestep_spacing": "linspace", "steps_offset": 0, "predictor_order": 2, "corrector_order": 2}
        | {"tau_func": None, "algorithm_type": "data_prediction", "lambda_min_clipped": -float("inf")}
        | {"variance_type": None},
        options=SPACING_OPTIONS | SA_OPTIONS,
        refuse=_unfit_for_sa,
    ),
    "DPMSolverSDEScheduler": Reader(
        sampler=DPMSDE,
        fields=SD_BETAS
        | SIGMA_SPACINGS
        | {"timestep_spacing": "linspace", "steps_offset": 0, "noise_sampler_seed": None, "s_noise": 1.0},
        options=SPACING_OPTIONS
        | {"sigma_spacing": _sigma_spacing, "noise_seed": "noise_sampler_seed", "s_noise": "s_noise"},
        predictions=("epsilon", "v_prediction"),
        refuse=_one_sigma_spacing,
    ),
}
