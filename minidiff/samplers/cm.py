"""CM: consistency models, which see the whole way to the picture in one call (Song et al. 2023, algorithm 1).

Such a model lives in sigma, like EDM's (edm.py), and is wrapped so that nothing changes at sigma_min; s = sigma_data:

    seen = x / sqrt(sigma**2 + s**2)       f(x, sigma) = c_out * out + c_skip * x
    c_skip = s**2 / ((sigma - sigma_min)**2 + s**2)      c_out = (sigma - sigma_min) * s / sqrt(sigma**2 + s**2)

One step is f itself. More steps make f noisy again, up to the next sigma, and ask again. The model was trained at
``train_steps`` sigmas, spaced as in Karras et al. 2022, and a run visits some of them; it is told 250 * log(sigma).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Draw, check_chosen, check_timesteps, root, whole
from minidiff.samplers.limits import LimitedOptions
from minidiff.samplers.sigma_plan import SigmaPlan
from minidiff.samplers.sigmas import Floats
from minidiff.schedule import NoiseSchedule, check_steps


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CMPlan(SigmaPlan):
    """``timesteps`` are float64, as the reference has them. Rows: ``c_skip`` and (from the base) ``c_out``, as above;
    ``fresh``, what the noise of the way up is multiplied by. One row alone draws no noise."""

    c_skip: Tensor
    fresh: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        return super().columns() | {"c_skip": self.c_skip, "c_out": self.c_out, "fresh": self.fresh}


@dataclass(frozen=True, kw_only=True)
class CM(LimitedOptions):
    """The options.

    ``train_steps``: at how many sigmas, from ``sigma_max`` to ``sigma_min``, the model was trained, evenly spaced in
    sigma**(1/rho). ``s_noise`` scales the fresh noise. ``clip`` is 1 unless told otherwise: these models make pixels.

    ``like_diffusers`` refuses the values of sigma_min where rounding makes the last step NaN, and begins with noise
    times sigma_max, also where given timesteps begin lower.
    """

    in_sigma: ClassVar[bool] = True
    own_levels: ClassVar[bool] = True

    train_steps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    s_noise: float = 1.0
    rho: float = 7.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        falls = 0 < self.sigma_min < self.sigma_max
        check(falls, f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must rise from above 0")
        check(self.sigma_data > 0, f"sigma_data={self.sigma_data} must be positive")
        check(self.rho > 0, f"rho={self.rho} must be positive")
        check(self.train_steps >= 2, f"train_steps={self.train_steps} must be 2 or more")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> CMPlan:
        """``steps`` in 1..train_steps, or ``timesteps``: whole numbers that fall strictly, below train_steps; the
        sigmas of training are numbered from the top, so that 0 is sigma_max. ``schedule`` plays no part."""
        check_chosen(self, "steps timesteps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        s = self._visited(steps, timesteps)
        levels = torch.from_numpy(np.concatenate([s, [self.sigma_min]]).astype(np.float32))
        starts_lower = timesteps is not None and not self.like_diffusers
        return self._plan_of(s, levels, levels[0].item() if starts_lower else self.sigma_max)

    def every_level(self) -> CMPlan:
        """A row for every sigma of training, in float64 as the reference has them before it is told a number of steps;
        the last step lands on the last sigma."""
        s = self._karras(np.linspace(0, 1, self.train_steps))
        levels = torch.from_numpy(s)
        return self._plan_of(s, torch.cat([levels, levels[-1:]]), self.sigma_max)

    def _plan_of(self, s: Floats, levels: Tensor, highest: float) -> CMPlan:
        """The plan for sigmas ``s`` (n,) in float64; ``levels`` (n + 1,), those that are reckoned with and where the
        last step lands; the first noise is times ``highest``."""
        sigma, above = levels[:-1], levels[:-1] - self.sigma_min
        variance = sigma**2 + self.sigma_data**2
        next_sigma = levels[1:].clamp(min=self.sigma_min, max=self.sigma_max)
        return CMPlan(
            timesteps=torch.from_numpy(1000 * 0.25 * np.log(s + 1e-44)),
            alpha_bars=1 / (sigma**2 + 1),
            init_noise_sigma=torch.tensor(highest, dtype=torch.float32, device="cpu"),
            prediction="epsilon",
            sigmas=levels,
            in_scale=variance**0.5,
            variance=sigma**2 + 1,
            c_skip=self.sigma_data**2 / (above**2 + self.sigma_data**2),
            c_out=above * self.sigma_data / variance**0.5,
            fresh=root(next_sigma**2 - self.sigma_min**2, self, "what fresh noise is multiplied by"),
        )

    def _visited(self, steps: int | None, timesteps: Sequence[float] | None) -> Floats:
        """(n,) float64, falling."""
        total = self.train_steps
        if timesteps is None:
            rows = np.arange(check_steps(steps, total)) * (total // check_steps(steps, total))
        else:
            check_timesteps(self, timesteps, total)
            rows = whole(self, timesteps, lowest=0)[::-1]
        return self._karras(rows / (total - 1))

    def _karras(self, places: Floats) -> Floats:
        """(n,) float64: the sigmas at ``places`` between sigma_max (0) and sigma_min (1)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas: Floats = (high + places * (low - high)) ** self.rho
        return sigmas

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: CMPlan, i: int, x: Tensor) -> Tensor:
        return x / plan.in_scale[i]

    def denoised(self, plan: CMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        """The consistency function, limited."""
        return self.limit(plan.c_out[i] * out + plan.c_skip[i] * x)

    def step(
        self, plan: CMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x0 = self.denoised(plan, i, x, out, state)
        noise = draw(out) if len(plan) > 1 else torch.zeros_like(out)
        return x0 + (noise * self.s_noise) * plan.fresh[i], state
