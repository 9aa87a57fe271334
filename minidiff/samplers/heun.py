"""Heun's method and DPM2: second order in sigma, by two model calls for each interval (Karras et al. 2022).

The first call gives the slope (x - x0) / sigma at the start of the interval. Heun's method (algorithm 1) calls again at
its end, and repeats the step from the start with the mean of both slopes:

    x_end = x + slope(x, sigma) * (sigma_to - sigma)       x_to = x + (slope(x) + slope(x_end)) / 2 * (sigma_to - sigma)

DPM2 (k-diffusion's sample_dpm_2) calls again in the middle, the geometric mean of both sigmas, and takes that slope for
the whole interval:

    x_mid = x + slope(x, sigma) * (sigma_mid - sigma)       x_to = x + slope(x_mid, sigma_mid) * (sigma_to - sigma)

n steps make 2n - 1 calls, since the last interval, to sigma 0, is a single Euler step: it has no slope at its end, and
no middle (DPM2 takes one step there also if given sigmas end above 0). Heun's method visits each timestep but the first
twice, as the end of an interval and as the start of the next; DPM2 visits the timesteps of the middles. In its
ancestral form sigma_to is the sigma_down from which fresh noise leads back up to the next sigma (euler.py).
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.errors import ConfigError
from minidiff.samplers.arithmetic import interleave
from minidiff.samplers.checks import rows_of
from minidiff.samplers.euler import ancestral
from minidiff.samplers.grid import to_timesteps
from minidiff.samplers.levels import SpacedSigmas, sigma_table
from minidiff.samplers.limits import Clipped
from minidiff.samplers.method import Draw, Given, History, Levels, Next, Plan
from minidiff.schedule import NoiseSchedule

HeunRow = namedtuple("HeunRow", "call dt")
"""``dt``: from sigma to that of the next row; 0 where an interval ends and the next begins."""


@dataclass(frozen=True, kw_only=True)
class Heun(SpacedSigmas[HeunRow, History], Clipped[HeunRow, History]):
    """Heun sampler. Options: those of :class:`SpacedSigmas` and :class:`Clipped`. n steps have 2n - 1 rows.

    ``like_diffusers``: the number of calls so far decides if a call starts or ends an interval, so that a run that
    starts at an odd row (img2img) makes no progress; without it that is an error.
    """

    initial = History()
    order = 2
    takes = ("steps", "timesteps")

    def step(self, plan: Plan[HeunRow], i: int, x: Tensor, out: Tensor, state: History, draw: Draw) -> Next[History]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.levels.here[i]
        if state.base is None:
            if i % 2 and not self.like_diffusers:
                raise ConfigError(f"Heun can't start at row {i}, where an interval ends: start at an even row")
            return x + slope * plan.at(i).dt, History((slope,), x)
        return state.base + (state.outputs[0] + slope) / 2 * plan.at(i - 1).dt, History()

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        at = super().levels(schedule, given)
        t, here = (torch.cat([column[:1], column[1:].repeat_interleave(2)]) for column in at[:2])
        return self.between(t, here, torch.cat([here[1:], at.to[-1:]]))

    def rows(self, at: Levels, prediction: Prediction) -> HeunRow:
        call = tuple("end of interval" if i % 2 else "start" for i in range(len(at.here)))
        return HeunRow(call=call, dt=at.to - at.here)


Row = namedtuple("Row", "dt sigma_up")
"""``dt``: factor of the slope, from the start of the interval; ``sigma_up``: factor of fresh noise at the end of an
interval (0 unless ancestral)."""


@dataclass(frozen=True, kw_only=True)
class DPM2(SpacedSigmas[Row, History]):
    """DPM2 sampler. Options: see :class:`SpacedSigmas`.

    A run that starts in the middle of an interval is an error (in the reference it gives a wrong result).
    """

    initial = History()
    order = 2
    fresh: ClassVar[bool] = False  # True if an interval ends with fresh noise

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: History, draw: Draw) -> Next[History]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.levels.here[i]
        at = plan.at(i)
        if i % 2 == 0:
            return x + slope * at.dt, History(base=x)
        if state.base is None:
            raise ConfigError(f"{self.name} can't start at row {i}, the middle of an interval: use an even row")
        after = state.base + slope * at.dt
        return after + draw(out) * at.sigma_up if self.fresh else after, History()

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        table = sigma_table(schedule, self.last_alpha_bar)
        times, sigmas = self.visited(schedule, given)
        ends = torch.from_numpy(self.grid.at_ends(times, self.sigma_spacing))
        s = torch.from_numpy(sigmas.astype(np.float32))
        middle, to, up = self.split(s)
        middle[-1] = s[-1]
        t = interleave(ends, torch.from_numpy(to_timesteps(middle[:-1].numpy(), table, np.float32)))
        here, to = interleave(s[:-1], middle), interleave(middle, to)
        listed = torch.cat([s[:1], s[1:].repeat_interleave(2), s[-1:]])
        beside = {"up": interleave(torch.zeros_like(up), up)}
        t, put = self.grid.in_halves(t, listed)
        return self.between(t, here, to, sigmas=listed, put=put, beside=beside)

    def split(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each interval between the sigmas ``s`` (n + 1,) its middle, the sigma on which the step lands, and
        that of the fresh noise."""
        return s[1:].log().lerp(s[:-1].log(), 0.5).exp(), s[1:], torch.zeros_like(s[1:])

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        start = at.here[0::2].repeat_interleave(2)[: len(at.here)]
        return Row(dt=at.to - start, sigma_up=at.beside["up"])


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral(DPM2):
    """Ancestral DPM2. Options: see :class:`DPM2`. Noise is drawn at the end of every interval
    but the last."""

    fresh = True

    def split(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        down, up = ancestral(self, s[:-1], s[1:])
        middle = s[:-1].log().lerp(down.log(), 0.5).exp()
        lost = rows_of(~(middle[:-1] > 0))
        where = f"DPM2Ancestral: sigma_down rounds to 0 in interval {lost[:3]}, which then has no middle"
        check(not lost, f"{where} (diffusers: NaN); use more steps")
        return middle, down, up
