"""PNDM: a multistep method on the manifold of noisy pictures (Liu et al. 2022).

The transfer carries a sample from alpha_bar a to any other, b, along a constant epsilon (equation 9):

    x_b = sqrt(b / a) * x_a  -  (b - a) / (a * sqrt(1 - b) + sqrt(a * (1 - a) * b)) * epsilon

It is DDIM's step with eta 0, written without x0. The method has to find a good epsilon for the whole interval:

* PLMS (the default of Stable Diffusion) combines the latest four epsilons with the Adams-Bashforth weights. The first
  interval has no history, so it is done twice: once with its own epsilon, then again from the same start with the mean
  of that and the epsilon at its end. For this reason the second timestep occurs twice, and n steps make n + 1 model
  calls:

      981 --> 961            with the epsilon of 981
      981 ---------> 961     again, with the mean of those of 981 and 961
                     961 --> 941 --> 921 ...

* With ``runge_kutta`` the first three intervals use the classical four-stage Runge-Kutta method instead (equation 12),
  with two of the stages half-way: 12 calls, after which there is enough history.

iPNDM is PNDM without the repeated interval, for models with the "crash" schedule (Dance Diffusion): its first steps
have less history and a lower order ("improved PNDM", Zhang & Chen 2023, section 3.4).
"""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.errors import ConfigError
from minidiff.samplers.arithmetic import unit
from minidiff.samplers.checks import check_no_pure_noise, check_some_noise
from minidiff.samplers.levels import Timesteps, alpha_bar_at
from minidiff.samplers.method import Draw, Given, Levels, Method, Next, Outputs, Plan
from minidiff.schedule import NoiseSchedule, check_steps, epsilon_from_v, x0_from_v

WARM_UP = 12  # rows of the Runge-Kutta warm-up: four calls for each of three intervals
MAX_STEPS = 1000
SMALLEST_SIGNAL = 1e-8  # iPNDM's first row is pure noise, where x0 would be 0 / 0

Row = namedtuple("Row", "call half up x_coef epsilon_coef")
"""``call``: the kind of the row. ``half``: alpha_bar at which a half-way Runge-Kutta stage lands. ``up``: alpha_bar one
interval above, from which a repeated first row starts again. ``x_coef`` and ``epsilon_coef``: what a run from the top
multiplies x and the combined epsilon by."""


class State(NamedTuple):
    """``calls`` made so far; the epsilons (raw outputs) kept, oldest first; ``base``: the sample at the start of the
    interval; ``total``: the running sum of a Runge-Kutta interval."""

    calls: int = 0
    history: tuple[Tensor, ...] = ()
    base: Tensor | None = None
    total: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PNDM(Timesteps[Row, State]):
    """PNDM sampler. ``runge_kutta``: warm up with Runge-Kutta (needs 4 steps or more). ``set_alpha_to_one``: as in
    DDIM. The model predicts epsilon or v.

    ``like_diffusers``: the action of a call depends on the number of calls so far, so that a run that starts in the
    middle (img2img) takes its second row for the repeated one.
    """

    initial = State()
    takes_more = ("timesteps",)

    set_alpha_to_one: bool = False
    runge_kutta: bool = False

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: State, draw: Draw) -> Next[State]:
        here, to = plan.levels.here[i], plan.levels.to[i]
        call = state.calls if self.like_diffusers else i
        if self.runge_kutta and call < WARM_UP:
            return self._runge_kutta(plan, i, call, x, out, state)
        if call == state.calls == 1 and state.base is not None:  # again, from the same start
            epsilon = (out + state.history[-1]) / 2
            return transfer(state.base, epsilon, plan.at(i).up, here, plan.prediction), State(2, state.history)
        history = (*state.history[-3:], out)
        after = transfer(x, adams_bashforth(history), here, to, plan.prediction)
        return after, State(state.calls + 1, history, base=x if state.calls == 0 else None)

    def _runge_kutta(self, plan: Plan[Row], i: int, call: int, x: Tensor, out: Tensor, state: State) -> Next[State]:
        """Do stage ``call % 4`` of interval ``call // 4``. Every stage starts at the interval's first sample."""
        stage, history, base, total = call % 4, state.history, state.base, state.total
        if stage == 0:
            history, base, epsilon = (*history, out), x, out
            total = 1 / 6 * out
        elif base is None or total is None:
            where = "inside a Runge-Kutta interval: start at 0, 4, 8 or from 12"
            raise ConfigError(f"PNDM can't start at row {i}, {where}")
        else:
            epsilon = out if stage < 3 else total + 1 / 6 * out
            total = total + 1 / 3 * out if stage < 3 else None
        here = plan.levels.here
        end = here[i] if call % 2 else plan.at(i).half
        after = transfer(base, epsilon, here[call // 4 * 4], end, plan.prediction)
        return after, State(state.calls + 1, history, base, total)

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        grid, apart = self.visited(schedule, given)
        n = given.steps or len(grid)
        check(n >= 4 or not self.runge_kutta, f"steps={n}: PNDM's Runge-Kutta warm-up needs at least 4")
        if self.runge_kutta:  # three intervals of four rows: upper end, middle twice, lower end
            middle = self.grid.middle(grid[:4], apart)
            t = torch.cat([torch.stack([grid[:3], middle, middle, grid[1:4]], dim=1).flatten(), grid[3:]])
        else:
            t = torch.cat([grid[:2], grid[1:]])
        landing, halfway = self.grid.landing(t, apart), self.grid.halfway(t, apart)
        down, half = (alpha_bar_at(schedule, end, self.set_alpha_to_one) for end in (landing, halfway))
        beside = {"half": half, "up": schedule.alphas_cumprod[self.grid.above(t, apart, len(schedule))]}
        return Levels(t, schedule.alphas_cumprod[t], down, unit(), landing, beside=beside)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        check(prediction != "sample", "PNDM combines epsilons: prediction='sample' is not possible, use ddim or euler")
        check_no_pure_noise(self, at, "epsilon")
        check_some_noise(self, at)
        stages = [f"RK {k + 1} of 4" for k in (0, 1, 2, 3) * 3] if self.runge_kutta else ["first", "first again"]
        stages += ["multistep"] * len(at.here)
        half, up, start, end = at.beside["half"], at.beside["up"], at.here.clone(), at.to.clone()
        if self.runge_kutta:
            start[:WARM_UP] = at.here[0:WARM_UP:4].repeat_interleave(4)
            end[:WARM_UP:2], end[1:WARM_UP:2] = half[:WARM_UP:2], at.here[1:WARM_UP:2]
        elif len(start) > 1:
            start[1], end[1] = up[1], at.here[1]
        x_coef, numerator, denominator = coefficients(start, end)
        return Row(tuple(stages[: len(start)]), half, up, x_coef, -numerator / denominator)


def adams_bashforth(history: tuple[Tensor, ...]) -> Tensor:
    """Return epsilon for the next interval from up to four epsilons, oldest first (Liu 2022, equations 11 and 13)."""
    if len(history) == 1:
        return history[0]
    if len(history) == 2:
        return (3 * history[-1] - history[-2]) / 2
    if len(history) == 3:
        return (23 * history[-1] - 16 * history[-2] + 5 * history[-3]) / 12
    return (1 / 24) * (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4])


def transfer(x: Tensor, out: Tensor, start: Tensor, end: Tensor, prediction: Prediction) -> Tensor:
    """Transfer ``x`` from alpha_bar ``start`` to alpha_bar ``end`` along the model output ``out`` (equation 9)."""
    if prediction == "v_prediction":
        out = epsilon_from_v(x, out, start**0.5, (1 - start) ** 0.5)
    x_coef, numerator, denominator = coefficients(start, end)
    return x_coef * x - numerator * out / denominator


def coefficients(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what equation 9 multiplies x by, and the numerator and denominator of what it multiplies epsilon by."""
    denominator = start * (1 - end) ** 0.5 + (start * (1 - start) * end) ** 0.5
    return (end / start) ** 0.5, end - start, denominator


Crash = namedtuple("Crash", "told_signal told_noise to_signal to_noise divisor")
"""``told_signal`` and ``told_noise``: the rates at each row; ``to_signal`` and ``to_noise``: the rates where its step
lands; ``divisor``: the signal, if it is not 0."""


@dataclass(frozen=True, kw_only=True)
class IPNDM(Method[Crash, Outputs]):
    """iPNDM sampler. Time t runs from 1 to 0, with

        noise = sin(pi t / 2)**2      signal = sqrt(1 - noise**2)      time input: 2 / pi * atan2(noise, signal)

    so no training schedule is used. Each step converts v to epsilon, combines the latest four with the Adams-Bashforth
    weights, and follows the result to the next time. There are no options: the model output is taken as v, whatever the
    schedule says, and ``like_diffusers`` changes nothing. The state is the epsilons so far, oldest first, three of them
    at most.
    """

    own_levels = True
    predicts = "v_prediction"

    def step(self, plan: Plan[Crash], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw) -> Next[Outputs]:
        at = plan.at(i)
        history = (*state, x * at.told_noise + out * at.told_signal)
        epsilon = adams_bashforth(history)
        x0 = (x - at.told_noise * epsilon) / at.divisor
        return at.to_signal * x0 + epsilon * at.to_noise, history[-3:]

    def denoised(self, plan: Plan[Crash], i: int, x: Tensor, out: Tensor, state: Outputs) -> Tensor:
        return x0_from_v(x, out, plan.at(i).told_signal, plan.at(i).told_noise)

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        n = check_steps(given.steps, MAX_STEPS)
        time = torch.linspace(1, 0, n + 1, dtype=torch.float32, device="cpu")
        noise = torch.sin(time * math.pi / 2) ** 2
        signal = (1.0 - noise**2) ** 0.5
        told, beside = torch.atan2(noise, signal) / math.pi * 2, {"signal": signal, "noise": noise}
        return Levels(told[:-1], signal[:-1] ** 2, signal[1:] ** 2, unit(), beside=beside)

    def rows(self, at: Levels, prediction: Prediction) -> Crash:
        signal, noise = at.beside["signal"], at.beside["noise"]
        divisor = signal[:-1].clamp(min=SMALLEST_SIGNAL)
        return Crash(signal[:-1], noise[:-1], signal[1:], noise[1:], divisor)
