"""LCM: a distilled model that sees the whole way to the picture in one call (Luo et al. 2023, "Latent Consistency
Models"; the multistep sampling is algorithm 1 of Song et al. 2023).

The consistency function is the model's x0, mixed with the sample so that nothing changes at timestep 0:

    f(x, t) = c_out * x0 + c_skip * x        c_skip = s**2 / ((10 t)**2 + s**2),  c_out = 10 t / sqrt((10 t)**2 + s**2)

with s = 0.5. More steps than one are taken by adding fresh noise to f, as much as the next timestep has, and asking
again. The model was distilled at ``original_steps`` timesteps only, so the run visits some of those: there can't be
more steps than that, 50 for the published models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.samplers.base import Draw, check_chosen, check_no_pure_noise, need_schedule, unit
from minidiff.samplers.distilled import check_distilled, visited
from minidiff.samplers.limits import LimitedOptions, LimitedPlan, from_noise
from minidiff.schedule import NoiseSchedule

SIGMA_DATA = 0.5


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LCMPlan(LimitedPlan):
    """Rows: ``c_out`` and ``c_skip`` of the consistency function; ``signal_next`` and ``noise_next``, with which it is
    made noisy again where ``noisy`` says so: not after the last row, where they are 1 and 0."""

    c_out: Tensor
    c_skip: Tensor
    signal_next: Tensor
    noise_next: Tensor
    noisy: tuple[bool, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        own = {name: getattr(self, name) for name in ("c_out", "c_skip", "signal_next", "noise_next")}
        return super().columns() | own


@dataclass(frozen=True, kw_only=True)
class LCM(LimitedOptions):
    """The options.

    ``original_steps``: at how many evenly spaced timesteps the model was distilled. ``strength``: only the lower part
    of them is visited, for image to image. ``timestep_scaling``: the 10 above.

    ``like_diffusers``: where strength cuts off given timesteps, the last step is not known as such, and makes the
    picture as noisy again as it was.
    """

    original_steps: int = 50
    strength: float = 1.0
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distilled(self, self.original_steps, self.strength)

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> LCMPlan:
        """``steps`` in 1..original_steps * strength, or ``timesteps``: whole numbers that fall strictly."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, goes_on = visited(self, len(schedule), steps, timesteps, self.original_steps, self.strength)
        alpha_bar = schedule.alphas_cumprod[t]
        check_no_pure_noise(self, t, alpha_bar, schedule.prediction, self.bounds_infinity)
        following = torch.cat([alpha_bar[1:], alpha_bar[-1:] if goes_on else unit()[None]])
        scaled = t * self.timestep_scaling
        return LCMPlan(
            timesteps=t,
            alpha_bars=alpha_bar,
            init_noise_sigma=unit(),
            prediction=schedule.prediction,
            signal=alpha_bar.sqrt(),
            noise=(1 - alpha_bar).sqrt(),
            from_noise=from_noise(alpha_bar, schedule.prediction),
            c_out=scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5,
            c_skip=SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2),
            signal_next=following.sqrt(),
            noise_next=(1 - following).sqrt(),
            noisy=(*(True for _ in t[1:]), goes_on),
        )

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: LCMPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: LCMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        """The consistency function: the model's x0, limited, and mixed with ``x``."""
        x0 = self.x0(plan, i, x, out)
        return plan.c_out[i] * x0 + plan.c_skip[i] * x

    def step(
        self, plan: LCMPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x0 = self.denoised(plan, i, x, out, state)
        if not plan.noisy[i]:
            return x0, state
        return plan.signal_next[i] * x0 + plan.noise_next[i] * draw(x0), state
