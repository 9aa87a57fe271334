"""DPM2: the midpoint method in log sigma, plain and ancestral (k-diffusion's sample_dpm_2; Karras et al. 2022, alg. 2).

Each interval from sigma to sigma_to takes two model calls. The first gives the slope at its start, and a step to the
middle, the geometric mean of both sigmas; the slope there serves for the whole interval, walked again from its start:

    x_mid = x + slope(x, sigma) * (sigma_mid - sigma)          x_to = x + slope(x_mid, sigma_mid) * (sigma_to - sigma)

sigma_to is the next sigma or, for the ancestral form, the sigma_down from which fresh noise leads back up to the next
(see euler.py). The model is also called at the timesteps of the middles, which lie between those of the intervals'
ends. n steps make 2n - 1 calls: the last interval, to sigma 0, has no middle and is a single Euler step (also if given
sigmas end above 0).
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
from minidiff.samplers.checks import root, rows_of
from minidiff.samplers.levels import SpacedSigmas, sigma_table, to_timesteps
from minidiff.samplers.method import Draw, Given, Levels, Next, Plan, Put
from minidiff.schedule import NoiseSchedule

Base = Tensor | None
"""In the middle of an interval, the sample at its start; at the start, None."""


Row = namedtuple("Row", "dt sigma_up")
"""``dt``: factor of the slope, from the start of the interval; ``sigma_up``: factor of fresh noise at the end of an
interval (0 unless ancestral)."""


Split = namedtuple("Split", "middle to up")
"""For each interval, (n,) each: the middle sigma (for the last interval its end, since it has no middle), the sigma on
which the step lands, and the sigma of fresh noise."""


@dataclass(frozen=True, kw_only=True)
class DPM2(SpacedSigmas[Row, Base]):
    """DPM2 sampler. Options: see :class:`SpacedSigmas`. In the middle of an interval, the state is the sample at its
    start.

    ``like_diffusers``: Karras timesteps are rounded to whole numbers at the ends of the intervals (not in the
    middles), although the sigmas are not; timesteps are float64 with every sigma spacing but "timesteps"; a picture
    that is put back in the middle of an interval gets the noise of its end; and see :class:`Sigmas`. (In the reference,
    a run that starts in the middle of an interval gives a wrong result; here it is an error.)
    """

    order: ClassVar[int] = 2
    initial: ClassVar[Base] = None

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Base, draw: Draw) -> Next[Base]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.levels.here[i]
        at = plan.at(i)
        if i % 2 == 0:
            return x + slope * at.dt, x
        if state is None:
            raise ConfigError(f"{self.name} can't start at row {i}, the middle of an interval: use an even row")
        return self.arrive(at, state + slope * at.dt, out, draw), None

    def arrive(self, at: Row, x: Tensor, out: Tensor, draw: Draw) -> Tensor:
        """Return ``x`` at the end of an interval."""
        return x

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        table = sigma_table(schedule, self.last_alpha_bar)
        times, sigmas = self.visited(table, given)
        if self.like_diffusers and self.sigma_spacing == "karras":
            times = times.round()
        ends, s = torch.from_numpy(times), torch.from_numpy(sigmas)
        middle, to, up = self.split(s)
        between = torch.from_numpy(to_timesteps(middle[:-1].numpy(), table, np.float32)).to(ends.dtype)
        t = torch.cat([ends[:1], torch.stack([between, ends[1:]], dim=1).flatten()])
        here, to = interleave(s[:-1], middle), interleave(middle, to)
        listed = torch.cat([s[:1], s[1:].repeat_interleave(2), s[-1:]])
        at = self.between(t if self.like_diffusers else t.float(), here, to, sigmas=listed)
        put: Put | None = ("sigma", listed) if self.like_diffusers else None
        return at._replace(put=put, beside={"up": interleave(torch.zeros_like(up), up)})

    def split(self, s: Tensor) -> Split:
        """Return the intervals between the sigmas ``s`` (n + 1,)."""
        middle = s.log().lerp(s.roll(1).log(), 0.5).exp()[1:]
        middle[-1] = s[-1]
        return Split(middle, s[1:], torch.zeros_like(middle))

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        start = at.here[0::2].repeat_interleave(2)[: len(at.here)]
        return Row(dt=at.to - start, sigma_up=at.beside["up"])


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral(DPM2):
    """Ancestral DPM2. Options and ``like_diffusers``: see :class:`DPM2`. Noise is drawn at the end of every interval
    but the last."""

    def arrive(self, at: Row, x: Tensor, out: Tensor, draw: Draw) -> Tensor:
        after: Tensor = x + draw(out) * at.sigma_up
        return after

    def split(self, s: Tensor) -> Split:
        to = s.roll(-1)
        to[-1] = 0.0
        up = (to**2 * (s**2 - to**2) / s**2)[:-1]
        up = torch.cat([root(up, self, "sigma_up"), torch.zeros_like(s[:1])])
        down = root(to**2 - up**2, self, "sigma_down")
        middle = s.log().lerp(down.log(), 0.5).exp()[:-1]
        middle[-1] = s[-1]
        lost = rows_of(~(middle[:-1] > 0))
        where = f"DPM2Ancestral: sigma_down rounds to 0 in interval {lost[:3]}, which then has no middle"
        check(not lost, f"{where} (diffusers: NaN); use more steps")
        return Split(middle, down[:-1], up[:-1])


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Interleave two (n,) rows to (2n - 1,), leaving out the last entry of ``second``."""
    return torch.stack([first, second], dim=1).flatten()[:-1]
