"""DDIM run backwards: from a picture to the noise that DDIM would have made it of (Song et al. 2021, section 5.4).

DDIM's step with eta 0 follows a path without noise, so it can be walked either way: x0 and epsilon at one alpha_bar
are put together again at the next, noisier one. The rows rise from the picture on; the sample that comes in at a row
has the noise of the row before, and the model is told the timestep of the row at which the step lands, as is the
custom. Editing by inversion begins with this.
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
    Options,
    Plan,
    check_chosen,
    check_no_pure_noise,
    check_timesteps,
    need_schedule,
    unit,
)
from minidiff.samplers.ddim import alpha_bar_at
from minidiff.schedule import NoiseSchedule, Spacing, spaced, to_epsilon, to_x0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DDIMInversePlan(Plan):
    """Rows: ``signal`` and ``noise``, the roots of alpha_bar and 1 - alpha_bar of the sample that comes in (which
    ``alpha_bars`` lists); a step is ``signal_next`` * x0 + ``noise_next`` * epsilon."""

    signal: Tensor
    noise: Tensor
    signal_next: Tensor
    noise_next: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        return super().columns() | {"signal_next": self.signal_next, "noise_next": self.noise_next}


@dataclass(frozen=True, kw_only=True)
class DDIMInverse(Options):
    """``set_alpha_to_one``: the picture's own alpha_bar, before the first row, is 1 instead of that of timestep 0.
    ``clip`` clamps x0 to -clip..clip (None: no clamp).

    ``like_diffusers`` takes the sample that comes in to lie T // steps below the row's timestep, where trailing
    spacing puts the row before elsewhere; the row too many that trailing has for some numbers of steps, at timestep
    -1, is taken for the last timestep of training.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.clip is None or self.clip > 0, f"clip={self.clip} must be positive, or None")
        known = self.spacing != "linspace" or not self.like_diffusers
        check(known, "DDIMInverseScheduler has no timestep_spacing='linspace': use leading or trailing")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DDIMInversePlan:
        """``steps`` in 1..T; the reference takes no timesteps or sigmas of one's own, and neither does this."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        total, n = len(schedule), steps or 0
        falling = spaced(self.spacing, total, n, self.steps_offset, like_diffusers=self.like_diffusers)
        check_timesteps(self, falling, total)
        t = torch.from_numpy(falling[::-1].copy())
        before = t - total // n if self.like_diffusers else torch.cat([torch.full_like(t[:1], -1), t[:-1]])
        alpha_bar = alpha_bar_at(schedule, before, self.set_alpha_to_one)
        check_no_pure_noise(self, before, alpha_bar, schedule.prediction)
        divides = schedule.prediction == "sample" and bool((alpha_bar == 1).any())
        check(
            not divides, "DDIMInverse: a picture without noise has no epsilon: set_alpha_to_one=False, or epsilon or v"
        )
        after = schedule.alphas_cumprod[t]
        return DDIMInversePlan(
            timesteps=t,
            alpha_bars=alpha_bar,
            init_noise_sigma=unit(),
            prediction=schedule.prediction,
            signal=alpha_bar**0.5,
            noise=(1 - alpha_bar) ** 0.5,
            signal_next=after**0.5,
            noise_next=(1 - after) ** 0.5,
        )

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: DDIMInversePlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: DDIMInversePlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        x0 = to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i])
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def step(
        self, plan: DDIMInversePlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x0 = self.denoised(plan, i, x, out, state)
        epsilon = to_epsilon(plan.prediction, x, out, plan.signal[i], plan.noise[i])
        return plan.signal_next[i] * x0 + plan.noise_next[i] * epsilon, state
