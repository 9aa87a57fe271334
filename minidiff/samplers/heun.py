"""Heun's method: an Euler step, corrected by the slope at its end (Karras et al. 2022, algorithm 1).

Each interval from sigma to sigma_to takes two model calls. The first gives the slope at its start, and an Euler step to
its end. The second gives the slope at the end, and the step is repeated from the start with the mean of the two:

    x_to = x + (slope(x, sigma) + slope(x_euler, sigma_to)) / 2 * (sigma_to - sigma)

This is of second order. Each timestep but the first therefore occurs twice, as the end of an interval and as the start
of the next. n steps make 2n - 1 model calls, since the last interval, to sigma 0, has no slope at its end.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.errors import ConfigError
from minidiff.samplers.levels import SpacedSigmas
from minidiff.samplers.limits import Clipped
from minidiff.samplers.method import Draw, Given, Levels, Next, Plan
from minidiff.schedule import NoiseSchedule

Row = namedtuple("Row", "call dt")
"""``dt``: from sigma to that of the next row; 0 where an interval ends and the next begins."""


class State(NamedTuple):
    """Inside an interval: the sample at its start and the slope there. Between intervals: None."""

    base: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Heun(SpacedSigmas[Row, State], Clipped[Row, State]):
    """Heun sampler. Options: those of :class:`SpacedSigmas` and :class:`Clipped`. n steps have 2n - 1 rows.

    ``like_diffusers``: the number of calls so far decides if a call starts or ends an interval, so that a run that
    starts at an odd row (img2img) makes no progress; without it that is an error. And see :class:`Sigmas`.
    """

    initial: ClassVar[State] = State()
    order: ClassVar[int] = 2
    takes: ClassVar[tuple[str, ...]] = ("steps", "timesteps")

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: State, draw: Draw) -> Next[State]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.levels.here[i]
        if state.base is None or state.slope is None:
            if i % 2 and not self.like_diffusers:
                raise ConfigError(f"Heun can't start at row {i}, where an interval ends: start at an even row")
            return x + slope * plan.at(i).dt, State(x, slope)
        return state.base + (state.slope + slope) / 2 * plan.at(i - 1).dt, State()

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        at = super().levels(schedule, given)
        t, here = (torch.cat([column[:1], column[1:].repeat_interleave(2)]) for column in at[:2])
        return self.between(t, here, torch.cat([here[1:], at.to[-1:]]))

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        call = tuple("end of interval" if i % 2 else "start" for i in range(len(at.here)))
        return Row(call=call, dt=at.to - at.here)
