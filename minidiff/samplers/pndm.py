"""PNDM: a multistep method on the manifold of noisy pictures (Liu et al. 2022).

The transfer of equation 9 carries a sample from any timestep to any other along a constant epsilon; it is DDIM's step
with eta 0, written so that no x0 appears. What is to be found is a good epsilon for the whole interval:

* PLMS (what Stable Diffusion ships) combines the latest four epsilons with the weights of Adams and Bashforth. The
  first interval has no history, so it is walked twice: once with its own epsilon, then again from the same start with
  the mean of that and the epsilon found at its end. This is why the second timestep is there twice (981, 961, 961,
  941, ...), and n steps make n + 1 model calls.
* With ``runge_kutta`` the first three intervals are walked by the classical four-stage Runge-Kutta method instead
  (equation 12), two of the stages half-way: 12 calls, after which there is history enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.errors import ConfigError
from minidiff.samplers.base import (
    Draw,
    Options,
    Plan,
    check_chosen,
    check_no_pure_noise,
    check_some_noise,
    check_timesteps,
    need_schedule,
    unit,
    whole,
)
from minidiff.samplers.ddim import alpha_bar_at
from minidiff.schedule import NoiseSchedule, Spacing, epsilon_from_v, spaced, to_x0

WARM_UP = 12  # rows of the Runge-Kutta warm-up: four calls for each of three intervals


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PNDMPlan(Plan):
    """Rows: alpha_bar where an ordinary step lands (``down``), where a Runge-Kutta stage that goes half-way lands
    (``half``), and one interval above (``up``: where the walk that a repeated first row does again begins); ``prev``
    is the timestep of ``down``, negative past the end. ``warm_up`` counts the Runge-Kutta rows."""

    prev: Tensor
    down: Tensor
    half: Tensor
    up: Tensor
    warm_up: int

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        start, end = self.alpha_bars.clone(), self.down.clone()
        call = [f"RK {i % 4 + 1} of 4" if i < self.warm_up else "multistep" for i in range(len(self))]
        for i in range(self.warm_up):
            start[i] = self.alpha_bars[i // 4 * 4]
            end[i] = self.alpha_bars[i] if i % 2 else self.half[i]
        if not self.warm_up:
            call[0] = "first"
            if len(self) > 1:
                call[1], start[1], end[1] = "first again", self.up[1], self.alpha_bars[1]
        x_coef, numerator, denominator = coefficients(start, end)
        return super().columns() | {
            "call": call,
            "to alpha_bar": end,
            "x_coef": x_coef,
            "epsilon_coef": -numerator / denominator,
        }


class PNDMState(NamedTuple):
    """``calls`` made so far; the epsilons (raw outputs) kept, oldest ``first``; ``base``, the sample at which the
    interval began; ``total``, the running sum of a Runge-Kutta interval."""

    calls: int = 0
    history: tuple[Tensor, ...] = ()
    base: Tensor | None = None
    total: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PNDM(Options):
    """``runge_kutta``: warm up with Runge-Kutta (needs 4 steps or more). ``set_alpha_to_one`` as in DDIM.

    ``like_diffusers``: a step lands T // steps below its timestep (and a half-way stage half of that), where
    trailing and linspace spacing put the next row elsewhere; and what a call does depends on how many were made, so
    that a run started in the middle (image to image) takes its second row for the repeated one.
    """

    spacing: Spacing = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    runge_kutta: bool = False

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> PNDMPlan:
        """``steps`` in 1..T, or 4..T with Runge-Kutta, or as many falling whole ``timesteps`` (which the reference
        can't take); the model predicts epsilon or v."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "timesteps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        known = schedule.prediction != "sample"
        check(known, "PNDM combines epsilons: prediction='sample' is not possible, use ddim or euler")
        total = len(schedule)
        grid = torch.from_numpy(
            spaced(self.spacing, total, steps or 0, self.steps_offset, like_diffusers=self.like_diffusers)
            if timesteps is None
            else whole(self, timesteps)
        )
        check_timesteps(self, grid, total)
        n = steps or len(grid)
        check(n >= 4 or not self.runge_kutta, f"steps={n}: PNDM's Runge-Kutta warm-up needs at least 4")

        ratio = total // n
        if self.runge_kutta:
            t = torch.cat([self._warm_up_rows(grid, ratio), grid[3:]])
        else:
            t = torch.cat([grid[:2], grid[1:]])
        if self.like_diffusers:
            prev, half, up = t - ratio, t - ratio // 2, (t + ratio).clamp(max=total - 1)
        else:
            prev = half = torch.cat([t[1:], (t[-1:] - ratio).clamp(max=-1)])
            up = torch.cat([t[:1], t[:-1]])
        alpha_bar = schedule.alphas_cumprod[t]
        check_no_pure_noise(self, t, alpha_bar, "epsilon")
        check_some_noise(self, t, alpha_bar)
        return PNDMPlan(
            timesteps=t,
            alpha_bars=alpha_bar,
            init_noise_sigma=unit(),
            prediction=schedule.prediction,
            prev=prev,
            down=alpha_bar_at(schedule, prev, self.set_alpha_to_one),
            half=alpha_bar_at(schedule, half, self.set_alpha_to_one),
            up=schedule.alphas_cumprod[up],
            warm_up=WARM_UP if self.runge_kutta else 0,
        )

    def _warm_up_rows(self, grid: Tensor, ratio: int) -> Tensor:
        """(12,) the timesteps of three Runge-Kutta intervals: upper end, middle twice, lower end."""
        upper, lower = grid[:3], grid[1:4]
        middle = lower + (ratio // 2 if self.like_diffusers else (upper - lower) // 2)
        return torch.stack([upper, middle, middle, lower], dim=1).flatten()

    def start(self) -> PNDMState:
        return PNDMState()

    def scale_input(self, plan: PNDMPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: PNDMPlan, i: int, x: Tensor, out: Tensor, state: PNDMState) -> Tensor:
        alpha_bar = plan.alpha_bars[i]
        return to_x0(plan.prediction, x, out, alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    def step(
        self, plan: PNDMPlan, i: int, x: Tensor, out: Tensor, state: PNDMState, draw: Draw
    ) -> tuple[Tensor, PNDMState]:
        at = state.calls if self.like_diffusers else i
        if at < plan.warm_up:
            return self._runge_kutta(plan, i, at, x, out, state)
        again = state.calls == 1 and plan.warm_up == 0 and (self.like_diffusers or i == 1)
        if again:
            assert state.base is not None
            epsilon = (out + state.history[-1]) / 2
            x = transfer(state.base, epsilon, plan.up[i], plan.alpha_bars[i], plan.prediction)
            return x, PNDMState(2, state.history)
        history = (*state.history[-3:], out)
        prev = transfer(x, adams_bashforth(history), plan.alpha_bars[i], plan.down[i], plan.prediction)
        return prev, PNDMState(state.calls + 1, history, base=x if state.calls == 0 else None)

    def _runge_kutta(
        self, plan: PNDMPlan, i: int, at: int, x: Tensor, out: Tensor, state: PNDMState
    ) -> tuple[Tensor, PNDMState]:
        """Stage ``at % 4`` of interval ``at // 4``: every stage starts at the interval's first sample."""
        stage, history, base, total = at % 4, state.history, state.base, state.total
        if stage == 0:
            history, base, epsilon = (*history, out), x, out
            total = 1 / 6 * out
        elif base is None or total is None:
            raise ConfigError(
                f"PNDM can't start at row {i}, inside a Runge-Kutta interval: start at 0, 4, 8 or from 12"
            )
        else:
            epsilon = out if stage < 3 else total + 1 / 6 * out
            total = total + 1 / 3 * out if stage < 3 else None
        end = plan.alpha_bars[i] if at % 2 else plan.half[i]
        prev = transfer(base, epsilon, plan.alpha_bars[at // 4 * 4], end, plan.prediction)
        return prev, PNDMState(state.calls + 1, history, base, total)


def adams_bashforth(history: tuple[Tensor, ...]) -> Tensor:
    """The epsilon for the coming interval, from up to four epsilons, oldest first (Liu 2022, equation 11 and 13)."""
    if len(history) == 1:
        return history[0]
    if len(history) == 2:
        return (3 * history[-1] - history[-2]) / 2
    if len(history) == 3:
        return (23 * history[-1] - 16 * history[-2] + 5 * history[-3]) / 12
    return (1 / 24) * (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4])


def coefficients(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of equation 9, from alpha_bar ``start`` to ``end``: x_coef, and numerator and denominator of epsilon's."""
    x_coef = (end / start) ** 0.5
    denominator = start * (1 - end) ** 0.5 + (start * (1 - start) * end) ** 0.5
    return x_coef, end - start, denominator


def transfer(x: Tensor, out: Tensor, start: Tensor, end: Tensor, prediction: Prediction) -> Tensor:
    """``x`` at alpha_bar ``start`` carried to alpha_bar ``end`` along the model output ``out`` (equation 9)."""
    if prediction == "v_prediction":
        out = epsilon_from_v(x, out, start**0.5, (1 - start) ** 0.5)
    x_coef, numerator, denominator = coefficients(start, end)
    return x_coef * x - numerator * out / denominator
