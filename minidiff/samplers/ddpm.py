"""DDPM: the training process in reverse, one Gaussian at a time (Ho et al. 2020).

Given x_t and the model's x0, the sample one row further down is Gaussian with a known mean (equation 7):

    mean = (sqrt(alpha_bar_to) * beta * x0  +  sqrt(alpha) * (1 - alpha_bar_to) * x) / (1 - alpha_bar)

with alpha = alpha_bar / alpha_bar_to and beta = 1 - alpha, and a variance that is a choice (section 3.2): the
posterior's own (fixed_small), beta itself (fixed_large), or one that the model learned (Nichol & Dhariwal 2021,
equation 15). A step lands on the next row of the plan, so the method works on any falling subset of the timesteps;
after the last row comes the clean picture, alpha_bar 1.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import unit
from minidiff.samplers.checks import check_no_pure_noise, check_some_noise
from minidiff.samplers.levels import Timesteps, alpha_bar_at
from minidiff.samplers.limits import Limited
from minidiff.samplers.method import Draw, Empty, Given, Levels, Next, Plan
from minidiff.schedule import NoiseSchedule

Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

MIN_VARIANCE = 1e-20  # the last posterior variance is 0, and its logarithm is needed

Row = namedtuple("Row", "x0_coef x_coef std log_small log_large noisy")
"""The mean is ``x0_coef`` * x0 + ``x_coef`` * x; ``std`` scales the noise where the variance is fixed, and
``log_small``, ``log_large`` bound a learned one. ``noisy``: noise is drawn at every timestep but 0."""


@dataclass(frozen=True, kw_only=True)
class DDPM(Timesteps[Row, Empty], Limited[Row, Empty]):
    """DDPM sampler. ``variance``: fixed_small, fixed_large, their _log forms (the same, computed through the
    logarithm), learned, or learned_range. The learned ones need a model with twice the channels, whose second half is
    the variance.
    """

    takes = ("steps", "timesteps")

    steps_offset: int = 0
    variance: Variance = "fixed_small"

    @property
    def reads_variance(self) -> bool:
        return self.variance.startswith("learned")

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at = plan.at(i)
        mean = at.x0_coef * self.denoised(plan, i, x, out, state) + at.x_coef * x
        if not at.noisy:
            return mean, state
        out, learned = self._split(x, out)
        return mean + self._deviation(at, learned) * draw(out), state

    def denoised(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Empty) -> Tensor:
        return super().denoised(plan, i, x, self._split(x, out)[0], state)

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        t, _ = self.visited(schedule, given)
        landing = torch.cat([t[1:], torch.full_like(t[:1], -1)])
        return Levels(t, schedule.alphas_cumprod[t], alpha_bar_at(schedule, landing, True), unit(), landing)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        check_no_pure_noise(self, at, prediction, self.bounds_infinity)
        check_some_noise(self, at)
        beta_bar, beta_bar_to = 1 - at.here, 1 - at.to
        alpha = at.here / at.to
        beta = 1 - alpha
        small = torch.clamp(beta_bar_to / beta_bar * beta, min=MIN_VARIANCE)
        chosen = beta if self.variance.startswith("fixed_large") else small
        return Row(
            x0_coef=(at.to**0.5 * beta) / beta_bar,
            x_coef=alpha**0.5 * beta_bar_to / beta_bar,
            std=torch.exp(0.5 * torch.log(chosen)) if self.variance.endswith("_log") else chosen**0.5,
            log_small=torch.log(small),
            log_large=torch.log(beta),
            noisy=tuple((at.timesteps > 0).tolist()),
        )

    def _split(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction, and the model's variance output if the variance is learned."""
        return split_variance(x, out, f"variance={self.variance!r}") if self.reads_variance else (out, out)

    def _deviation(self, at: Row, learned: Tensor) -> Tensor:
        """Return the standard deviation of a row: a 0-dim entry, or one predicted for every pixel."""
        if self.variance == "learned":
            return learned**0.5
        if self.variance == "learned_range":
            share = (learned + 1) / 2
            return torch.exp(0.5 * (share * at.log_large + (1 - share) * at.log_small))
        std: Tensor = at.std
        return std


def split_variance(x: Tensor, out: Tensor, option: str) -> tuple[Tensor, Tensor]:
    """Split ``out`` (B, 2C, ...) for ``x`` (B, C, ...) into prediction and variance. Raises ConfigError for another
    number of channels, naming the ``option`` that requires them."""
    wanted = 2 * x.shape[1]
    check(out.shape[1] == wanted, f"{option} needs {wanted} output channels, got {out.shape[1]}")
    mean, variance = torch.split(out, x.shape[1], dim=1)
    return mean, variance
