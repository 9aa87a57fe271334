"""Heun: Euler's step, corrected by the slope at its end (Karras et al. 2022, algorithm 1).

Each interval from sigma to sigma_next takes two model calls. The first gives the slope at its start, and an Euler step
to its end; the second gives the slope there, and the interval is walked again from its start with the mean of the two:

    x_next = x + (slope(x, sigma) + slope(x_euler, sigma_next)) / 2 * (sigma_next - sigma)

which is of second order. So each timestep but the first is there twice, once as the end of an interval and once as the
start of the next: n steps make 2n - 1 model calls, since the last interval, to sigma 0, has no slope at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.sigma_plan import SigmaPlan, SpacedSigmas, sample_x0, sigma_rows
from minidiff.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class HeunPlan(SigmaPlan):
    """Rows: ``dt``, from sigma to that of the next row: 0 where an interval ends and the next begins."""

    dt: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        call = ["end of interval" if i % 2 else "start" for i in range(len(self))]
        return {**super().columns(), "call": call, "dt": self.dt}


class HeunState(NamedTuple):
    """Inside an interval: the sample at which it began and the slope there. Between intervals: None."""

    base: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Heun(SpacedSigmas):
    """The options: those of :class:`SpacedSigmas`, and ``clip``, which clamps x0 to -clip..clip (None: no clamp).

    ``like_diffusers``: whether a call starts or ends an interval depends on the calls made so far, so that a run that
    begins at an odd row (image to image) goes nowhere; without it that is an error. And timestep T, which 1000 steps
    with an offset of 1 begin with, is let through.
    """

    order: ClassVar[int] = 2

    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.clip is None or self.clip > 0, f"clip={self.clip} must be positive, or None")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> HeunPlan:
        """2n - 1 rows for n ``steps``, for n falling ``timesteps``, fractions allowed, or for n + 1 falling ``sigmas``
        (which the reference can't take)."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        times, levels, _ = self.levels(schedule, steps, timesteps, sigmas)
        t, s = torch.from_numpy(times).to(torch.float32), torch.from_numpy(levels)
        t = torch.cat([t[:1], t[1:].repeat_interleave(2)])
        s = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
        return HeunPlan(**sigma_rows(t, s, self.spacing, schedule.prediction), dt=s[1:] - s[:-1])

    def start(self) -> HeunState:
        return HeunState()

    def scale_input(self, plan: HeunPlan, i: int, x: Tensor) -> Tensor:
        return x / plan.in_scale[i]

    def denoised(self, plan: HeunPlan, i: int, x: Tensor, out: Tensor, state: HeunState) -> Tensor:
        x0 = sample_x0(plan.prediction, x, out, plan.sigmas[i], plan.variance[i], plan.c_out[i])
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def step(
        self, plan: HeunPlan, i: int, x: Tensor, out: Tensor, state: HeunState, draw: Draw
    ) -> tuple[Tensor, HeunState]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.sigmas[i]
        if state.base is None or state.slope is None:
            if i % 2 and not self.like_diffusers:
                raise ConfigError(f"Heun can't start at row {i}, where an interval ends: start at an even row")
            return x + slope * plan.dt[i], HeunState(x, slope)
        return state.base + (state.slope + slope) / 2 * plan.dt[i - 1], HeunState()
