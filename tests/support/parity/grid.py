"""The grid of every sampler with every option, and the comparison of one of its points with diffusers.

``GRID`` lists for each scheduler class the configs to try: products of the axes in ``axes.py``, and of the class's own.
Each config runs with every number of steps, or every list of timesteps or sigmas, in every dtype. ``outcomes`` tries
them and says what came of each. ``scripts/parity_grid.py`` goes through all of it, ``test_grid.py`` through a sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import MinidiffError
from tests.support.parity.axes import (
    CHURN,
    COSINE,
    ENDS,
    PREDICTIONS,
    SCHEDULES,
    SIGMAS,
    SIGMAS_AND_LU,
    SPACINGS,
    SPACINGS_FROM_LEADING,
    TO_MIN,
    ZERO_SNR,
    Config,
)
from tests.support.parity.sampler_twins import DTYPES, compare, config, label, reference, walk_reference

SHAPE = (2, 3, 5, 7)
STEPS = (1, 2, 3, 5, 20, 50)

EQUAL = "equal"
NEAR = "equal but for float64 timesteps from scipy"  # the beta timesteps of KDPM2, held to QUANTILES
OVERFLOW = "beyond the range of float16 in both alike"
BOTH = "refused by both"
OURS = "refused by minidiff alone"
DIFFERENT = "different"

# where minidiff refuses what the reference runs: a part of the message, and what the reference does there
ALONE = {
    "trained_betas are the noise of every row": "makes as many steps as there are betas, whatever it was asked for",
    "fixed_large_log": "gives NaN with the first noise, which a run of one step to timestep 0 does not draw",
    "does not go with sde": "raises at the first step of order 3, which a run of one or two steps does not reach",
    "leaves none of": "makes no step at all",
    "the model knows": "takes a timestep that training did not have for the last one",
}


def times(*axes: Sequence[Config]) -> list[Config]:
    """Every way to take one entry of each axis, merged: later ones win."""
    return [{k: v for part in parts for k, v in part.items()} for parts in product(*axes)]


def each(name: str, *values: Any) -> list[Config]:
    """An axis of one option."""
    return [{name: value} for value in values]


# --- axes of single families -----------------------------------------------------------------------------------------

PRED = each("prediction_type", *PREDICTIONS)
SWITCH = (False, True)
VARIANCES = each(
    "variance_type", "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
)
LIMITS: list[Config] = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 2.5},
    {"clip_sample": True, "thresholding": True},
    {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
]
THRESHOLDS: list[Config] = [
    {"thresholding": True, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
]
FINAL = each("final_sigmas_type", "zero", "sigma_min")
KINDS = each("solver_type", "midpoint", "heun")
ALL_SCHEDULES: list[Config] = [{}, *SCHEDULES]
TO_LAMBDA: list[Config] = [{**COSINE, "lambda_min_clipped": -5.1}, {"lambda_min_clipped": -2.0}]
# what each algorithm of DPM-Solver can do: epsilon can't reach sigma 0, and sde-dpmsolver has no order 3
ORDERS = each("solver_order", 1, 2, 3)
TO_X0 = times(each("algorithm_type", "dpmsolver++", "sde-dpmsolver++"), ORDERS)
TO_EPSILON = times(each("algorithm_type", "dpmsolver"), [TO_MIN], ORDERS)
SDE_TO_EPSILON = times(each("algorithm_type", "sde-dpmsolver"), [TO_MIN], ORDERS[:2])
DPM = [*TO_X0, *TO_EPSILON, *SDE_TO_EPSILON]
SINGLE = [*TO_X0, *TO_EPSILON]
DPM_ENDS: list[Config] = times(FINAL, each("lower_order_final", True, False), each("euler_at_final", *SWITCH))
UNIPC = [
    *ORDERS,
    *times(each("solver_type", "bh1"), [TO_MIN], ORDERS),
    *times(each("predict_x0", False), [TO_MIN], each("solver_type", "bh1", "bh2"), ORDERS),
]
SA_ORDERS: list[Config] = [
    {"predictor_order": p, "corrector_order": c} for p, c in ((2, 2), (1, 1), (3, 3), (4, 4), (1, 3), (3, 1), (2, 4))
]
EDM: list[Config] = [
    {},
    {"sigma_schedule": "exponential"},
    {"rho": 3.0, "sigma_min": 0.01, "sigma_max": 50.0},
    {"sigma_data": 1.0, "sigma_schedule": "exponential", "sigma_max": 500.0},
]
EDM_SOLVERS = times(each("algorithm_type", "dpmsolver++", "sde-dpmsolver++"), KINDS, ORDERS)
DISTILLED: list[Config] = [
    {},
    {"original_inference_steps": 100},
    {"original_inference_steps": 30, "strength": 0.7},
    {"strength": 0.5},
]
CORRECTED = each("disable_corrector", [0], [0, 1, 2], [3, 7])

GRID: dict[str, list[Config]] = {
    "DDPMScheduler": [
        *times(SPACINGS_FROM_LEADING, LIMITS, PRED),
        *times(VARIANCES, LIMITS, PRED),
        *times([*SCHEDULES, *each("beta_schedule", "sigmoid", "laplace")], PRED),
        *times([ZERO_SNR], SPACINGS_FROM_LEADING, LIMITS[:2], PRED),
    ],
    "DDIMScheduler": [
        *times(LIMITS, PRED, each("eta", 0.0, 0.7), each("use_clipped_model_output", *SWITCH)),
        *times(SPACINGS_FROM_LEADING, LIMITS[:1], PRED, each("eta", 0.0, 0.3, 1.0), each("set_alpha_to_one", *SWITCH)),
        *times(SCHEDULES, PRED, each("eta", 0.0, 0.7)),
        *times([ZERO_SNR], SPACINGS_FROM_LEADING, LIMITS[:2], PRED, each("eta", 0.0, 1.0)),
    ],
    "DDIMInverseScheduler": [
        *times(
            SPACINGS_FROM_LEADING,
            [*LIMITS[:2], {}],
            PRED,
            each("set_alpha_to_one", *SWITCH),
        ),
        *times(SCHEDULES, SPACINGS_FROM_LEADING[:3], PRED, LIMITS[:1]),
        *times([ZERO_SNR], SPACINGS_FROM_LEADING[:3], PRED, LIMITS[:2]),
    ],
    "PNDMScheduler": [
        *times(each("skip_prk_steps", *SWITCH), SPACINGS_FROM_LEADING, each("set_alpha_to_one", *SWITCH), PRED),
        *times(each("skip_prk_steps", *SWITCH), SCHEDULES, PRED[:2]),
    ],
    "EulerDiscreteScheduler": [
        *times(SPACINGS, SIGMAS, PRED, FINAL),
        *times(SIGMAS, PRED, CHURN[1:], FINAL),
        *times(
            SIGMAS,
            each("interpolation_type", "linear", "log_linear"),
            each("timestep_type", "discrete", "continuous"),
            PRED[:2],
        ),
        *times(SIGMAS, [ENDS], FINAL),
        *times([ZERO_SNR], SPACINGS, SIGMAS, PRED[1:2]),
        *times(SCHEDULES, SIGMAS),
    ],
    "EulerAncestralDiscreteScheduler": times(SPACINGS, PRED, ALL_SCHEDULES, [{}, ZERO_SNR]),
    "HeunDiscreteScheduler": [
        *times(SPACINGS, SIGMAS, PRED, [{}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 2.5}]),
        *times([*SCHEDULES, {"beta_schedule": "exp"}], SIGMAS),
    ],
    "LMSDiscreteScheduler": [
        *times(SPACINGS, SIGMAS, PRED),
        *times(each("order", 1, 2, 3, 8), SIGMAS),
        *times(SCHEDULES, SIGMAS[:2]),
    ],
    "KDPM2DiscreteScheduler": [*times(SPACINGS, SIGMAS, PRED), *times(SCHEDULES, SIGMAS)],
    "KDPM2AncestralDiscreteScheduler": [*times(SPACINGS, SIGMAS, PRED), *times(SCHEDULES, SIGMAS)],
    "DPMSolverMultistepScheduler": [
        *times(DPM, KINDS, PRED),
        *times(DPM, SPACINGS, PRED),
        *times(DPM, SIGMAS_AND_LU),
        *times(DPM, KINDS, DPM_ENDS),
        *times(DPM, PRED, THRESHOLDS[1:]),
        *times(TO_LAMBDA, SPACINGS, SIGMAS_AND_LU[:2]),
        *times(SCHEDULES, SIGMAS_AND_LU),
        *times([ZERO_SNR], SPACINGS, SIGMAS_AND_LU, PRED[1:2]),
        *times([ENDS], SIGMAS_AND_LU, FINAL),
        *times(DPM, each("variance_type", "learned", "learned_range")),
    ],
    "DPMSolverSinglestepScheduler": [
        *times(SINGLE, KINDS, PRED),
        *times(SINGLE, SIGMAS),
        *times(SINGLE, KINDS, FINAL, each("lower_order_final", *SWITCH)),
        *times(SINGLE, PRED, THRESHOLDS[1:]),
        *times(TO_LAMBDA, SIGMAS[:2], ORDERS),
        *times(SCHEDULES, SIGMAS),
        *times([ENDS], SIGMAS, FINAL),
        *times(SINGLE, each("variance_type", "learned_range")),
    ],
    "DPMSolverMultistepInverseScheduler": [
        *times(each("algorithm_type", "dpmsolver++", "dpmsolver"), ORDERS, KINDS, PRED),
        *times(ORDERS, SPACINGS, SIGMAS),
        *times(ORDERS, each("lower_order_final", *SWITCH), each("euler_at_final", *SWITCH)),
        *times(each("algorithm_type", "dpmsolver++", "dpmsolver"), PRED, THRESHOLDS),
        *times(TO_LAMBDA, SPACINGS),
        *times(SCHEDULES, SIGMAS),
        *times([ENDS], SIGMAS),
        *times(each("algorithm_type", "sde-dpmsolver++", "sde-dpmsolver")),
        *times(each("variance_type", "learned", "learned_range"), each("algorithm_type", "dpmsolver++", "dpmsolver")),
    ],
    "DEISMultistepScheduler": [
        *times(ORDERS, PRED, SPACINGS),
        *times(ORDERS, SIGMAS, each("lower_order_final", *SWITCH)),
        *times(ORDERS, PRED, THRESHOLDS[1:]),
        *times(SCHEDULES, SIGMAS),
        *times([ENDS], SIGMAS),
        *times(each("algorithm_type", "dpmsolver", "dpmsolver++"), each("solver_type", "midpoint", "heun", "bh2")),
    ],
    "UniPCMultistepScheduler": [
        *times(UNIPC, PRED, SPACINGS),
        *times(UNIPC, SIGMAS),
        *times(UNIPC, CORRECTED),
        *times(UNIPC, [TO_MIN], each("lower_order_final", False), SIGMAS[:2]),
        *times(UNIPC, PRED, THRESHOLDS[1:]),
        *times([ZERO_SNR], SPACINGS, ORDERS, PRED[1:2]),
        *times(SCHEDULES, SIGMAS),
        *times([ENDS], SIGMAS, FINAL),
    ],
    "SASolverScheduler": [
        *times(SA_ORDERS, each("algorithm_type", "data_prediction", "noise_prediction"), PRED),
        *times(SA_ORDERS[:3], SPACINGS, SIGMAS),
        *times(SA_ORDERS, each("lower_order_final", False)),
        *times(PRED, THRESHOLDS),
        *times(TO_LAMBDA, SPACINGS),
        *times(SCHEDULES, SIGMAS),
        *times([ENDS], SIGMAS),
        *each("variance_type", "learned_range"),
    ],
    "DPMSolverSDEScheduler": [
        *times(each("noise_sampler_seed", 7), SPACINGS, SIGMAS),
        *times(each("noise_sampler_seed", 7), PRED[1:]),
        *times(each("noise_sampler_seed", 0, 2**40), each("s_noise", 0.0, 1.003), PRED[:2]),
        *times(each("noise_sampler_seed", 7), SCHEDULES, SIGMAS[:2]),
    ],
    "EDMEulerScheduler": times(EDM, CHURN, PRED, FINAL),
    "EDMDPMSolverMultistepScheduler": [
        *times(
            EDM_SOLVERS, EDM, each("lower_order_final", True, False), each("euler_at_final", *SWITCH)
        ),
        *times(EDM_SOLVERS, PRED[1:]),
        *times(EDM_SOLVERS, EDM, [TO_MIN]),
        *times(ORDERS, THRESHOLDS, PRED),
    ],
    "CMStochasticIterativeScheduler": times(
        each("clip_denoised", *SWITCH),
        each("s_noise", 0.0, 1.0, 1.003),
        [{}, {"sigma_data": 1.0}, {"rho": 3.0}],
        [{}, {"sigma_min": 0.01, "sigma_max": 50.0}],
        each("num_train_timesteps", 40, 201),
    ),
    "IPNDMScheduler": [{}, {"trained_betas": [0.9, 0.5, 0.1]}],
    "LCMScheduler": [
        *times([{}, *LIMITS], PRED, DISTILLED, each("timestep_scaling", 10.0, 0.002)),
        *times(SCHEDULES, PRED),
        *times([ZERO_SNR], PRED, LIMITS[:2]),
    ],
    "TCDScheduler": [
        *times(each("eta", 0.0, 0.3, 0.75, 1.0), PRED, DISTILLED),
        *times(each("eta", 0.0, 0.3, 0.75), SCHEDULES, PRED),
        *times([ZERO_SNR], PRED),
        *times(LIMITS),
    ],
}  # fmt: skip
OWN_BETAS = ("EDM", "CM", "IPNDM")  # these know no betas, and refuse Stable Diffusion's

# lists of one's own, unevenly spaced
LENGTHS = (1, 3, 20)
FALLING = tuple([int(999 * (1 - k / n) ** 1.5) for k in range(n)] for n in LENGTHS)
GIVEN: dict[str, list[dict[str, Any]]] = {
    name: [{"timesteps": t} for t in FALLING]
    for name in (
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "LCMScheduler",
        "TCDScheduler",
    )
}
GIVEN["EulerDiscreteScheduler"] += [{"sigmas": [*(14.0 * (1 - k / n) ** 2 for k in range(n)), 0.0]} for n in LENGTHS]
GIVEN["CMStochasticIterativeScheduler"] = [{"timesteps": [round(39 * (1 - k / n)) for k in range(n)]} for n in LENGTHS]
# in the reference these are places between the largest sigma (0) and the smallest (1)
GIVEN["EDMEulerScheduler"] = [{"sigmas": torch.linspace(0, 1, n, dtype=torch.float64) ** 1.5} for n in (2, 5, 20)]


# --- one point of it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of one combination: ``status`` is one of the words above; ``key`` is the same for two combinations of
    one scheduler class, number of steps and dtype that show the user equal bits from the first timestep to the last
    sample; ``note`` says what was refused, or where they differ."""

    name: str
    status: str
    key: str
    note: str = ""


def configs(name: str) -> list[Config]:
    """The configs of one scheduler class, each once."""
    found: list[Config] = []
    for options in GRID[name]:
        c = {"_class_name": name, **options} if name.startswith(OWN_BETAS) else config(name, **options)
        if c not in found:
            found.append(c)
    return found


def givens(name: str) -> list[dict[str, Any]]:
    """What a run of the class is planned from: numbers of steps, then lists of timesteps or sigmas."""
    return [*({"num_inference_steps": n} for n in STEPS), *GIVEN.get(name, ())]


def outcomes(c: Config, runs: Sequence[dict[str, Any]], dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Outcome]:
    """Try config ``c`` with every one of ``runs`` in every dtype."""
    try:
        twin = reference(c)
    except Exception:  # whatever it raises: minidiff is to refuse it as well
        twin = None
    for given in runs:
        fails = None
        for dtype in dtypes:
            try:
                yield _tried(c, given, dtype, twin)
            except MinidiffError as error:
                fails = _reference_fails(c, given) if fails is None else fails
                reason = re.sub(r"\d[\d.e+-]*", "N", str(error)).split(";")[0].split(", got")[0]
                yield Outcome(c["_class_name"], BOTH if fails else OURS, "", reason[:110])


def _tried(c: Config, given: dict[str, Any], dtype: torch.dtype, twin: Any) -> Outcome:
    name, args = c["_class_name"], dict(given)
    steps = args.pop("num_inference_steps", None)
    try:
        shown = compare(c, steps, dtype, twin=twin, shape=SHAPE, overflows=dtype == torch.float16, **args)
    except MinidiffError:
        raise
    except Exception as error:  # an AssertionError, or one of the reference where minidiff runs
        what = [f"{k}={v if isinstance(v, int) else len(v)}" for k, v in given.items()]
        return Outcome(name, DIFFERENT, "", f"{label(c)} {' '.join(what)} {dtype}: {type(error).__name__}: {error}")
    finite = all(bool(v.isfinite().all()) for v in shown)
    if not finite:
        found = OVERFLOW if dtype == torch.float16 else DIFFERENT
        return Outcome(name, found, "", f"{label(c)} {given}: not finite in {dtype}")
    near = c.get("use_beta_sigmas") and shown[0].dtype == torch.float64
    return Outcome(name, NEAR if near else EQUAL, _key(name, dtype, shown))


def _key(name: str, dtype: torch.dtype, shown: list[Tensor]) -> str:
    digest = sha256(f"{name} {dtype} {len(shown[0])}".encode())
    for v in shown:
        digest.update(str(v.dtype).encode() + v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _reference_fails(c: Config, given: dict[str, Any]) -> bool:
    """True if the reference alone raises, or gives numbers that are not finite."""
    try:
        return not walk_reference(c, given, shape=SHAPE)
    except Exception:  # whatever it raises
        return True
