"""DPM++ SDE: the second-order singlestep method with fresh noise (k-diffusion's sample_dpmpp_sde, Katherine Crowson).

Each interval from sigma to sigma_next takes two model calls: one at its start, from which an ancestral step (as Euler
ancestral splits it, but along the exact solution in log sigma) leads to the middle, halfway in log sigma; and one
there, whose x0 takes the place of the first in a step over the whole interval. The noise of both comes from one
Brownian path with sigma as its time: the second step's holds the first's. n steps make 2n - 1 model calls, the last of
which, to sigma 0, is Euler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Draw, check_chosen, check_finite, check_timesteps, need_schedule
from minidiff.samplers.brownian import BrownianTree, Increment, draw_increment
from minidiff.samplers.sigma_plan import SigmaPlan, SpacedSigmas, sample_x0, sigma_rows
from minidiff.samplers.sigmas import Floats
from minidiff.schedule import NoiseSchedule, spaced


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DPMSDEPlan(SigmaPlan):
    """Rows: ``sigma_in``, the noise of the sample that comes in (odd rows are the middles); a step is ``x_coef`` * x -
    ``x0_coef`` * x0 + ``sigma_up`` * noise; ``dt`` is for the last row. ``root_dt`` is what an increment of the path is
    divided by; ``first_part`` and ``second_part`` make the noise of an odd row of two draws. ``root`` and ``path``: the
    seeds, if there is a seed. ``noise_of_ends``: in the middle of an interval a picture gets the noise of its end."""

    sigma_in: Tensor
    x_coef: Tensor
    x0_coef: Tensor
    sigma_up: Tensor
    dt: Tensor
    root_dt: Tensor
    first_part: Tensor
    second_part: Tensor
    root: tuple[int, float] | None
    path: tuple[Increment, ...]
    noise_of_ends: bool = False

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        if self.noise_of_ends:
            return super().add_noise(x0, noise, i)
        return x0 + noise * self.sigma_in[i].to(x0.dtype)

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        to = torch.cat([self.sigma_in[1:], self.sigmas[-1:]])
        own = {
            "sigma": self.sigma_in,
            "to sigma": to,
            "x_coef": self.x_coef,
            "x0_coef": self.x0_coef,
            "sigma_up": self.sigma_up,
        }
        return super().columns() | own


class DPMSDEState(NamedTuple):
    """Inside an interval: the sample at which it began, and the noise drawn there. Between intervals: None."""

    base: Tensor | None = None
    noise: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DPMSDE(SpacedSigmas):
    """The options: those of :class:`SpacedSigmas`; ``s_noise`` multiplies the noise; ``noise_seed``: the path is that
    of this seed, as torchsde draws it, one for the whole batch (None: it is made of the run's own draws).

    ``like_diffusers``: timesteps are float64; timestep T, which 1000 steps with an offset of 1 begin with, is let
    through; and a picture that is put back in the middle of an interval has the noise of its end. diffusers without a
    seed takes one from torch's global generator: those pictures can't be had again there, and not here.
    """

    order: ClassVar[int] = 2

    s_noise: float = 1.0
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.noise_seed is None or self.noise_seed >= 0, f"noise_seed={self.noise_seed} must not be negative")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DPMSDEPlan:
        """2n - 1 rows for n ``steps``, or for n + 1 falling ``sigmas`` (which the reference can't take)."""
        check_chosen(self, "steps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        plan = self.unchecked(need_schedule(schedule, self), steps, sigmas)
        check_finite(self, plan.first_part)
        return plan

    def unchecked(
        self, schedule: NoiseSchedule, steps: int | None, sigmas: Sequence[float] | None = None
    ) -> DPMSDEPlan:
        """The plan, whether its coefficients are finite or not."""
        t, s = self._rows(schedule, steps, sigmas)
        n = len(t)
        sigma, sigma_next = s[0:n:2].repeat_interleave(2)[:n], s[1::2].repeat_interleave(2)[:n]
        now, after = -sigma.log(), -sigma_next.log()
        middle = now + (after - now) * 0.5
        odd = torch.arange(n, device="cpu") % 2 == 1
        sigma_in = torch.where(odd, torch.exp(-middle), sigma)
        start, end = torch.exp(-now), torch.exp(-torch.where(odd, after, middle))
        up = torch.minimum(end, (end**2 * (start**2 - end**2) / start**2) ** 0.5)
        down = -((end**2 - up**2) ** 0.5).log()
        variance = sigma_in**2 + 1
        rows = sigma_rows(t, s, self.spacing, schedule.prediction) | {
            "alpha_bars": 1 / variance,
            "in_scale": variance**0.5,
            "variance": variance,
            "c_out": -sigma_in / variance**0.5,
        }
        length = (end - start).abs()
        first, whole = torch.cat([length[:1], length[:-1]]), length  # of an odd row: of the half before, and its own
        coefs = {"x_coef": torch.exp(-down) / torch.exp(-now), "x0_coef": torch.expm1(now - down), "sigma_up": up}
        rows |= {name: torch.cat([row[:-1], torch.zeros_like(row[-1:])]) for name, row in coefs.items()}
        root, path = self._path(s, start[:-1].tolist(), end[:-1].tolist())
        return DPMSDEPlan(
            **rows,
            sigma_in=sigma_in,
            dt=sigma_next - sigma,
            root_dt=length.sqrt(),
            first_part=(first / whole) ** 0.5,
            second_part=(1 - first / whole).clamp(min=0) ** 0.5,
            root=root,
            path=path,
            noise_of_ends=self.like_diffusers,
        )

    def _rows(
        self, schedule: NoiseSchedule, steps: int | None, sigmas: Sequence[float] | None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps (2n - 1,), the middles among them, and float32 sigmas (2n,), each but the ends twice."""
        table = spacings.sigma_table(schedule, self.last_alpha_bar)
        last = 0.0
        if sigmas is not None:
            given = spacings.given(sigmas).astype(np.float64)
            levels, last = given[:-1], float(given[-1])
            t = spacings.to_timesteps(levels, table)
        else:
            t, levels = self._spaced(steps, table)
        logs = -np.log(levels)
        middles = spacings.to_timesteps(np.exp(-(logs[:-1] + np.diff(logs) * 0.5)), table)
        times = np.empty(2 * len(t) - 1, dtype=np.float64 if self.like_diffusers else np.float32)
        times[0::2], times[1::2] = t, middles
        s = torch.from_numpy(np.concatenate([levels, [last]]).astype(np.float32))
        return torch.from_numpy(times), torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])

    def _spaced(self, steps: int | None, table: Floats) -> tuple[Floats, Floats]:
        """Timesteps and sigmas (n,) of the ends of the intervals."""
        like = self.like_diffusers
        t: Floats = spaced(self.spacing, len(table), steps or 0, self.steps_offset, whole=False, like_diffusers=like)
        check_timesteps(self, t, len(table) + like)
        if self.spacing == "linspace" and (like or len(t) > 1):  # in float64 here, which moves the sigmas' last bits
            t = np.linspace(0, len(table) - 1, len(t), dtype=np.float64)[::-1]
        levels = spacings.at_timesteps(t, table)
        if self.sigma_spacing != "timesteps":
            levels = spacings.CURVES[self.sigma_spacing](float(levels[-1]), float(levels[0]), len(t))
            t = spacings.to_timesteps(levels, table)
        return t, levels

    def _path(
        self, sigmas: Tensor, starts: list[float], ends: list[float]
    ) -> tuple[tuple[int, float] | None, tuple[Increment, ...]]:
        """The seeds of the draws for each row, which walks from a start down to an end."""
        if self.noise_seed is None:
            return None, ()
        positive = sigmas[sigmas > 0]
        tree = BrownianTree(positive.min().item(), positive.max().item(), self.noise_seed)
        return tree.root, tuple(tree.increment(end, start) for start, end in zip(starts, ends, strict=True))

    def start(self) -> DPMSDEState:
        return DPMSDEState()

    def scale_input(self, plan: DPMSDEPlan, i: int, x: Tensor) -> Tensor:
        return x / plan.in_scale[i]

    def denoised(self, plan: DPMSDEPlan, i: int, x: Tensor, out: Tensor, state: DPMSDEState) -> Tensor:
        return sample_x0(plan.prediction, x, out, plan.sigma_in[i], plan.variance[i], plan.c_out[i])

    def step(
        self, plan: DPMSDEPlan, i: int, x: Tensor, out: Tensor, state: DPMSDEState, draw: Draw
    ) -> tuple[Tensor, DPMSDEState]:
        """Everything in the dtype of ``x``."""
        x0 = self.denoised(plan, i, x, out, state)
        if i == len(plan) - 1:  # to sigma 0
            return x + (x - x0) / plan.sigma_in[i] * plan.dt[i], state
        if i % 2 and state.base is None:
            raise ConfigError(f"DPM++ SDE can't start at row {i}, in the middle of an interval: start at an even row")
        base = x if state.base is None else state.base
        noise = self._noise(plan, i, x, state, draw)
        after = plan.x_coef[i] * base - plan.x0_coef[i] * x0
        after = after + noise * self.s_noise * plan.sigma_up[i]
        return after, DPMSDEState() if i % 2 else DPMSDEState(x, noise)

    def _noise(self, plan: DPMSDEPlan, i: int, x: Tensor, state: DPMSDEState, draw: Draw) -> Tensor:
        """Standard normal: the path's increment over the row's step by the root of its length."""
        if plan.root is not None:
            return draw_increment(plan.root, plan.path[i], x) * -1.0 / plan.root_dt[i]
        fresh = draw(x)
        if state.noise is None:
            return fresh
        return plan.first_part[i] * state.noise + plan.second_part[i] * fresh
