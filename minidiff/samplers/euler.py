"""Euler's method for the probability-flow equation in sigma (Karras et al. 2022, algorithms 1 and 2).

The path to the picture is dx / d sigma = (x - x0) / sigma. A step follows this slope to the next sigma, the last of
which is 0. With ``s_churn`` a step first adds a little noise, up to sigma_hat (algorithm 2, lines 4 to 6); as in the
reference, the model is called before that.

The step is x0 = x - sigma * epsilon, then x + (x - x0) / sigma * (sigma_to - sigma). Except for rounding this equals
x + epsilon * (sigma_to - sigma), but the short form would differ from the reference at every step.

Euler ancestral goes further down and then adds fresh noise, back up to the next sigma (k-diffusion's sample_euler_a):

    sigma_up**2   = sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2      fresh noise
    sigma_down**2 = sigma_to**2 - sigma_up**2                              the deterministic step lands here

This is the step of DDPM written in sigma. Noise is drawn at every step, including the last, where its factor is 0.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import meet, upcast
from minidiff.samplers.checks import root
from minidiff.samplers.grid import Floats
from minidiff.samplers.levels import Final, Sigmas, SpacedSigmas
from minidiff.samplers.method import Draw, Empty, Given, Levels, Method, Next, Plan, R
from minidiff.samplers.options import AboveZero, NotNegative
from minidiff.schedule import NoiseSchedule

MAX_GAMMA = 2**0.5 - 1  # churn at most doubles the variance in one step

Churn = namedtuple("Churn", "sigma_hat churn churned dt")
"""``sigma_hat``: sigma after the churn; ``churn``: factor of its noise; ``churned``: True if there is any churn;
``dt``: from sigma_hat to the next sigma."""


@dataclass(frozen=True, kw_only=True)
class Churning(Method[R, Empty]):
    """Base class of the methods with churn. ``s_churn`` (0: none) is spread over all steps and applies where sigma lies
    in ``s_tmin``..``s_tmax`` (None: no upper bound); its noise is multiplied by ``s_noise``."""

    s_churn: NotNegative = 0.0
    s_tmin: float = 0.0
    s_tmax: float | None = None
    s_noise: float = 1.0

    def churned_step(self, at: Churn, x: Tensor, out: Tensor, draw: Draw, x0: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sample after a step. ``x0`` gives the picture seen in a sample at sigma_hat."""
        x = upcast(x)
        if at.churned:
            x = x + meet((draw(out) * self.s_noise) * at.churn, x)
        slope = (x - meet(x0(x), x)) / at.sigma_hat
        after: Tensor = x + slope * at.dt
        return after.to(out.dtype)

    def churn(self, at: Levels, steps: int) -> Churn:
        """Return the columns for a run of ``steps`` steps."""
        gamma = min(self.s_churn / steps, MAX_GAMMA)
        churned = (at.here >= self.s_tmin) & (gamma > 0)
        if self.s_tmax is not None:
            churned &= at.here <= self.s_tmax
        sigma_hat = torch.where(churned, at.here * (gamma + 1), at.here)
        churn = (sigma_hat**2 - at.here**2) ** 0.5
        return Churn(sigma_hat, churn, tuple(churned.tolist()), at.to - sigma_hat)


@dataclass(frozen=True, kw_only=True)
class Euler(Churning[Churn], SpacedSigmas[Churn, Empty]):
    """Euler sampler. Options: those of :class:`Churning` and :class:`Tabled`, and

    ``interpolation``: "log_linear" spaces the sigmas of all of training evenly in their logarithm. ``continuous``: the
    time input of a v-prediction model is log(sigma) / 4 instead of a timestep, as in EDM and Stable Video Diffusion.
    """

    takes = ("steps", "timesteps", "sigmas")

    interpolation: Literal["linear", "log_linear"] = "linear"
    sigma_min: AboveZero = None  # type: ignore[misc]
    sigma_max: AboveZero = None  # type: ignore[misc]
    continuous: bool = False
    final_sigma: Final = "zero"

    def step(self, plan: Plan[Churn], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at = plan.at(i)
        return self.churned_step(at, x, out, draw, lambda x: plan.x0(i, x, out, at.sigma_hat)), state

    def denoised(self, plan: Plan[Churn], i: int, x: Tensor, out: Tensor, state: Empty) -> Tensor:
        """Compute x0 from the sample that the model saw, before any churn."""
        return plan.x0(i, upcast(x), out)

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        at = super().levels(schedule, given)
        if not self.continuous or schedule.prediction != "v_prediction" or at.sigmas is None:
            return at
        check(given.timesteps is None, "Euler: timesteps can't be given with continuous=True, give sigmas")
        here, to = at.sigmas[:-1], at.sigmas[1:]
        return self.between(0.25 * here.log(), here, to, sigmas=at.sigmas)

    def sigmas_for(self, t: Floats, table: Floats, given: Given) -> tuple[Floats, Floats]:
        if self.interpolation == "linear":
            return super().sigmas_for(t, table, given)
        return self.grid.log_linear(t, table, given.timesteps is not None)

    def rows(self, at: Levels, prediction: Prediction) -> Churn:
        return self.churn(at, len(at.here) if at.sigmas is None else len(at.sigmas) - 1)


Ancestral = namedtuple("Ancestral", "dt sigma_up")
"""``dt``: from sigma to sigma_down; ``sigma_up``: factor of the fresh noise."""


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Sigmas[Ancestral, Empty]):
    """Euler ancestral sampler. Options: see :class:`Sigmas`."""

    def step(self, plan: Plan[Ancestral], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at, x0 = plan.at(i), self.denoised(plan, i, x, out, state)
        x = upcast(x)
        x = x + ((x - meet(x0, x)) / plan.levels.here[i]) * at.dt
        return (x + meet(draw(out) * at.sigma_up, x)).to(out.dtype), state

    def denoised(self, plan: Plan[Ancestral], i: int, x: Tensor, out: Tensor, state: Empty) -> Tensor:
        return plan.x0(i, upcast(x), out)

    def rows(self, at: Levels, prediction: Prediction) -> Ancestral:
        down, up = ancestral(self, at.here, at.to)
        return Ancestral(dt=down - at.here, sigma_up=up)


def ancestral(method: Method[Any, Any], here: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Return sigma_down and sigma_up, as above, for steps from ``here`` to ``to``, (n,) each."""
    up = root(to**2 * (here**2 - to**2) / here**2, method, "sigma_up")
    return root(to**2 - up**2, method, "sigma_down"), up
