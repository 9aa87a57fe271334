"""DDPM: walk the training process backwards, one Gaussian at a time (Ho et al. 2020).

Given x_t and the model's x0, the sample one row further down is Gaussian with a known mean (equation 7):

    mean = (sqrt(alpha_bar_prev) * beta * x0  +  sqrt(alpha) * (1 - alpha_bar_prev) * x) / (1 - alpha_bar)

and a variance that is a choice (section 3.2): the posterior's own (fixed_small), beta itself (fixed_large), or one
that the model learned (Nichol & Dhariwal 2021, equation 15). "prev" is the next row of the plan, so the method works
on any falling subset of the timesteps; after the last row it is the clean picture, alpha_bar 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import (
    Draw,
    check_chosen,
    check_no_pure_noise,
    check_some_noise,
    check_timesteps,
    need_schedule,
    unit,
    whole,
)
from minidiff.samplers.limits import LimitedOptions, LimitedPlan, from_noise
from minidiff.schedule import NoiseSchedule, Spacing, spaced

Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

MIN_VARIANCE = 1e-20  # the last posterior variance is 0, and its logarithm is wanted


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DDPMPlan(LimitedPlan):
    """Rows: the mean is ``x0_coef`` * x0 + ``x_coef`` * x; ``std`` scales the noise where the variance is fixed, and
    ``log_small``, ``log_large`` bound a learned one. ``noisy`` says whether noise is drawn: at every timestep but 0."""

    x0_coef: Tensor
    x_coef: Tensor
    std: Tensor
    log_small: Tensor
    log_large: Tensor
    noisy: tuple[bool, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        return super().columns() | {"x0_coef": self.x0_coef, "x_coef": self.x_coef, "std": self.std}


@dataclass(frozen=True, kw_only=True)
class DDPM(LimitedOptions):
    """``variance``: fixed_small, fixed_large, their _log forms (the same by way of the logarithm), learned, or
    learned_range; the learned ones need a model with twice the channels, whose second half is the variance.

    ``like_diffusers`` refuses fixed_large_log, which is NaN there.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 0
    variance: Variance = "fixed_small"

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DDPMPlan:
        """``timesteps``: whole numbers that fall strictly, within those of training."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t = torch.from_numpy(
            spaced(self.spacing, len(schedule), steps or 0, self.steps_offset, like_diffusers=self.like_diffusers)
            if timesteps is None
            else whole(self, timesteps)
        )
        check_timesteps(self, t, len(schedule))
        check(not (self.like_diffusers and self.variance == "fixed_large_log"), FIXED_LARGE_LOG)

        prev_t = torch.cat([t[1:], torch.full_like(t[:1], -1)])
        alpha_bar = schedule.alphas_cumprod[t]
        check_no_pure_noise(self, t, alpha_bar, schedule.prediction, self.bounds_infinity)
        check_some_noise(self, t, alpha_bar)
        prev = torch.where(prev_t >= 0, schedule.alphas_cumprod[prev_t.clamp(min=0)], 1.0)
        beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - prev
        alpha = alpha_bar / prev
        beta = 1 - alpha
        small = torch.clamp(beta_bar_prev / beta_bar * beta, min=MIN_VARIANCE)
        return DDPMPlan(
            timesteps=t,
            alpha_bars=alpha_bar,
            init_noise_sigma=unit(),
            prediction=schedule.prediction,
            signal=alpha_bar**0.5,
            noise=beta_bar**0.5,
            from_noise=from_noise(alpha_bar, schedule.prediction),
            x0_coef=(prev**0.5 * beta) / beta_bar,
            x_coef=alpha**0.5 * beta_bar_prev / beta_bar,
            std=self._std(small, beta),
            log_small=torch.log(small),
            log_large=torch.log(beta),
            noisy=tuple((t > 0).tolist()),
        )

    def _std(self, small: Tensor, beta: Tensor) -> Tensor:
        """(n,) what noise is multiplied by; for a learned variance the model says, and this row only shows a bound."""
        if self.variance in ("fixed_small_log", "fixed_large_log"):
            return torch.exp(0.5 * torch.log(small if self.variance == "fixed_small_log" else beta))
        return (beta if self.variance == "fixed_large" else small) ** 0.5

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: DDPMPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: DDPMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        mean, _ = self._split(x, out)
        return self.x0(plan, i, x, mean)

    def step(
        self, plan: DDPMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x0 = self.denoised(plan, i, x, out, state)
        mean = plan.x0_coef[i] * x0 + plan.x_coef[i] * x
        if not plan.noisy[i]:
            return mean, state
        out, learned = self._split(x, out)
        return mean + self._deviation(plan, i, learned) * draw(out), state

    def _split(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction and, where the variance is learned, the model's word on it."""
        if not self.variance.startswith("learned"):
            return out, out
        wanted = 2 * x.shape[1]
        check(out.shape[1] == wanted, f"variance={self.variance!r} needs {wanted} output channels, got {out.shape[1]}")
        mean, learned = torch.split(out, x.shape[1], dim=1)
        return mean, learned

    def _deviation(self, plan: DDPMPlan, i: int, learned: Tensor) -> Tensor:
        """The standard deviation at row ``i``: a 0-dim row entry, or what the model says for every pixel."""
        if self.variance == "learned":
            return learned**0.5
        if self.variance == "learned_range":
            share = (learned + 1) / 2
            return torch.exp(0.5 * (share * plan.log_large[i] + (1 - share) * plan.log_small[i]))
        return plan.std[i]


FIXED_LARGE_LOG = "variance_type='fixed_large_log' gives NaN in diffusers 0.42.1: use fixed_large, which it stands for"
