"""DDIM: the same marginals as DDPM, but a path that needs no new noise (Song et al. 2021).

From the model's x0 and epsilon, the next sample is put together afresh (equation 12):

    x_prev = sqrt(alpha_bar_prev) * x0  +  sqrt(1 - alpha_bar_prev - std**2) * epsilon  +  std * fresh noise

with std = eta * sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) (equation 16). eta 0
is deterministic, and eta 1 is DDPM.

After the last row there is no alpha_bar_prev. In other programs' prints its timestep is negative there (-19 after 1
with 50 steps: one interval below); that stands for "past the end", where alpha_bar is 1 (``set_alpha_to_one``) or
that of timestep 0, which Stable Diffusion ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import (
    Draw,
    check_chosen,
    check_no_pure_noise,
    check_timesteps,
    need_schedule,
    root,
    unit,
    whole,
)
from minidiff.samplers.limits import LimitedOptions, LimitedPlan, from_noise
from minidiff.schedule import NoiseSchedule, Spacing, epsilon_from_x0, spaced, to_epsilon


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DDIMPlan(LimitedPlan):
    """Rows: ``prev`` the timestep at which each step lands (negative: past the end); the step is
    ``signal_prev`` * x0 + ``direction`` * epsilon + ``std`` * fresh noise."""

    prev: Tensor
    signal_prev: Tensor
    direction: Tensor
    std: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        own = {"signal_prev": self.signal_prev, "direction": self.direction, "std": self.std}
        return super().columns() | {"prev": self.prev} | own


@dataclass(frozen=True, kw_only=True)
class DDIM(LimitedOptions):
    """``eta``: how much fresh noise, 0 (none) to 1 (as DDPM). ``use_clipped``: derive epsilon again from the limited
    x0, as GLIDE does. ``set_alpha_to_one``: alpha_bar after the last row is 1 instead of that of timestep 0.

    ``like_diffusers`` lands every step T // steps below its timestep, where trailing and linspace spacing put the
    next row elsewhere, and refuses the rows where rounding makes it NaN.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    eta: float = 0.0
    use_clipped: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.eta >= 0, f"eta={self.eta} must not be negative")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DDIMPlan:
        """``steps`` in 1..T, or falling whole ``timesteps`` (which the reference can't take)."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "timesteps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        total = len(schedule)
        t = torch.from_numpy(
            spaced(self.spacing, total, steps or 0, self.steps_offset, like_diffusers=self.like_diffusers)
            if timesteps is None
            else whole(self, timesteps)
        )
        check_timesteps(self, t, total)
        ratio = total // (steps or len(t))
        prev_t = t - ratio if self.like_diffusers else torch.cat([t[1:], (t[-1:] - ratio).clamp(max=-1)])

        alpha_bar = schedule.alphas_cumprod[t]
        check_no_pure_noise(self, t, alpha_bar, schedule.prediction, self.bounds_infinity)
        prev = alpha_bar_at(schedule, prev_t, self.set_alpha_to_one)
        beta_bar = 1 - alpha_bar
        variance = ((1 - prev) / beta_bar) * (1 - alpha_bar / prev)
        std = self.eta * root(variance, self, "the variance")
        return DDIMPlan(
            timesteps=t,
            alpha_bars=alpha_bar,
            init_noise_sigma=unit(),
            prediction=schedule.prediction,
            prev=prev_t,
            signal=alpha_bar**0.5,
            noise=beta_bar**0.5,
            from_noise=from_noise(alpha_bar, schedule.prediction),
            signal_prev=prev**0.5,
            direction=root(1 - prev - std**2, self, f"with eta={self.eta}, 1 - alpha_bar_prev - std**2"),
            std=std,
        )

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: DDIMPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: DDIMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        return self.x0(plan, i, x, out)

    def step(
        self, plan: DDIMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        signal, noise = plan.signal[i], plan.noise[i]
        x0 = self.denoised(plan, i, x, out, state)
        if self.use_clipped:
            epsilon = epsilon_from_x0(x, x0, signal, noise)
        else:
            epsilon = to_epsilon(plan.prediction, x, out, signal, noise)
        prev = plan.signal_prev[i] * x0 + plan.direction[i] * epsilon
        if self.eta > 0:
            prev = prev + plan.std[i] * draw(out)
        return prev, state


def alpha_bar_at(schedule: NoiseSchedule, t: Tensor, set_alpha_to_one: bool) -> Tensor:
    """alpha_bar at timesteps ``t`` (any shape); below 0 it is 1, or that of timestep 0."""
    past_end = unit() if set_alpha_to_one else schedule.alphas_cumprod[0]
    return torch.where(t >= 0, schedule.alphas_cumprod[t.clamp(min=0)], past_end)
