"""DPM2: the midpoint method in log sigma, plain and ancestral (k-diffusion's sample_dpm_2; Karras et al. 2022, alg. 2).

Each interval from sigma to sigma_to takes two model calls. The first gives the slope at its start, and a step to the
middle, the geometric mean of both sigmas; the slope there serves for the whole interval, walked again from its start:

    x_mid = x + slope(x, sigma) * (sigma_mid - sigma)          x_next = x + slope(x_mid, sigma_mid) * (sigma_to - sigma)

sigma_to is the next sigma, or, for the ancestral form, the sigma_down from which fresh noise leads back up to the next
(see euler_ancestral.py). The model is asked at the timesteps of the middles too, which lie between those of the plan's
ends. n steps make 2n - 1 calls: the last interval, to sigma 0, has no middle and is a single Euler step (as it is where
given sigmas end above 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.samplers.base import Draw, check_chosen, need_schedule, root
from minidiff.samplers.sigma_plan import SigmaPlan, SpacedSigmas, sample_x0, sigma_rows
from minidiff.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DPM2Plan(SigmaPlan):
    """``sigmas`` has every end of an interval twice, as the reference lists them. Rows: ``seen``, the sigma of the
    sample that the model is shown; ``dt``, what the slope is multiplied by, from the start of the interval;
    ``sigma_up``, what fresh noise is multiplied by at the end of an interval (0 unless ancestral). ``noise_of_ends``:
    in the middle of an interval a picture gets the noise of its end."""

    seen: Tensor
    dt: Tensor
    sigma_up: Tensor
    noise_of_ends: bool = False

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        if self.noise_of_ends:
            return super().add_noise(x0, noise, i)
        return x0 + noise * self.seen[i].to(x0.dtype)

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        start = [self.seen[i - i % 2] for i in range(len(self))]
        up = {"sigma_up": self.sigma_up} if bool((self.sigma_up > 0).any()) else {}
        own = {"sigma": self.seen, "to sigma": torch.stack(start) + self.dt, "dt": self.dt}
        return super().columns() | own | up


@dataclass(frozen=True, kw_only=True)
class DPM2(SpacedSigmas):
    """The options are those of :class:`SpacedSigmas`.

    ``like_diffusers``: Karras timesteps are rounded to whole numbers at the ends of the intervals (not in the
    middles), although the sigmas are not; the timesteps of all but "timesteps" are float64; and timestep T, which 1000
    steps with an offset of 1 begin with, is let through; a picture gets the noise of an interval's end in its middle.
    (In the reference a run that starts in the middle of an interval goes astray; here that is an error.)
    """

    order: ClassVar[int] = 2

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DPM2Plan:
        """2n - 1 rows for n ``steps`` in 1..T, or for n + 1 falling ``sigmas`` (which the reference can't take)."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        times, levels, table = self.levels(schedule, steps, None, sigmas)
        if self.like_diffusers and self.sigma_spacing == "karras":
            times = times.round()
        s = torch.from_numpy(levels)
        middle, to, up = self._split(s)
        ends = torch.from_numpy(times)
        between = timesteps_between(middle[:-1], torch.from_numpy(np.log(table))).to(ends.dtype)
        t = torch.cat([ends[:1], torch.stack([between, ends[1:]], dim=1).flatten()])
        start = s[:-1]
        seen, dt = interleave(start, middle), interleave(middle - start, to - start)
        rows = sigma_rows(t if self.like_diffusers else t.float(), seen, self.spacing, schedule.prediction)
        rows["sigmas"] = torch.cat([s[:1], s[1:].repeat_interleave(2), s[-1:]])
        up = interleave(torch.zeros_like(up), up)
        return DPM2Plan(**rows, seen=seen, dt=dt, sigma_up=up, noise_of_ends=self.like_diffusers)

    def _split(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each interval between ``s`` (n + 1,): the middle sigma (of the last one its end, since it has no middle),
        where it lands, and the sigma of fresh noise."""
        middle = s.log().lerp(s.roll(1).log(), 0.5).exp()[1:]
        middle[-1] = s[-1]
        return middle, s[1:], torch.zeros_like(middle)

    def start(self) -> Tensor | None:
        """In the middle of an interval: the sample at its start. Else None."""
        return None

    def scale_input(self, plan: DPM2Plan, i: int, x: Tensor) -> Tensor:
        return x / plan.in_scale[i]

    def denoised(self, plan: DPM2Plan, i: int, x: Tensor, out: Tensor, state: Tensor | None) -> Tensor:
        return sample_x0(plan.prediction, x, out, plan.seen[i], plan.variance[i], plan.c_out[i])

    def step(
        self, plan: DPM2Plan, i: int, x: Tensor, out: Tensor, state: Tensor | None, draw: Draw
    ) -> tuple[Tensor, Tensor | None]:
        slope = (x - self.denoised(plan, i, x, out, state)) / plan.seen[i]
        if i % 2 == 0:
            return x + slope * plan.dt[i], x
        if state is None:
            raise ConfigError(
                f"{type(self).__name__} can't start at row {i}, the middle of an interval: use an even row"
            )
        return self._arrive(plan, i, state + slope * plan.dt[i], out, draw), None

    def _arrive(self, plan: DPM2Plan, i: int, x: Tensor, out: Tensor, draw: Draw) -> Tensor:
        """``x`` at the end of an interval."""
        return x


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral(DPM2):
    """The options and ``like_diffusers`` are those of :class:`DPM2`. Noise is drawn at the end of every interval but
    the last."""

    def _split(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        to = s.roll(-1)
        to[-1] = 0.0
        up = (to**2 * (s**2 - to**2) / s**2)[:-1]
        up = torch.cat([root(up, self, "sigma_up"), torch.zeros_like(s[:1])])
        down = root(to**2 - up**2, self, "sigma_down")
        middle = s.log().lerp(down.log(), 0.5).exp()[:-1]
        middle[-1] = s[-1]
        lost = (~(middle[:-1] > 0)).nonzero().flatten().tolist()
        check(
            not lost,
            f"DPM2Ancestral: sigma_down rounds to 0 in interval {lost[:3]}, which then has no middle (diffusers: NaN); "
            "use more steps",
        )
        return middle, down[:-1], up[:-1]

    def _arrive(self, plan: DPM2Plan, i: int, x: Tensor, out: Tensor, draw: Draw) -> Tensor:
        return x + draw(out) * plan.sigma_up[i]


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """(2n - 1,): the entries of two (n,) rows by turns, the last of ``second`` left out."""
    return torch.stack([first, second], dim=1).flatten()[:-1]


def timesteps_between(sigmas: Tensor, logs: Tensor) -> Tensor:
    """(n,): the fractional timesteps at which training's log sigmas ``logs`` (T,) are those of ``sigmas`` (n,): as
    ``sigmas.to_timesteps``, but all in float32, as the reference does it for the middles."""
    log_sigma = torch.from_numpy(np.log(sigmas.clamp(min=1e-10).numpy()))
    below = (log_sigma[None] - logs[:, None] >= 0).cumsum(dim=0).argmax(dim=0).clip(max=len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    share = ((low - log_sigma) / (low - high)).clip(0, 1)
    return (1 - share) * below + share * (below + 1)
