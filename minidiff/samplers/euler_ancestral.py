"""Euler ancestral: a straight step down, then fresh noise back up to the next sigma (k-diffusion's sample_euler_a).

A step from sigma to sigma_next is split so that the variance comes out right:

    sigma_up**2   = sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2      fresh noise
    sigma_down**2 = sigma_next**2 - sigma_up**2                                where the straight step lands

which is DDPM's step written in sigma. Noise is drawn at every step, the last too, where it counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Draw, Options, check_chosen, check_timesteps, need_schedule, root
from minidiff.samplers.sigma_plan import SigmaPlan, sigma_rows, sigma_x0, upcast, widen
from minidiff.schedule import NoiseSchedule, Spacing, spaced


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EulerAncestralPlan(SigmaPlan):
    """Rows: ``dt``, from sigma to sigma_down; ``sigma_up``, what the fresh noise is multiplied by."""

    dt: Tensor
    sigma_up: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        return super().columns() | {"dt": self.dt, "sigma_up": self.sigma_up}


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Options):
    """The options. ``last_alpha_bar`` replaces the 0 at the end of a zero-SNR schedule, where sigma is infinite.

    ``like_diffusers``: timestep T, which 1000 steps with an offset of 1 begin with, is let through.
    """

    in_sigma: ClassVar[bool] = True

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    last_alpha_bar: float = 2**-24

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.last_alpha_bar < 1, f"last_alpha_bar={self.last_alpha_bar} must lie between 0 and 1")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> EulerAncestralPlan:
        """``steps`` in 1..T, or falling ``sigmas``, one more than steps (which the reference can't take)."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        table = spacings.sigma_table(schedule, self.last_alpha_bar)
        if sigmas is None:
            like, offset = self.like_diffusers, self.steps_offset
            t = spaced(self.spacing, len(table), steps or 0, offset, whole=False, like_diffusers=like)
            check_timesteps(self, t, len(table) + like)
            levels = np.concatenate([spacings.at_timesteps(t, table), [0.0]]).astype(np.float32)
        else:
            levels = spacings.given(sigmas)
            t = spacings.to_timesteps(levels[:-1], table).astype(np.float32)
        s = torch.from_numpy(levels)
        sigma, to = s[:-1], s[1:]
        up = root(to**2 * (sigma**2 - to**2) / sigma**2, self, "sigma_up")
        down = root(to**2 - up**2, self, "sigma_down")
        rows = sigma_rows(torch.from_numpy(t), s, self.spacing, schedule.prediction)
        return EulerAncestralPlan(**rows, dt=down - sigma, sigma_up=up)

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: EulerAncestralPlan, i: int, x: Tensor) -> Tensor:
        return x / plan.in_scale[i]

    def denoised(self, plan: EulerAncestralPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        return sigma_x0(plan, i, upcast(x), out, plan.sigmas[i])

    def step(
        self, plan: EulerAncestralPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x0 = self.denoised(plan, i, x, out, state)
        x = upcast(x)
        x = x + ((x - widen(x0)) / plan.sigmas[i]) * plan.dt[i]
        return (x + widen(draw(out) * plan.sigma_up[i])).to(out.dtype), state
