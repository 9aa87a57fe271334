"""TCD: like LCM, but each step lands somewhere on the path instead of at its end (Zheng et al. 2024, "Trajectory
Consistency Distillation", algorithm 4, strategic stochastic sampling).

From timestep t, on the way to the next one p, the model's x0 and epsilon are put together at s = (1 - eta) p, which is
less noisy than p; fresh noise then leads from s back up to p:

    x_s = sqrt(alpha_bar_s) * x0 + sqrt(1 - alpha_bar_s) * epsilon
    x_p = sqrt(alpha_bar_p / alpha_bar_s) * x_s + sqrt(1 - alpha_bar_p / alpha_bar_s) * fresh noise

eta 0 is DDIM along the distilled timesteps; eta 1 goes to timestep 0 and back each time, as LCM does. The last step
lands on timestep 0 and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Draw, Options, Plan, check_chosen, check_no_pure_noise, need_schedule, unit
from minidiff.samplers.distilled import check_distilled, visited
from minidiff.schedule import NoiseSchedule, to_epsilon, to_x0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TCDPlan(Plan):
    """Rows: the roots ``signal`` and ``noise`` of alpha_bar and 1 - alpha_bar; ``middle``, the timestep s, and its
    roots ``signal_middle`` and ``noise_middle``; ``keep`` and ``fresh``, what x_s and fresh noise are multiplied by on
    the way up, and ``noisy``, whether there is any: not in the last row, nor with eta 0."""

    signal: Tensor
    noise: Tensor
    middle: Tensor
    signal_middle: Tensor
    noise_middle: Tensor
    keep: Tensor
    fresh: Tensor
    noisy: tuple[bool, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        own = {name: getattr(self, name) for name in ("middle", "signal_middle", "noise_middle", "keep", "fresh")}
        return super().columns() | own


@dataclass(frozen=True, kw_only=True)
class TCD(Options):
    """The options.

    ``eta``: how much fresh noise, 0 to 1 (the paper's gamma). ``original_steps``: at how many evenly spaced timesteps
    the model was distilled; None: at all of training's. ``strength``: only the lower part of them is visited, for
    image to image. Like the reference, TCD does not limit x0, whatever clip_sample and thresholding say in its config.

    ``like_diffusers``: where strength cuts off given timesteps, the last step draws noise too, which counts for
    nothing.
    """

    eta: float = 0.3
    original_steps: int | None = 50
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.eta <= 1, f"eta={self.eta} must lie in 0..1")
        check_distilled(self, self.original_steps, self.strength)

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> TCDPlan:
        """``steps`` in 1..original_steps * strength, or ``timesteps``: whole numbers that fall strictly."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, goes_on = visited(self, len(schedule), steps, timesteps, self.original_steps, self.strength)
        prev = torch.cat([t[1:], torch.zeros_like(t[:1])])
        middle = torch.floor((1 - self.eta) * prev).to(torch.int64)
        alpha_bar, at_prev, at_middle = (schedule.alphas_cumprod[rows] for rows in (t, prev, middle))
        check_no_pure_noise(self, t, alpha_bar, schedule.prediction)
        return TCDPlan(
            timesteps=t,
            alpha_bars=alpha_bar,
            init_noise_sigma=unit(),
            prediction=schedule.prediction,
            signal=alpha_bar**0.5,
            noise=(1 - alpha_bar) ** 0.5,
            middle=middle,
            signal_middle=at_middle.sqrt(),
            noise_middle=(1 - at_middle).sqrt(),
            keep=(at_prev / at_middle).sqrt(),
            fresh=(1 - at_prev / at_middle).sqrt(),
            noisy=(*(self.eta > 0 for _ in t[1:]), self.eta > 0 and goes_on),
        )

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: TCDPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: TCDPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        return to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i])

    def step(
        self, plan: TCDPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x0 = self.denoised(plan, i, x, out, state)
        epsilon = to_epsilon(plan.prediction, x, out, plan.signal[i], plan.noise[i])
        landed = plan.signal_middle[i] * x0 + plan.noise_middle[i] * epsilon
        if not plan.noisy[i]:
            return landed, state
        return plan.keep[i] * landed + plan.fresh[i] * draw(landed), state
