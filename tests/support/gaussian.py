"""Gaussian data, for which the exact solution is known, and the error of a sampler on it, without random numbers.

For data N(MEAN, SPREAD**2) the sample at (signal, noise) is N(signal * MEAN, (signal * SPREAD)**2 + noise**2), the
model's x0 is a linear function of x, and the probability-flow equation keeps every sample at its own quantile: the
exact path is known in closed form. Every sampler's step is then a linear function of the first sample and of the
noises it draws. So one run on a batch of unit vectors (all zero; first sample 1; first noise 1; second noise 1; ...)
gives its coefficients, and with them the exact mean and deviation of what it produces: no Monte Carlo, and an error
that falls to rounding. ``scripts/order_of_accuracy.py`` prints and plots it, ``test_order_of_accuracy.py`` asserts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from minidiff.config import ScheduleConfig
from minidiff.samplers import SAMPLERS
from minidiff.samplers.arithmetic import rates
from minidiff.schedule import NoiseSchedule

MEAN, SPREAD = 0.7, 0.8
HIGH, LOW = 10.0, 0.1  # between these sigmas the order is measured
TRAIN_STEPS = 16384  # fine enough for timesteps that are whole numbers


FINER = 1000 / TRAIN_STEPS
SCHEDULE = NoiseSchedule.from_config(  # Stable Diffusion's curve of alpha_bar, cut finer
    ScheduleConfig(steps=TRAIN_STEPS, beta_start=0.00085 * FINER, beta_end=0.012 * FINER)
)


def x0_of(x: Tensor, signal: float, noise: float, spread: float) -> Tensor:
    """The perfect model: the mean of the data, given ``x``."""
    return MEAN + signal * spread**2 / (signal**2 * spread**2 + noise**2) * (x - signal * MEAN)


def moments(signal: float, noise: float, spread: float) -> tuple[float, float]:
    """Mean and deviation of x."""
    return signal * MEAN, math.hypot(signal * spread, noise)


@dataclass(frozen=True)
class Result:
    """``mean`` and ``deviation``: by how much those of the last sample miss the exact ones, in units of the exact
    deviation; ``noises``: how many numbers were drawn for one sample."""

    mean: float
    deviation: float
    noises: int

    @property
    def error(self) -> float:
        return max(self.mean, self.deviation)


@dataclass(frozen=True)
class Run:
    """How the order of one method is measured: sampler ``name`` with ``options``, with ``steps`` intervals each time.

    ``levels``: "sigmas" gives it n + 1 of ours, even in log sigma from HIGH to LOW, and one more to end on; "timesteps"
    and "own" leave them to the method, which then starts at the top and is stopped a quarter of the way before the end;
    "edm" and "rising" set its own sigmas from HIGH to LOW, or up. ``warm``: rows that start from the exact solution,
    for methods that lack history there: their first steps, of lower order, would be all that one sees; ``warm_share``:
    the same as a part of all rows. ``order``: what theory says, for the mean and deviation where noise is drawn.
    """

    name: str
    order: float
    options: dict[str, Any] = field(default_factory=dict)
    levels: Literal["sigmas", "timesteps", "own", "edm", "rising"] = "sigmas"
    warm: int = 0
    warm_share: float = 0.0
    steps: tuple[int, ...] = (16, 32, 64)
    spread: float = SPREAD

    @property
    def label(self) -> str:
        hidden = ("final_sigma", "lower_order_final", "disable_corrector", *IN_RANGE)
        shown = [f"{k}={v}" for k, v in self.options.items() if k not in hidden]
        corrector = ["no corrector"] if "disable_corrector" in self.options else []
        return " ".join([self.name, *shown, *corrector, *(["exact start"] if self.warm or self.warm_share else [])])

    def sampler(self) -> Any:
        return SAMPLERS[self.name](**self.options)


IN_RANGE = {"sigma_spacing": "exponential", "sigma_min": LOW, "sigma_max": HIGH}


def plan_of(run: Run, n: int) -> tuple[Any, int]:
    """The plan with ``n`` intervals, and how many of its rows are walked: up to where the error is measured."""
    sampler = run.sampler()
    if run.levels == "edm":
        return sampler.plan(None, n + 1), n
    if run.levels == "rising":
        return sampler.plan(SCHEDULE, n), n
    if run.levels == "own":
        return sampler.plan(None, n), n * 3 // 4
    if run.levels == "timesteps":
        plan = sampler.plan(SCHEDULE, n)
        wanted = TRAIN_STEPS // 4 - 1
        return plan, max(i for i, t in enumerate(plan.timesteps.tolist()) if t == wanted)
    sigmas = [HIGH * (LOW / HIGH) ** (k / n) for k in range(n + 1)]
    reaches_zero = run.options.get("final_sigma", "zero") == "zero" and run.name not in ("deis", "sa_solver")
    plan = sampler.plan(SCHEDULE, sigmas=[*sigmas, 0.0 if reaches_zero else LOW / 2])
    return plan, len(plan) - 1


def scales(plan: Any, i: int) -> tuple[float, float]:
    """The factors of the picture and of its noise in the sample of row ``i``."""
    if plan.space == "sigma":
        return 1.0, float(plan.levels.here[i])
    if i < len(plan):
        return float(plan.signal[i]), float(plan.noise[i])
    signal, noise = rates(plan.levels.to[-1])  # where the last step lands
    return float(signal), float(noise)


def answer(plan: Any, i: int, x: Tensor, signal: float, noise: float, spread: float) -> Tensor:
    """The output of a perfect model of the plan's kind for ``x``."""
    x0 = x0_of(x, signal, noise, spread)
    if hasattr(plan.rows, "seen"):  # EDM's wrapping
        return (x0 - plan.rows.seen.c_skip[i] * x) / plan.rows.seen.c_out[i]
    epsilon = (x - signal * x0) / noise
    return signal * epsilon - noise * x0 if plan.prediction == "v_prediction" else epsilon


def measure(run: Run, n: int, change: Callable[[Any], Any] = lambda plan: plan) -> Result:
    """The sampler's result on the data with ``n`` intervals. ``change``: its plan, made into another."""
    sampler = run.sampler()
    plan, rows = plan_of(run, n)
    plan = change(plan)
    x = torch.zeros(2 + 2 * len(plan), 1, 1, 1, dtype=torch.float64)
    x[1] = 1.0
    drawn = 0

    def draw(like: Tensor) -> Tensor:
        nonlocal drawn
        noise = torch.zeros_like(like)
        noise[2 + drawn] = 1.0
        drawn += 1
        return noise

    warm = max(run.warm, int(run.warm_share * len(plan)))
    start_mean, start_deviation = moments(*scales(plan, 0), run.spread)
    state = sampler.start()
    for i in range(rows):
        signal, noise = scales(plan, i)
        if 0 < i <= warm:  # every sample at its own quantile
            mean, deviation = moments(signal, noise, run.spread)
            x = torch.empty_like(x, dtype=torch.float64)
            x[:] = mean - start_mean * deviation / start_deviation
            x[1] = mean + (1 - start_mean) * deviation / start_deviation
        exact = x
        x, state = sampler.step(plan, i, x, answer(plan, i, x, signal, noise, run.spread), state, draw)
        if 0 < i <= warm and hasattr(state, "base"):  # what a corrector made of the exact sample
            state = state._replace(base=exact)
    mean, deviation = moments(*scales(plan, rows), run.spread)
    offset, slope, fresh = float(x[0]), float(x[1] - x[0]), (x[2:] - x[0]).double()
    got_mean = offset + slope * start_mean
    got_deviation = math.sqrt((slope * start_deviation) ** 2 + float((fresh**2).sum()))
    return Result(abs(got_mean - mean) / deviation, abs(got_deviation - deviation) / deviation, drawn)


def errors_of(run: Run, change: Callable[[Any], Any] = lambda plan: plan) -> list[float]:
    return [measure(run, n, change).error for n in run.steps]


def slope_of(run: Run, errors: Sequence[float]) -> float:
    """The measured order: by which power of the number of steps the error falls, over the last two."""
    return math.log(errors[-2] / errors[-1]) / math.log(run.steps[-1] / run.steps[-2])


# --- the methods ------------------------------------------------------------------------------------------------------

FULL = {"lower_order_final": False}
LANDS = {"final_sigma": "sigma_min"}
NO_CORRECTOR = {"disable_corrector": tuple(range(200))}
TIMES: dict[str, Any] = {"levels": "timesteps", "steps": (32, 64, 128)}
TRAILING = {"spacing": "trailing"}
KINDS = ("midpoint", "heun")
# where the error of a high order would soon be smaller than the rounding of its float32 coefficients
FEW = (12, 16, 24)


def of_order(name: str, m: int, order: float | None = None, **options: Any) -> dict[str, Any]:
    """A multistep method of ``solver_order`` m, from exact starting values."""
    return {"name": name, "order": m if order is None else order, "options": {"solver_order": m, **options}, "warm": m}


DETERMINISTIC = [
    Run("euler", 1),
    Run("heun", 2),
    Run("dpm2", 2),
    *(Run(**of_order("lms", m)) for m in (1, 2, 3, 4)),
    Run("ddim", 1, TRAILING, **TIMES),
    Run("tcd", 1, {"eta": 0.0, "original_steps": None}, **TIMES),
    Run("ddim_inverse", 1, TRAILING, levels="timesteps", steps=(128, 256, 512)),
    Run("pndm", 2, TRAILING, **TIMES),
    Run("pndm", 2, {**TRAILING, "runge_kutta": True}, **TIMES),
    # its first steps, from pure noise, do not become small as n grows: they start below that
    Run("ipndm", 2, levels="own", warm_share=0.25),
    *(
        Run(**of_order("dpmpp_2m", m, algorithm=a, solver_type=k, **FULL, **LANDS))
        for a in ("dpmsolver++", "dpmsolver")
        for m, k in ((1, "midpoint"), (2, "midpoint"), (2, "heun"))
    ),
    # of order 2, whatever its name says: see THIRD below
    *(Run(**of_order("dpmpp_2m", 3, 2, algorithm=a, **FULL, **LANDS)) for a in ("dpmsolver++", "dpmsolver")),
    *(
        Run("dpmpp_2s", m, {"solver_order": m, "algorithm": a, "solver_type": k, **LANDS}, steps=(12, 24, 48))
        for a in ("dpmsolver++", "dpmsolver")
        for m in (1, 2, 3)
        for k in KINDS[: 1 if m == 1 else 2]
    ),
    *(Run("dpmpp_2m_inverse", m, {"solver_order": m, **FULL, **LANDS, **IN_RANGE}, "rising") for m in (1, 2)),
    *(Run(**of_order("deis", m, **FULL), steps=FEW, spread=1.5) for m in (1, 2, 3)),
    # the corrector raises the order by one
    *(
        Run(**of_order("unipc", m, solver_type=b, **FULL, **NO_CORRECTOR, **LANDS))
        for m in (1, 2, 3)
        for b in ("bh1", "bh2")
    ),
    *(
        Run(**of_order("unipc", m, m + 1, solver_type=b, predict_x0=p, **FULL, **LANDS), steps=(16, 24, 32))
        for m in (1, 2, 3)
        for b in ("bh1", "bh2")
        for p in (True, False)
    ),
    Run("sa_solver", 1, {"predictor_order": 1, "corrector_order": 1, "tau": 0.0, **FULL}, steps=(64, 128, 256)),
    Run("sa_solver", 2, {"predictor_order": 2, "corrector_order": 2, "tau": 0.0, **FULL}, warm=2),
    Run("sa_solver", 3, {"predictor_order": 3, "corrector_order": 3, "tau": 0.0, **FULL}, warm=3, steps=FEW),
    Run("edm_euler", 1),
    Run(**of_order("edm_dpmpp_2m", 1, **FULL, **IN_RANGE), levels="edm"),
    Run(**of_order("edm_dpmpp_2m", 2, **FULL, **IN_RANGE), levels="edm"),
    Run(**of_order("edm_dpmpp_2m", 3, 2, **FULL, **IN_RANGE), levels="edm"),  # see THIRD
]

# An ancestral step is exact but for its deterministic part, whose order it has.
STOCHASTIC = [
    Run("euler_ancestral", 1),
    Run("dpm2_ancestral", 2),
    Run("ddpm", 1, TRAILING, **TIMES),
    Run("ddim", 1, {"eta": 1.0, **TRAILING}, **TIMES),
    Run("dpmpp_sde", 2),
    Run("dpmpp_2m_sde", 2, FULL),
    Run("dpmpp_2m_sde", 2, {"solver_type": "heun", **FULL}),
    Run("dpmpp_3m_sde", 2, FULL),
    Run("sa_solver", 2, {"tau_start": 0.0, "tau_end": 1e9, **FULL}),
]

THIRD = """The third-order multistep step takes the second divided difference D2 where Taylor's formula has the second
derivative, which is twice that; so do k-diffusion (its 3M SDE) and diffusers. It gains a little over order 2, but is
not of order 3. With twice the D2 it is."""

NOT_MEASURED = {
    "lcm": "its model gives the end of the path, not x0: it is no solver of the equation",
    "cm": "its model gives the end of the path, not x0: it is no solver of the equation",
    "tcd with eta above 0": "it goes down to (1 - eta) t whatever the number of steps: only its own models can do that",
    "euler with s_churn": "as in diffusers the model is asked before the noise of a churn is added",
    "sa_solver of order 4": "the rounding of its float32 weights, which grows with n, is larger than its error",
}
