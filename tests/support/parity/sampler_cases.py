"""Table of the cases in which ``test_samplers.py`` compares samplers with diffusers, one entry a scheduler class.

The configs of a class are a covering sample of its options: every pair of settings appears. Each entry says for how
many steps they run, which of them start at every row, which single runs come on top (999 steps, given timesteps), and
what both programs refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.support.parity.axes import (
    BETAS,
    CHURN,
    COSINE,
    ENDS,
    LINEAR,
    PREDICTIONS,
    SIGMAS,
    SIGMAS_AND_LU,
    SPACINGS,
    SPACINGS_FROM_LEADING,
    TO_MIN,
    Config,
)  # fmt: skip
from tests.support.parity.sampler_twins import DTYPES, config, turn

F32, F16, BF16 = DTYPES
KINDS = ("midpoint", "heun")
NO_SAMPLE = PREDICTIONS[:2]
LEADING_1: Config = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING: Config = {"timestep_spacing": "trailing"}
V: Config = {"prediction_type": "v_prediction"}
CLIPPED: Config = {"thresholding": True, "sample_max_value": 1.5}
ENDLESS: Config = {**COSINE, "lambda_min_clipped": -5.1}
# timesteps that a user chooses: many, one, and with the last ones of training
GIVEN = ([999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [500], [998.5, 17.25, 0])
WHOLE = (*GIVEN[:2], [998, 17, 0])


class Refused(NamedTuple):
    """What minidiff refuses with a message that matches ``ours``, at the latest when a run of ``given`` is planned.
    ``theirs``: what the reference does with it: the errors that it raises, by then or in a step; "nan": a sample that
    is not finite; None: it runs, or fails after too many steps to wait for."""

    options: Config
    given: dict[str, Any]
    theirs: Any
    ours: str


def fifty(configs: list[Config]) -> list[tuple[Config, Any]]:
    return [(c, 50) for c in configs]


def steps(n: int) -> dict[str, Any]:
    return {"num_inference_steps": n}


@dataclass(frozen=True)
class Family:
    """``how`` the configs run: in every dtype ("all"), the dtypes taking turns ("some"), or mostly in float32 ("wide":
    the solvers in lambda, whose x0 may be too large for float16)."""

    name: str
    configs: list[Config]
    how: str = "all"
    lengths: Sequence[int] | Callable[[Config, int], Sequence[int]] = (1, 2, 5, 20, 50)
    first_turn: int = 0  # of the dtypes
    also_all: Sequence[Config] = ()  # these in every dtype, too
    starts: Sequence[Config] = ()  # a run of start_steps from each, or every second, of its rows
    start_steps: int = 20
    start_every: int = 1
    runs: Sequence[tuple[Config, int | dict[str, Any]]] = ()  # further single runs
    mixed: Sequence[Config] = ()  # sample and model in different dtypes, where the class can
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = ((F32, F16), (BF16, F32))
    loops: Sequence[tuple[Config, int]] = ()  # through Scheduler, from a row
    refused: Sequence[Refused] = field(default=())

    def make(self, options: Config) -> Config:
        """The config of the class with these options, and Stable Diffusion's betas if it has any."""
        if "_class_name" in options:
            return options
        own = self.name.startswith(("EDM", "CM", "IPNDM"))
        return {"_class_name": self.name, **options} if own else config(self.name, **options)


def bare(name: str) -> Config:
    """A config with the defaults of the class."""
    return {"_class_name": name}


def others(name: str, *betas: str) -> list[Config]:
    """Other schedules of training: named betas, a list of them, another number of timesteps."""
    named = [config(name, beta_schedule=b, beta_start=0.0001, beta_end=0.02) for b in betas]
    return [*named, config(name, trained_betas=BETAS), config(name, num_train_timesteps=400)]


def no_sample(error: Any = NotImplementedError) -> Refused:
    return Refused({"prediction_type": "sample"}, steps(3), error, "prediction_type='sample'")


NO_TIMESTEPS = "timesteps can't be given with sigma_spacing"
TWICE = r"steps=1000 of spacing=.* visit a timestep twice"
FEWER = "use fewer steps or steps_offset=0"


# --- DDPM, DDIM, PNDM -------------------------------------------------------------------------------------------------

LIMITS: tuple[Config, ...] = (
    {"clip_sample": False},
    {"clip_sample_range": 2.5},
    {"thresholding": True},
    {"thresholding": True, "clip_sample": False, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
)
ZERO_SNR: Config = {"rescale_betas_zero_snr": True, **TRAILING}
UNCLIPPED: Config = {**ZERO_SNR, "clip_sample": False}
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range")
ROWS_TOO_MANY = [
    (TRAILING, n) for n in (61, 103, 997)
]  # one more, at timestep -1, for 62 step counts; 997 is a plain one
PURE_NOISE = Refused(UNCLIPPED, steps(5), "nan", "zero_snr")


def ddpm(**options: Any) -> Config:
    return config("DDPMScheduler", **options)


DDPM = [ddpm(prediction_type=p, variance_type=v) for p, v in product(PREDICTIONS, VARIANCES)]
DDPM += [ddpm(**s, **lim, prediction_type=p) for s, lim, p in product(SPACINGS_FROM_LEADING, LIMITS, PREDICTIONS)]
DDPM += [ddpm(**UNCLIPPED, prediction_type=p) for p in PREDICTIONS[1:]]
DDPM += [ddpm(**ZERO_SNR)]  # an epsilon model, saved by the clamp
DDPM += others("DDPMScheduler", "linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def ddim(**options: Any) -> Config:
    return config("DDIMScheduler", **options)


DDIM = [
    ddim(**lim, prediction_type=p, eta=eta, use_clipped_model_output=clipped)
    for lim, p, eta, clipped in product(LIMITS, PREDICTIONS, (0.0, 0.7), (False, True))
]
DDIM += [
    ddim(**s, set_alpha_to_one=one, prediction_type=p, clip_sample=False, eta=0.3)
    for s, one, p in product(SPACINGS_FROM_LEADING, (True, False), PREDICTIONS)
]
DDIM += [ddim(**UNCLIPPED, prediction_type=p) for p in PREDICTIONS[1:]]
DDIM += [ddim(eta=1.0), ddim(eta=1.0, steps_offset=1), ddim(**UNCLIPPED, **V, eta=0.5), ddim(**ZERO_SNR)]
DDIM += others("DDIMScheduler", "linear", "squaredcos_cap_v2")


def pndm(**options: Any) -> Config:
    return config("PNDMScheduler", **options)


PNDM_SPACINGS: tuple[Config, ...] = ({}, {"steps_offset": 1}, TRAILING, {"timestep_spacing": "linspace"})
PNDM = [
    pndm(skip_prk_steps=skip, **s, set_alpha_to_one=one, prediction_type=p)
    for skip, s, one, p in product((True, False), PNDM_SPACINGS, (True, False), NO_SAMPLE)
]
PNDM += [
    pndm(skip_prk_steps=skip, **b)
    for skip, b in product(
        (True, False),
        (
            {"beta_schedule": "linear", "beta_end": 0.02},
            {"beta_schedule": "squaredcos_cap_v2"},
            {"trained_betas": BETAS},
            {"num_train_timesteps": 400},
        ),
    )
]
PNDM_LONG = [(c, 999) for c in [c for c in PNDM if "num_train_timesteps" not in c][::3]]

INVERSE_CLIPS: tuple[Config, ...] = ({"clip_sample": False}, {}, {"clip_sample_range": 2.5})


def ddim_inverse(**options: Any) -> Config:
    return config("DDIMInverseScheduler", **options)


DDIM_INVERSE = [
    ddim_inverse(**turn(INVERSE_CLIPS, i), **s, prediction_type=p, set_alpha_to_one=p != "sample" and i % 2 == 0)
    for i, (s, p) in enumerate(product(SPACINGS[1:], PREDICTIONS))
]
DDIM_INVERSE += [
    ddim_inverse(**c, rescale_betas_zero_snr=True, **V, **s) for c, s in zip(INVERSE_CLIPS, SPACINGS[1:], strict=True)
]
DDIM_INVERSE += [ddim_inverse(**COSINE), ddim_inverse(beta_schedule="linear"), *others("DDIMInverseScheduler")]
DDIM_INVERSE += [bare("DDIMInverseScheduler"), ddim_inverse(set_alpha_to_zero=False)]

# --- Euler, Heun, DPM2, LMS, DPM++ SDE --------------------------------------------------------------------------------


def euler(**options: Any) -> Config:
    return config("EulerDiscreteScheduler", **options)


EULER = [euler(**s, **g, prediction_type=p) for s, g, p in product(SPACINGS, SIGMAS, PREDICTIONS)]
EULER += [euler(**g, **ENDS, **c, final_sigmas_type=f) for g, c, f in product(SIGMAS, CHURN, ("zero", "sigma_min"))]
EULER += [
    euler(**g, interpolation_type=i, timestep_type=t, prediction_type=p)
    for g, i, t, p in product(SIGMAS, ("linear", "log_linear"), ("discrete", "continuous"), NO_SAMPLE)
]
EULER += [euler(interpolation_type="log_linear", s_churn=3.0, final_sigmas_type="sigma_min")]
EULER += [euler(prediction_type=p, **c, **SPACINGS[1]) for p, c in product(PREDICTIONS, CHURN)]
EULER += [euler(prediction_type="original_sample")]
EULER += [euler(rescale_betas_zero_snr=True, **s, prediction_type=p) for s, p in product(SPACINGS[1:], NO_SAMPLE)]
EULER += others("EulerDiscreteScheduler", "linear", "squaredcos_cap_v2")
EULER_TIMESTEPS = [
    ({**o, **i}, {"timesteps": t})
    for o, t, i in product(({}, SPACINGS[1], TO_MIN), GIVEN, ({}, {"interpolation_type": "log_linear"}))
]
EULER_SIGMAS = [
    (o, {"sigmas": s})
    for o, s in product(
        ({}, SIGMAS[1], {"timestep_type": "continuous", **V}),
        (
            [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0],
            [700.0, 80.0, 3.0, 0.01, 0.001],
            list(np.linspace(10, 0.1, 7)),
        ),
    )
]


def ancestral(**options: Any) -> Config:
    return config("EulerAncestralDiscreteScheduler", **options)


ANCESTRAL = [ancestral(**s, prediction_type=p) for s, p in product(SPACINGS, NO_SAMPLE)]
ANCESTRAL += [ancestral(rescale_betas_zero_snr=True, **s, **V) for s in SPACINGS]
ANCESTRAL += others("EulerAncestralDiscreteScheduler", "linear", "squaredcos_cap_v2")

HEUN_CLIPS: tuple[Config, ...] = ({}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 2.5})


def heun(**options: Any) -> Config:
    return config("HeunDiscreteScheduler", **options)


HEUN = [
    heun(**s, **g, **turn(HEUN_CLIPS, i + j), prediction_type=turn(PREDICTIONS, 4 * i + j))
    for (i, s), (j, g) in product(enumerate(SPACINGS), enumerate(SIGMAS))
]
HEUN += [heun(**c, prediction_type=p) for c, p in product(HEUN_CLIPS, PREDICTIONS)]
HEUN += [*others("HeunDiscreteScheduler", "linear", "squaredcos_cap_v2", "exp"), bare("HeunDiscreteScheduler")]


def lms(**options: Any) -> Config:
    return config("LMSDiscreteScheduler", **options)


LMS = [lms(**s, **g, prediction_type=turn(PREDICTIONS, i)) for i, (s, g) in enumerate(product(SPACINGS, SIGMAS))]
LMS += [lms(order=o, **g) for o, g in zip((1, 2, 3, 8), SIGMAS, strict=True)]
LMS += [*others("LMSDiscreteScheduler", "linear", "squaredcos_cap_v2"), bare("LMSDiscreteScheduler")]

# both classes of DPM2 together go through every pair of spacings; to build their references is what takes the time
KDPM2 = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
KDPM2_PAIRS = [
    config(KDPM2[(i + i // 4) % 2], **s, **g, prediction_type=NO_SAMPLE[i // 2 % 2])
    for i, (s, g) in enumerate(product(SPACINGS, SIGMAS))
]


KDPM2_OTHERS = [o for name in KDPM2 for o in others(name, "linear", "squaredcos_cap_v2")]
KDPM2_ALL = [*KDPM2_PAIRS, *KDPM2_OTHERS, *map(bare, KDPM2)]


def kdpm2(name: str, *refused: Refused) -> Family:
    def own(configs: list[Config]) -> list[Config]:
        return [c for c in configs if c["_class_name"] == name]

    return Family(
        name,
        KDPM2_ALL if name == KDPM2[0] else [],  # of both
        how="some",
        lengths=(1, 2, 3, 5, 20),
        starts=own(KDPM2_PAIRS[2:4]),
        start_every=2,
        runs=[*((c, 50) for c in own(KDPM2_PAIRS[::3])), (TRAILING, 61), (LEADING_1, 1000)],
        mixed=[V],
        loops=[(SIGMAS[2], first) for first in (0, 2, 8)],
        refused=[no_sample(), *refused],
    )


def sde(**options: Any) -> Config:
    return config("DPMSolverSDEScheduler", **{"noise_sampler_seed": 7, **options})


SDE = [sde(**s, **g, prediction_type=turn(NO_SAMPLE, i)) for i, (s, g) in enumerate(product(SPACINGS, SIGMAS))]
SDE += [sde(**V, noise_sampler_seed=2**40), sde(s_noise=1.003), sde(**COSINE)]
SDE += [sde(trained_betas=BETAS), sde(num_train_timesteps=400), sde(beta_schedule="linear")]
SDE += [{"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": 0}]

# --- in lambda: DPM-Solver, DEIS, UniPC, SA-Solver --------------------------------------------------------------------

# epsilon can't reach sigma 0, and sde-dpmsolver has no order 3
TO_X0: list[Config] = [
    {"algorithm_type": a, "solver_order": n} for a in ("dpmsolver++", "sde-dpmsolver++") for n in (1, 2, 3)
]
TO_EPSILON: list[Config] = [{"algorithm_type": "dpmsolver", "solver_order": n, **TO_MIN} for n in (1, 2, 3)]
SOLVERS: list[Config] = [*TO_X0, *TO_EPSILON]
SOLVERS += [{"algorithm_type": "sde-dpmsolver", "solver_order": n, **TO_MIN} for n in (1, 2)]
LOW: Config = {"lower_order_final": False}
DPM_ENDS: tuple[Config, ...] = (
    {}, LOW, {"euler_at_final": True}, TO_MIN, {**TO_MIN, **LOW}, {**TO_MIN, **LOW, "euler_at_final": True}
)  # fmt: skip


def dpm(**options: Any) -> Config:
    return config("DPMSolverMultistepScheduler", **options)


DPM = [
    dpm(**a, solver_type=k, prediction_type=turn(PREDICTIONS, i), **turn(SPACINGS, i))
    for i, (a, k) in enumerate(product(SOLVERS, KINDS))
]
DPM += [
    dpm(**{**turn(DPM_ENDS, i), **turn(SOLVERS, i)}, **s, prediction_type=p)
    for i, (s, p) in enumerate(product(SIGMAS_AND_LU, PREDICTIONS))
]
DPM += [dpm(**e, solver_order=n) for e, n in product(DPM_ENDS, (2, 3))]
DPM += [dpm(**turn(SOLVERS, i + 4), **s, **CLIPPED) for i, s in enumerate(SPACINGS)]
DPM += [
    dpm(**a, thresholding=True, dynamic_thresholding_ratio=0.9, prediction_type=p)
    for a, p in product((SOLVERS[1], SOLVERS[7]), PREDICTIONS)
]
DPM += [dpm(**turn(SIGMAS_AND_LU, i), **ENDLESS, **s) for i, s in enumerate(SPACINGS)]
DPM += [dpm(**COSINE, **s) for s in SIGMAS_AND_LU[1:]]
DPM += [dpm(lambda_min_clipped=-2.0, **s) for s in SPACINGS]
DPM += [dpm(rescale_betas_zero_snr=True, **s, **V) for s in SPACINGS]
DPM += [dpm(rescale_betas_zero_snr=True, algorithm_type="sde-dpmsolver++", solver_order=3)]
DPM += [dpm(**s, **ENDS) for s in SIGMAS_AND_LU]  # a sibling's options, which it heeds all the same
DPM += [*others("DPMSolverMultistepScheduler"), bare("DPMSolverMultistepScheduler"), dpm(beta_schedule="linear")]
DPM += [dpm(algorithm_type="deis", solver_type="logrho", **TO_MIN), dpm(solver_type="bh2")]
DPM_TIMESTEPS = [
    (o, {"timesteps": t})
    for o, t in product(({}, {**TO_MIN, **LOW}, {"solver_order": 3}), WHOLE)
    if t[-1] or "final_sigmas_type" not in o  # else the last sigma is there twice
]


def single(**options: Any) -> Config:
    return config("DPMSolverSinglestepScheduler", **options)


HIGH: Config = {"lower_order_final": True}
SINGLE = [
    single(**s, solver_type=k, prediction_type=turn(PREDICTIONS, i))
    for i, (s, k) in enumerate(product(SOLVERS[:9], KINDS))
]
SINGLE += [
    single(**{**turn(SOLVERS[:9], i), **e})
    for i, (e, _) in enumerate(product((HIGH, TO_MIN, {**TO_MIN, **HIGH}), SIGMAS[:3]))
]
SINGLE += [
    single(**turn(SOLVERS[:9], 2 * i + 1), **g, prediction_type=p)
    for i, (g, p) in enumerate(product(SIGMAS, PREDICTIONS))
]
SINGLE += [single(**s, **CLIPPED) for s in SOLVERS[:6:2]]
SINGLE += [single(**ENDLESS), single(**COSINE, **SIGMAS[1]), single(lambda_min_clipped=-2.0)]
SINGLE += [single(**g, **ENDS) for g in SIGMAS[1:]]
SINGLE += [*others("DPMSolverSinglestepScheduler"), bare("DPMSolverSinglestepScheduler")]
SINGLE += [single(algorithm_type="deis", solver_type="bh1", **TO_MIN), single(beta_schedule="linear", solver_order=3)]


def dpm_inverse(**options: Any) -> Config:
    return config("DPMSolverMultistepInverseScheduler", **options)


INVERTIBLE: list[Config] = [
    {"algorithm_type": a, "solver_order": n} for a in ("dpmsolver++", "dpmsolver") for n in (1, 2, 3)
]
DPM_INVERSE = [
    dpm_inverse(**turn(SPACINGS[:3], i), **a, solver_type=k, prediction_type=turn(PREDICTIONS, i))
    for i, (a, k) in enumerate(product(INVERTIBLE, KINDS))
]
DPM_INVERSE += [dpm_inverse(**g, prediction_type=p) for g, p in product(SIGMAS[1:], PREDICTIONS)]
DPM_INVERSE += [dpm_inverse(**TRAILING, prediction_type=p) for p in PREDICTIONS]
DPM_INVERSE += [dpm_inverse(**e, solver_order=3) for e in DPM_ENDS[1:3]]
DPM_INVERSE += [dpm_inverse(**a, **CLIPPED) for a in INVERTIBLE[1::3]]
DPM_INVERSE += [dpm_inverse(**ENDLESS, **s) for s in SPACINGS] + [dpm_inverse(**g, **COSINE) for g in SIGMAS]
DPM_INVERSE += [dpm_inverse(**g, **ENDS) for g in SIGMAS]
DPM_INVERSE += [*others("DPMSolverMultistepInverseScheduler"), bare("DPMSolverMultistepInverseScheduler")]


def deis(**options: Any) -> Config:
    return config("DEISMultistepScheduler", **options)


DEIS = [
    deis(**s, prediction_type=p, solver_order=turn((2, 3, 1, 3), i))
    for i, (s, p) in enumerate(product(SPACINGS, PREDICTIONS))
]
DEIS += [
    deis(**g, prediction_type=turn(PREDICTIONS, i), solver_order=n) for i, (g, n) in enumerate(product(SIGMAS, (1, 2)))
]
DEIS += [deis(**g, solver_order=n, **LOW) for g, n in product(SIGMAS, (2, 3))]
DEIS += [deis(**g, solver_order=3) for g in SIGMAS]
DEIS += [deis(**turn(SPACINGS, i), **CLIPPED, prediction_type=p) for i, p in enumerate(PREDICTIONS)]
DEIS += [deis(**g, **COSINE) for g in SIGMAS] + [deis(**g, **ENDS) for g in SIGMAS]
DEIS += [*others("DEISMultistepScheduler"), bare("DEISMultistepScheduler")]
DEIS += [deis(algorithm_type="dpmsolver++", solver_type="midpoint"), deis(beta_schedule="linear", solver_type="bh2")]

# bh1 and epsilon are NaN at sigma 0
UNIPC_SOLVERS: list[Config] = [
    *({"solver_order": n} for n in (1, 2, 3)),
    *({"solver_order": n, "solver_type": "bh1", **TO_MIN} for n in (1, 2, 3)),
    *({"solver_order": n, "predict_x0": False, **TO_MIN} for n in (1, 2, 3)),
    *({"solver_order": n, "solver_type": "bh1", "predict_x0": False, **TO_MIN} for n in (2, 3)),
]


def unipc(**options: Any) -> Config:
    return config("UniPCMultistepScheduler", **options)


UNIPC = [unipc(**s, prediction_type=turn(PREDICTIONS, i), **turn(SPACINGS, i)) for i, s in enumerate(UNIPC_SOLVERS)]
UNIPC += [
    unipc(**turn(UNIPC_SOLVERS, 2 * i), **g, prediction_type=p) for i, (g, p) in enumerate(product(SIGMAS, PREDICTIONS))
]
UNIPC += [unipc(**s, disable_corrector=d) for s, d in product(UNIPC_SOLVERS[1:8:3], ([0], [0, 1, 2], [3, 7]))]
UNIPC += [unipc(**{**s, **TO_MIN}, **LOW) for s in UNIPC_SOLVERS[::2]] + [unipc(**g, **TO_MIN) for g in SIGMAS]
UNIPC += [unipc(**turn(UNIPC_SOLVERS, i), **turn(SPACINGS, i), **CLIPPED) for i in range(4)]
UNIPC += [unipc(**g, **COSINE) for g in SIGMAS] + [unipc(**g, **ENDS) for g in SIGMAS]
UNIPC += [unipc(rescale_betas_zero_snr=True, **s, **V) for s in SPACINGS]
UNIPC += [*others("UniPCMultistepScheduler"), bare("UniPCMultistepScheduler")]
UNIPC += [unipc(solver_type="midpoint", beta_schedule="linear")]
# a last interval without length: order 2 walks it, to no effect; order 3 is NaN there in the reference, and refused
NO_LENGTH: list[Config] = [
    {"solver_type": s, "predict_x0": x, **SIGMAS[1], **LOW, **TO_MIN} for s in ("bh1", "bh2") for x in (True, False)
]

SA_NOISE: Config = {"algorithm_type": "noise_prediction"}
SA_ORDERS: list[Config] = [
    {"predictor_order": p, "corrector_order": c} for p, c in ((2, 2), (1, 1), (3, 3), (4, 4), (1, 3), (3, 1), (2, 4))
]


def sa(**options: Any) -> Config:
    return config("SASolverScheduler", **options)


SA = [sa(**o, prediction_type=turn(PREDICTIONS, i), **turn(SPACINGS, i)) for i, o in enumerate(SA_ORDERS)]
SA += [sa(**o, **SA_NOISE, prediction_type=turn(PREDICTIONS, i)) for i, o in enumerate(SA_ORDERS)]
SA += [sa(**g, prediction_type=p, **turn(SA_ORDERS[:3], i)) for i, (g, p) in enumerate(product(SIGMAS, PREDICTIONS))]
SA += [sa(**turn(SA_ORDERS, i), **LOW, **s) for i, s in enumerate(SPACINGS)]
SA += [sa(**s, **CLIPPED) for s in SPACINGS[:2]]
SA += [sa(**ENDLESS), sa(**COSINE, **SIGMAS[1]), sa(lambda_min_clipped=-2.0), *(sa(**g, **ENDS) for g in SIGMAS[1:])]
SA += [*others("SASolverScheduler"), bare("SASolverScheduler")]

# --- models of their own: consistency models, EDM, iPNDM --------------------------------------------------------------

LCM_LIMITS: tuple[Config, ...] = (
    {},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 2.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"thresholding": True, "clip_sample": True},
)
PLANS: tuple[Config, ...] = (
    {}, {"original_inference_steps": 100}, {"original_inference_steps": 30, "strength": 0.7}, {"strength": 0.5}
)  # fmt: skip
DISTILLED: tuple[Config, ...] = (
    *PLANS,
    LINEAR,
    {"trained_betas": BETAS},
    {"num_train_timesteps": 400},
    {"rescale_betas_zero_snr": True, **V},
    {**TRAILING, "steps_offset": 1, "set_alpha_to_one": False},  # which change nothing
)


def lcm(**options: Any) -> Config:
    return config("LCMScheduler", **options)


def tcd(**options: Any) -> Config:
    return config("TCDScheduler", **options)


LCM = [lcm(**a, prediction_type=p) for a, p in product(LCM_LIMITS, PREDICTIONS)]
LCM += [lcm(**o) for o in (*DISTILLED, {"timestep_scaling": 3.0}, {"timestep_scaling": 0.002})]
LCM += [lcm(rescale_betas_zero_snr=True, clip_sample=True), bare("LCMScheduler")]
TCD = [tcd(eta=e, prediction_type=p) for e, p in product((0.0, 0.3, 0.75, 1.0), PREDICTIONS)]
TCD += [*(tcd(**o) for o in (*DISTILLED, LCM_LIMITS[3])), bare("TCDScheduler")]


def most(c: Config) -> int:
    """The number of timesteps at which the model was distilled, or those that strength leaves."""
    return int(c.get("original_inference_steps", 50) * c.get("strength", 1.0))


def distilled(name: str, configs: list[Config], *refused: Refused) -> Family:
    times = ([999, 759, 499, 259], [999, 500, 3, 2, 0], list(range(960, 0, -15)))
    # cosine betas not in half precision: the last alpha_bar is 2e-9, and x0 infinite
    cosine = [({"beta_schedule": "squaredcos_cap_v2"}, n) for n in (1, 2, 3, 5, 20, 50)]
    first, second = (0, 0) if configs is LCM else (1, 3)
    return Family(
        name,
        configs,
        how="some",
        lengths=lambda c, _: [n for n in (1, 2, 3, 5, 20, 50) if n <= most(c)],
        also_all=configs[second::6],
        starts=[c for c in configs[first::4] if most(c) >= 20 and "strength" not in c],
        runs=[*cosine, *((o, {"timesteps": t}) for o, t in product(({}, {"strength": 0.6}), times))],
        mixed=[V],
        refused=[
            *(  # trap: LCM and TCD raise for n > 50
                Refused(
                    o, steps(n), (ValueError, "smaller than `num_inf"), f"steps={n} is more than the {n - 1} original_s"
                )
                for n, o in ((51, {}), (26, {"strength": 0.5}), (101, {"original_inference_steps": 100}))
            ),
            Refused(
                {"original_inference_steps": 1001},
                steps(5),
                (ValueError, "original_steps"),
                "original_steps=1001 exceeds the 1000 timesteps of training",
            ),
            *(Refused({}, {"timesteps": t}, (ValueError, "timesteps"), "timesteps") for t in ([1000, 5], [5, 9])),
            Refused({"rescale_betas_zero_snr": True}, steps(5), "nan", "zero_snr"),
            *refused,
        ],
    )


def cm(**options: Any) -> Config:
    return {"_class_name": "CMStochasticIterativeScheduler", **options}


CM = [cm(), cm(clip_denoised=False), cm(s_noise=1.003), cm(sigma_data=1.0, rho=3.0), cm(sigma_min=0.01, sigma_max=50.0)]
CM += [cm(num_train_timesteps=201, clip_denoised=False), cm(num_train_timesteps=64, s_noise=0.0)]

EDM_SIGMAS: tuple[Config, ...] = (
    {},
    {"sigma_schedule": "exponential"},
    {"rho": 3.0, "sigma_min": 0.01, "sigma_max": 50.0},
    {"sigma_data": 1.0, "sigma_schedule": "exponential", "sigma_max": 500.0},
)
EDM_KINDS = [{"algorithm_type": a, "solver_type": t} for a in ("dpmsolver++", "sde-dpmsolver++") for t in KINDS]
EDM_SOLVERS: list[Config] = [
    {"solver_order": n, **k} for n in (1, 2, 3) for k in EDM_KINDS if not (n == 3 and "sde" in k["algorithm_type"])
]


def edm_euler(**options: Any) -> Config:
    return {"_class_name": "EDMEulerScheduler", **options}


def edm_multistep(**options: Any) -> Config:
    return {"_class_name": "EDMDPMSolverMultistepScheduler", **options}


EDM_EULER = [
    edm_euler(**s, **c, prediction_type=NO_SAMPLE[(i + j) % 2])
    for (i, s), (j, c) in product(enumerate(EDM_SIGMAS), enumerate(CHURN))
]
EDM_EULER += [edm_euler(**s, **TO_MIN, prediction_type=p) for s, p in zip(EDM_SIGMAS, NO_SAMPLE * 2, strict=True)]
EDM_MULTISTEP = [
    edm_multistep(**o, **e, **EDM_SIGMAS[(i + j) % 4], prediction_type=NO_SAMPLE[(i + j // 2) % 2])
    for (i, o), (j, e) in product(enumerate(EDM_SOLVERS), enumerate(({}, LOW, {"euler_at_final": True, **LOW})))
]
EDM_MULTISTEP += [edm_multistep(**LCM_LIMITS[3], solver_order=n) for n in (1, 2, 3)]
EDM_MULTISTEP += [edm_multistep(algorithm_type="deis", solver_type=t, **TO_MIN) for t in ("logrho", "bh1", "bh2")]
# --- the table --------------------------------------------------------------------------------------------------------

SPACED = [Refused(g, {"timesteps": [900, 3]}, (ValueError, "Cannot"), NO_TIMESTEPS) for g in SIGMAS[1:]]
TWO_SPACINGS = Refused({**SIGMAS[1], **SIGMAS[3]}, steps(3), ValueError, "exclude each other")
NOT_999 = Refused(LEADING_1, steps(999), "nan", FEWER)
NOT_1000 = [Refused(s, steps(1000), None, TWICE) for s in SPACINGS[:2]]
PAST_TABLE = Refused(
    {"steps_offset": 1}, steps(1000), IndexError, "run from 1000 to 1, the model knows 0 to 999; use f"
)

FAMILIES = [
    Family(
        "DDPMScheduler",
        DDPM,
        starts=DDPM[::4],
        runs=[(c, 999) for c in (*DDPM[:2], DDPM[15])]
        + [({}, 1000), *ROWS_TOO_MANY]
        + [
            ({"clip_sample": False}, {"timesteps": t})
            for t in ([999, 700, 333, 20, 0], [500], [981, 980, 3, 1], list(range(999, -1, -37)))
        ],
        mixed=[V],
        refused=[
            PURE_NOISE,
            PAST_TABLE,  # DF #10003: index 1000 does not exist
            Refused({"variance_type": "fixed_large_log"}, steps(5), "nan", "use fixed_large"),
        ],
    ),
    Family(
        "DDIMScheduler",
        DDIM,
        starts=DDIM[::4],
        runs=[(c, 999) for c in (*DDIM[2:4], *DDIM[50:56:2])] + [({}, 1000), *ROWS_TOO_MANY],
        mixed=[V],
        refused=[PURE_NOISE, PAST_TABLE],
    ),
    Family(
        "DDIMInverseScheduler",
        DDIM_INVERSE,
        lengths=(1, 2, 3, 5, 20, 50),
        starts=DDIM_INVERSE[::3],
        runs=[({}, 1000), (TRAILING, 61)],
        refused=[
            Refused({"steps_offset": 1}, steps(1000), IndexError, "the model knows 0 to 999"),
            Refused(
                {"prediction_type": "sample", "clip_sample": False}, steps(5), "nan", "without noise has no epsilon"
            ),
            Refused(
                {"timestep_spacing": "linspace"},
                steps(5),
                (ValueError, "not supported"),
                "there is no timestep_spacing='linspace'",
            ),
        ],
    ),
    Family(
        "PNDMScheduler",
        PNDM,
        lengths=lambda c, _: (1, 2, 3, 5, 20, 50) if c["skip_prk_steps"] else (4, 5, 7, 20, 30, 50),
        starts=PNDM,
        runs=[*PNDM_LONG, *(({**TRAILING, "skip_prk_steps": skip}, 61) for skip in (True, False))],
        refused=[
            *(
                Refused({}, steps(n), (ValueError, "broadcast"), f"steps={n}: .*Runge-Kutta warm-up needs at least 4")
                for n in (1, 2, 3)
            ),
            Refused({"steps_offset": 1, "skip_prk_steps": True}, steps(1000), IndexError, "run from 1000 to 1"),
            Refused(
                {"prediction_type": "sample"},
                steps(5),
                (ValueError, "prediction_type"),
                "prediction_type='sample' is none of epsilon, v_prediction",
            ),
        ],
    ),
    Family("IPNDMScheduler", [bare("IPNDMScheduler")], lengths=(1, 2, 3, 4, 5, 20, 50), starts=[bare("IPNDMScheduler")],
        runs=[({}, n) for n in (50, 999, 1000)], mixed=[{}], loops=[({}, 0)]),
    Family(
        "EulerDiscreteScheduler",
        EULER,
        starts=EULER[::3],
        runs=[(c, 999) for c in (*EULER[:12:2], *EULER[48:60:5])]
        + [(LEADING_1, 1000), (TRAILING, 61), *EULER_TIMESTEPS, *EULER_SIGMAS],
        mixed=[V],
        refused=[
            *(
                Refused({}, given, (ValueError, "[Oo]ne of"), "exactly one of")
                for given in ({**steps(5), "timesteps": [5, 1]}, {"timesteps": [5, 1], "sigmas": [5.0, 1.0]}, {})
            ),
            *SPACED,
        ],
    ),
    Family(
        "EulerAncestralDiscreteScheduler",
        ANCESTRAL,
        starts=ANCESTRAL,
        runs=[*((c, 999) for c in ANCESTRAL[:8:3]), (LEADING_1, 1000), (TRAILING, 61)],
        mixed=[V],
        refused=[no_sample()],
    ),
    Family(
        "HeunDiscreteScheduler",
        HEUN,
        how="some",
        lengths=lambda _, turn: (1, 2, 3, 5, 20, 50) if turn % 3 == 0 else (1, 2, 3, 5, 20),
        also_all=HEUN[::9],
        starts=HEUN[::5],  # also from the odd rows, where the reference goes nowhere
        runs=[({}, 999), (TRAILING, 61), (LEADING_1, 1000)]
        + [(o, {"timesteps": t}) for o, t in product(({}, SPACINGS[1], HEUN_CLIPS[1]), GIVEN)],
        mixed=[V],
        loops=[(SIGMAS[1], first) for first in (0, 2, 8)],
        refused=[*SPACED, TWO_SPACINGS],
    ),
    kdpm2(KDPM2[0]),
    kdpm2(
        KDPM2[1],  # sigma_up rounds to the next sigma itself, so that sigma_down is 0 and its logarithm infinite
        *(
            Refused(c, steps(2), "nan", r"sigma_down rounds to 0 in interval \[0\], .* use more steps")
            for c in KDPM2_OTHERS[4:7]
        ),
    ),
    Family(
        "LMSDiscreteScheduler",
        LMS,
        how="some",
        lengths=(1, 2, 3, 5, 20),
        also_all=LMS[::9],
        starts=LMS[2::14],
        runs=[*fifty(LMS[::6]), (TRAILING, 61)],
        mixed=[V],
        refused=[
            Refused({"order": 0}, steps(3), None, "solver_order=0 must lie"),
            # 1000 steps with offset 1 visit timesteps 1000 and 999, whose sigmas are the same: its weights divide by 0
            Refused(LEADING_1, steps(1000), "nan", rf"LMS: no finite coefficients at rows \[1.*{FEWER}"),
        ],
    ),
    Family(
        "DPMSolverSDEScheduler",
        SDE,
        how="some",
        lengths=(1, 2, 3, 6),
        starts=[sde(timestep_spacing="leading")],
        start_steps=12,
        start_every=2,
        runs=[({"noise_sampler_seed": 7, **SPACINGS[0], "prediction_type": "epsilon"}, n) for n in (20, 50)],
        refused=[
            no_sample(),
            Refused(
                {**LEADING_1, "noise_sampler_seed": 3},
                steps(1000),
                "nan",
                r"DPMSDE: no finite coefficients at rows \[0, 1\] of 1999",
            ),
        ],
    ),
    Family(
        "DPMSolverMultistepScheduler",
        DPM,
        how="wide",
        lengths=(1, 2, 3, 5, 20),
        starts=DPM[::10],
        runs=[
            *fifty(DPM[::3]),
            *(({}, 999), ({"solver_order": 3, **TRAILING}, 999), (SIGMAS[1], 999)),
            *((TRAILING, 61), ({**TRAILING, **TO_MIN}, 61)),
            *DPM_TIMESTEPS,
        ],
        mixed=[
            {"algorithm_type": a, "solver_order": 3, "prediction_type": p}
            for a, p in product(("dpmsolver++", "sde-dpmsolver++"), PREDICTIONS)
        ],
        refused=[
            *NOT_1000,
            NOT_999,
            Refused({**TRAILING, "solver_order": 3, **TO_MIN}, steps(61), "nan", "order 3 at rows"),
            Refused({"algorithm_type": "dpmsolver"}, steps(5), ValueError, "needs final_sigma='sigma_min'"),
            Refused({"algorithm_type": "deis"}, steps(5), ValueError, "needs final_sigmas_type='sigma_min'"),
            Refused({"algorithm_type": "odd"}, steps(5), NotImplementedError, "algorithm='odd' is none of"),
            Refused(SOLVERS[-1] | {"solver_order": 3}, steps(20), UnboundLocalError, "has no order 3"),
            TWO_SPACINGS,
            *(Refused(g, {"timesteps": [900, 3]}, (ValueError, "Cannot"), NO_TIMESTEPS) for g in SIGMAS_AND_LU[1:]),
        ],
    ),
    Family(
        "DPMSolverSinglestepScheduler",
        SINGLE,
        how="wide",
        lengths=(1, 2, 3, 4, 5, 6, 20),
        starts=SINGLE[::6],
        runs=[
            *fifty(SINGLE[::2]),
            *((o, {"timesteps": t}) for o, t in product(({}, {"solver_order": 3}), WHOLE)),
        ],
        mixed=[
            {"solver_order": n, "prediction_type": p} for p, n in zip(PREDICTIONS, (3, 2, 3), strict=True)
        ],
        refused=[
            NOT_1000[0],
            Refused(
                {"algorithm_type": "dpmsolver", "thresholding": True, **TO_MIN},
                steps(5),
                RuntimeError,
                "thresholding raises with algorithm_type='dpmsolver'",
            ),
            Refused({"algorithm_type": "sde-dpmsolver", **TO_MIN}, steps(5), NotImplementedError, "sde-dpmsolver"),
            Refused({"algorithm_type": "dpmsolver"}, steps(5), ValueError, "needs final_sigma='sigma_min'"),
        ],
    ),
    Family(
        "DPMSolverMultistepInverseScheduler",
        DPM_INVERSE,
        how="wide",
        lengths=(1, 2, 3, 5, 20),
        starts=DPM_INVERSE[:12:3],
        runs=[*fifty(DPM_INVERSE[:16:2]), (SIGMAS[1], 50)],
        refused=[
            # trailing rows end at the top, where the last step is to land: h is 0, and heun divides by it
            Refused({**TRAILING, "solver_type": "heun"}, steps(20), "nan", "no finite coefficients of order 2"),
            NOT_1000[0],
            *(
                Refused({"algorithm_type": a}, steps(5), "nan", "it can't be inverted")
                for a in ("sde-dpmsolver++", "sde-dpmsolver")
            ),
        ],
    ),
    Family(
        "DEISMultistepScheduler",
        DEIS,
        how="wide",
        lengths=(1, 2, 3, 5, 20),
        starts=DEIS[::6],
        runs=[*fifty(DEIS[::2]), ({}, 999), (TRAILING, 61)],
        mixed=[{"solver_order": 3, "prediction_type": p} for p in PREDICTIONS],
        refused=[
            NOT_999,
            *NOT_1000,
            Refused({"algorithm_type": "sde-dpmsolver++"}, steps(5), NotImplementedError, "is none of"),
            Refused({"solver_type": "odd"}, steps(5), NotImplementedError, "is none of"),
        ],
    ),
    Family(
        "UniPCMultistepScheduler",
        UNIPC,
        how="wide",
        lengths=(1, 2, 3, 5, 20),
        starts=UNIPC[::7],
        runs=[*fifty(UNIPC[::2]), ({"solver_order": 3}, 999), (TRAILING, 61)]
        + [({"solver_order": 2, **o}, n) for o in NO_LENGTH for n in (2, 3, 20)],
        mixed=[{"prediction_type": p, **s} for p, s in product(PREDICTIONS, UNIPC_SOLVERS)],
        dtypes=list(permutations(DTYPES, 2)),
        refused=[
            *(Refused({"solver_order": 3, **o}, steps(3), None, "coefficients of order 3") for o in NO_LENGTH),
            NOT_999,
            Refused({"solver_type": "bh1"}, steps(5), "nan", "solver_type='bh1' is NaN on the last step to sigma 0"),
            Refused({"predict_x0": False}, steps(5), "nan", "no finite coefficients of order 1 at rows"),
            Refused(LOW, steps(5), "nan", "no finite coefficients of order 2 at rows"),
            *NOT_1000,
            Refused({"solver_type": "odd"}, steps(5), NotImplementedError, "solver_type='odd' is none of"),
            Refused({"shift_terminal": 0.1}, steps(5), ValueError, "shift_terminal belongs to flow matching"),
            TWO_SPACINGS,
            Refused({"solver_p": bare("DDIMScheduler")}, steps(5), None, "solver_p is not supported"),
        ],
    ),
    Family(
        "SASolverScheduler",
        SA,
        how="wide",
        lengths=(1, 2, 3, 5, 20),
        starts=SA[::8],
        runs=[*fifty(SA[::3]), ({}, 999), (TRAILING, 61)],
        mixed=[{"prediction_type": p} for p in NO_SAMPLE],
        dtypes=((F32, F16), (F32, BF16)),
        refused=[
            NOT_1000[0],
            NOT_999,
            Refused(
                {**SA_NOISE, "thresholding": True}, steps(5), RuntimeError, "thresholding raises with noise_prediction"
            ),
            Refused({"variance_type": "learned"}, steps(5), RuntimeError, "a learned variance raises"),
            Refused({"algorithm_type": "odd"}, steps(5), NotImplementedError, "algorithm='odd' is none of"),
            Refused({"tau_func": lambda t: 1}, steps(5), None, "a tau_func can't be read from a config"),
        ],
    ),
    distilled("LCMScheduler", LCM),
    distilled("TCDScheduler", TCD, Refused({"eta": 1.5}, steps(5), AssertionError, r"eta=1.5 must lie in 0\.\.1")),
    Family(
        "CMStochasticIterativeScheduler",
        CM,
        lengths=lambda c, _: (1, 2, 3, 5, 20, 40, 50)[: 7 if c.get("num_train_timesteps", 40) >= 50 else 6],
        starts=CM,
        runs=[({}, {"timesteps": t}) for t in ([22, 0], [39], [38, 20, 7, 3], [0], list(range(39, -1, -1)))],
        mixed=[{}],
        loops=[({}, 0)],
        refused=[
            # trap: CM raises for n > 40
            Refused({}, steps(41), (ValueError, "cannot be larger"), r"steps=41 must lie in 1\.\.40"),
            *(Refused({}, {"timesteps": t}, (ValueError, "timesteps"), "timesteps") for t in ([40, 3], [3, 5])),
        ],
    ),
    Family(
        "EDMEulerScheduler",
        EDM_EULER,
        how="some",
        lengths=(1, 2, 3, 5, 20, 50),
        also_all=EDM_EULER[::8],
        starts=EDM_EULER[::5],
        runs=[({}, 999)]
        + [  # given sigmas are places between the largest and the smallest in the reference
            (o, {"sigmas": torch.tensor(places, dtype=torch.float64)})
            for o, places in product(({}, EDM_SIGMAS[1], TO_MIN), ([0.0, 0.25, 0.5, 1.0], [0.1, 0.11, 0.9]))
        ],
        mixed=[{}],
        loops=[({}, 0)],
        refused=[no_sample(None), Refused({"sigma_min": 90.0}, steps(3), None, "must rise from above 0")],
    ),
    Family(
        "EDMDPMSolverMultistepScheduler",
        EDM_MULTISTEP,
        how="some",
        lengths=(1, 2, 3, 5, 20, 50),
        first_turn=len(EDM_EULER),
        also_all=EDM_MULTISTEP[4::8],
        starts=EDM_MULTISTEP[::5],
        runs=[({}, 999)],
        mixed=[{}],
        loops=[({}, 0)],
        refused=[
            no_sample(None),
            Refused(
                {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
                steps(20),
                UnboundLocalError,
                "solver_order=3 does not go with sde",
            ),
            Refused({"algorithm_type": "deis"}, steps(5), (ValueError, "not supported"), "needs final_sigmas_type"),
            Refused({"solver_type": "rk"}, steps(5), None, "solver_type='rk' is none of"),
        ],
    ),
]  # fmt: skip
