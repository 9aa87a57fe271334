"""DDIM: the marginals of DDPM, along a path that needs no fresh noise (Song et al. 2021).

The next sample is composed of the model's x0 and epsilon (equation 12):

    x_to = sqrt(alpha_bar_to) * x0  +  sqrt(1 - alpha_bar_to - std**2) * epsilon  +  std * fresh noise

with std = eta * sqrt((1 - alpha_bar_to) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_to)) (equation 16). eta 0 is
deterministic, and eta 1 is DDPM.

After the last row there is no timestep to land on. Other programs list a negative one (-19 after 1 with 50 steps, one
interval below). It means "past the end", where alpha_bar is 1 (``set_alpha_to_one``) or that of timestep 0, as Stable
Diffusion is configured.

Without noise the path can be followed in both directions (section 5.4). The inverse leads from a picture to the noise
from which DDIM would generate it, the starting point of editing by inversion.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import unit
from minidiff.samplers.checks import check_no_pure_noise, root
from minidiff.samplers.levels import Timesteps, alpha_bar_at
from minidiff.samplers.limits import Clipped, Limited
from minidiff.samplers.method import Draw, Empty, Given, Levels, Next, Plan
from minidiff.samplers.options import NotNegative
from minidiff.schedule import NoiseSchedule, epsilon_from_x0

Row = namedtuple("Row", "x0_coef direction std")
"""A step is ``x0_coef`` * x0 + ``direction`` * epsilon + ``std`` * fresh noise."""


@dataclass(frozen=True, kw_only=True)
class DDIM(Timesteps[Row, Empty], Limited[Row, Empty]):
    """DDIM sampler. ``eta``: amount of fresh noise, 0 (none) to 1 (as DDPM). ``use_clipped``: derive epsilon again from
    the limited x0, as GLIDE does. ``set_alpha_to_one``: alpha_bar after the last row is 1 instead of that of timestep
    0.

    ``like_diffusers``: rows for which rounding gives NaN are rejected.
    """

    takes_more = ("timesteps",)

    set_alpha_to_one: bool = False
    eta: NotNegative = 0.0
    use_clipped: bool = False

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at, x0, epsilon = plan.at(i), self.denoised(plan, i, x, out, state), plan.epsilon(i, x, out)
        if self.use_clipped:
            epsilon = epsilon_from_x0(x, x0, plan.signal[i], plan.noise[i])
        after = at.x0_coef * x0 + at.direction * epsilon
        return after + at.std * draw(out) if self.eta > 0 else after, state

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        t, apart = self.visited(schedule, given)
        landing = self.grid.landing(t, apart)
        to = alpha_bar_at(schedule, landing, self.set_alpha_to_one)
        return Levels(t, schedule.alphas_cumprod[t], to, unit(), landing)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        check_no_pure_noise(self, at, prediction, self.bounds_infinity)
        std = self.eta * root(((1 - at.to) / (1 - at.here)) * (1 - at.here / at.to), self, "the variance")
        direction = root(1 - at.to - std**2, self, f"with eta={self.eta}, 1 - alpha_bar_to - std**2")
        return Row(x0_coef=at.to**0.5, direction=direction, std=std)


@dataclass(frozen=True, kw_only=True)
class DDIMInverse(Timesteps[Row, Empty], Clipped[Row, Empty]):
    """DDIM run backwards. The rows rise, starting at the picture. The input sample of a row has the noise level of the
    row before, and the model is called with the timestep at which the step lands, as is customary.

    ``set_alpha_to_one``: the picture's alpha_bar, before the first row, is 1 instead of that of timestep 0.

    ``like_diffusers``: the surplus row of trailing for some step counts, at timestep -1, is taken for the last timestep
    of training.
    """

    set_alpha_to_one: bool = False

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at, x0 = plan.at(i), self.denoised(plan, i, x, out, state)
        return at.x0_coef * x0 + at.direction * plan.epsilon(i, x, out), state

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        falling, apart = self.visited(schedule, given)
        t, before = falling.flip(0), self.grid.landing(falling, apart).flip(0)
        return Levels(t, alpha_bar_at(schedule, before, self.set_alpha_to_one), schedule.alphas_cumprod[t], unit())

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        check_no_pure_noise(self, at, prediction)
        divides = prediction == "sample" and bool((at.here == 1).any())
        wanted = "set_alpha_to_one=False, or epsilon or v"
        check(not divides, f"DDIMInverse: a picture without noise has no epsilon: {wanted}")
        return Row(x0_coef=at.to**0.5, direction=(1 - at.to) ** 0.5, std=torch.zeros_like(at.to))
