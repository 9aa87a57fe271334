"""Samplers for consistency models, which predict the end of the path to the picture in one call.

A consistency function is the model's x0, mixed with the sample such that it is the identity at the end of the path:

    f(x) = c_out * x0 + c_skip * x

One step is f itself. For more steps, fresh noise at the next level is added to f and the model is called again (Song
et al. 2023, algorithm 1). There are three kinds of such models:

* LCM, distilled from a latent diffusion model (Luo et al. 2023, "Latent Consistency Models"), with
  c_skip = s**2 / ((10 t)**2 + s**2) and c_out = 10 t / sqrt((10 t)**2 + s**2), s = 0.5;
* TCD, whose steps land at any point of the path instead of at its end (Zheng et al. 2024, "Trajectory Consistency
  Distillation", algorithm 4, strategic stochastic sampling);
* CM, trained in sigma (Song et al. 2023), with s = sigma_data and

      seen = x / sqrt(sigma**2 + s**2)      f(x, sigma) = c_out * out + c_skip * x
      c_skip = s**2 / ((sigma - sigma_min)**2 + s**2)      c_out = (sigma - sigma_min) * s / sqrt(sigma**2 + s**2)

A distilled model is called only at timesteps at which it was distilled, so their number, 50 for the published models,
bounds the number of steps.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import unit
from minidiff.samplers.checks import check_no_pure_noise, check_timesteps, root, whole
from minidiff.samplers.grid import Floats
from minidiff.samplers.levels import OwnSigmas
from minidiff.samplers.limits import Limited
from minidiff.samplers.method import Draw, Empty, Given, Levels, Method, Next, Plan, R, S
from minidiff.samplers.options import POSITIVE, Rule
from minidiff.schedule import NoiseSchedule, check_steps

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class Distilled(Method[R, S]):
    """Base class of the methods for distilled models.

    ``original_steps``: number of evenly spaced timesteps at which the model was distilled; None: all of training's.
    ``strength``: only the lower part of them is visited, for img2img.
    """

    takes = ("steps", "timesteps")

    original_steps: Annotated[int | None, POSITIVE] = 50
    strength: Annotated[float, Rule(lambda v: 0 < v <= 1, "must lie above 0, up to 1")] = 1.0

    def visited(self, schedule: NoiseSchedule, given: Given) -> tuple[Tensor, bool]:
        """Return (n,) falling int64 timesteps, and True if the last of them is not recognized as the last."""
        total = len(schedule)
        if given.timesteps is None:
            return torch.from_numpy(self._spaced(check_steps(given.steps, total), total)), False
        check_timesteps(self, given.timesteps, total)
        t = whole(self, given.timesteps, lowest=0)
        kept = int(len(t) * self.strength)
        check(kept >= 1, f"{self.name}: strength={self.strength} leaves none of {len(t)} timesteps")
        t, goes_on = self.grid.cut(t, kept)
        return torch.from_numpy(t), goes_on

    def _spaced(self, steps: int, total: int) -> Floats:
        """Return (steps,) falling int64: a subset of the timesteps of distillation, evenly spaced by index."""
        original = total if self.original_steps is None else self.original_steps
        check(original <= total, f"{self.name}: original_steps={original} exceeds the {total} timesteps of training")
        origin = np.arange(1, int(original * self.strength) + 1) * (total // original) - 1
        share = "" if self.strength == 1 else f" with strength={self.strength}"
        what = f"{'timesteps of training' if self.original_steps is None else 'original_steps'}{share}"
        fits = steps <= len(origin)
        check(fits, f"{self.name}: steps={steps} is more than the {len(origin)} {what} that the model was distilled at")
        chosen = np.floor(np.linspace(0, len(origin), num=steps, endpoint=False)).astype(np.int64)
        return origin[::-1][chosen].astype(np.int64)


LCMRow = namedtuple("LCMRow", "c_out c_skip to_signal to_noise noisy")
"""``c_out`` and ``c_skip`` of the consistency function; ``to_signal`` and ``to_noise``, the rates with which noise is
added again where ``noisy`` is set: not after the last row, where they are 1 and 0."""


@dataclass(frozen=True, kw_only=True)
class LCM(Distilled[LCMRow, Empty], Limited[LCMRow, Empty]):
    """LCM sampler. ``timestep_scaling``: the 10 above; for the other options see :class:`Distilled` and
    :class:`Limited`.

    ``like_diffusers``: a last step that is not recognized as such makes the picture as noisy again as it was.
    """

    original_steps: Annotated[int, POSITIVE] = 50
    timestep_scaling: float = 10.0

    def step(self, plan: Plan[LCMRow], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at, x0 = plan.at(i), self.denoised(plan, i, x, out, state)
        return at.to_signal * x0 + at.to_noise * draw(x0) if at.noisy else x0, state

    def denoised(self, plan: Plan[LCMRow], i: int, x: Tensor, out: Tensor, state: Empty) -> Tensor:
        """Return the consistency function: the model's x0, limited, and mixed with ``x``."""
        at = plan.at(i)
        x0: Tensor = at.c_out * super().denoised(plan, i, x, out, state) + at.c_skip * x
        return x0

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        t, goes_on = self.visited(schedule, given)
        here = schedule.alphas_cumprod[t]
        return Levels(t, here, torch.cat([here[1:], here[-1:] if goes_on else unit()[None]]), unit())

    def rows(self, at: Levels, prediction: Prediction) -> LCMRow:
        check_no_pure_noise(self, at, prediction, self.bounds_infinity)
        scaled = at.timesteps * self.timestep_scaling
        variance = scaled**2 + SIGMA_DATA**2
        noisy = (*(True for _ in at.here[1:]), bool(at.to[-1] < 1))
        return LCMRow(scaled / variance**0.5, SIGMA_DATA**2 / variance, at.to.sqrt(), (1 - at.to).sqrt(), noisy)


TCDRow = namedtuple("TCDRow", "middle signal_middle noise_middle keep fresh noisy")
"""``middle``: the timestep s; ``signal_middle`` and ``noise_middle``: its rates; ``keep`` and ``fresh``: factors of x_s
and of fresh noise on the way up; ``noisy``: True if there is fresh noise, which is not so in the last row nor with eta
0."""


@dataclass(frozen=True, kw_only=True)
class TCD(Distilled[TCDRow, Empty]):
    """TCD sampler. On the way from timestep t to the next one, p, the model's x0 and epsilon are combined at
    s = (1 - eta) p, which is less noisy than p. Fresh noise then leads from s back up to p:

        x_s = sqrt(alpha_bar_s) * x0 + sqrt(1 - alpha_bar_s) * epsilon
        x_p = sqrt(alpha_bar_p / alpha_bar_s) * x_s + sqrt(1 - alpha_bar_p / alpha_bar_s) * fresh noise

    ``eta``: amount of fresh noise, 0 to 1 (the paper's gamma). 0 is DDIM along the distilled timesteps; 1 goes to
    timestep 0 and back in every step, as LCM does. The last step lands on timestep 0 and draws nothing. As in the
    reference, TCD does not limit x0, and ignores clip_sample and thresholding in its config.

    ``like_diffusers``: a last step that is not recognized as such draws noise too, with factor 0.
    """

    eta: Annotated[float, Rule(lambda v: 0 <= v <= 1, "must lie in 0..1")] = 0.3

    def step(self, plan: Plan[TCDRow], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at, x0 = plan.at(i), self.denoised(plan, i, x, out, state)
        landed = at.signal_middle * x0 + at.noise_middle * plan.epsilon(i, x, out)
        return at.keep * landed + at.fresh * draw(landed) if at.noisy else landed, state

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        t, goes_on = self.visited(schedule, given)
        landing = torch.cat([t[1:], torch.zeros_like(t[:1])])
        middle = torch.floor((1 - self.eta) * landing).to(torch.int64)
        here, to, at_middle = (schedule.alphas_cumprod[rows] for rows in (t, landing, middle))
        noisy = torch.tensor([self.eta > 0] * (len(t) - 1) + [self.eta > 0 and goes_on], device="cpu")
        return Levels(t, here, to, unit(), beside={"middle": middle, "alpha_bar": at_middle, "noisy": noisy})

    def rows(self, at: Levels, prediction: Prediction) -> TCDRow:
        check_no_pure_noise(self, at, prediction)
        s, middle, noisy = at.beside["middle"], at.beside["alpha_bar"], tuple(at.beside["noisy"].tolist())
        keep, fresh = (at.to / middle).sqrt(), (1 - at.to / middle).sqrt()
        return TCDRow(s, middle.sqrt(), (1 - middle).sqrt(), keep, fresh, noisy)


CMRow = namedtuple("CMRow", "scale skip scaled fresh")
"""``scale``: divisor of the model's input; ``skip`` and ``scaled``: the c_skip and c_out above; ``fresh``: factor of
the fresh noise. A plan of a single row draws no noise."""


@dataclass(frozen=True, kw_only=True)
class CM(OwnSigmas[CMRow, Empty]):
    """Sampler for consistency models trained in sigma. Options: those of :class:`OwnSigmas` and :class:`Limited`, and

    ``train_steps``: number of sigmas of training. A run visits some of them; the model's time input is
    250 * log(sigma). ``s_noise`` scales the fresh noise. ``clip`` is 1 by default, since these models work on pixels.
    Given timesteps are indices of the training sigmas counted from the top, so that 0 is sigma_max.

    ``like_diffusers`` rejects values of sigma_min for which rounding makes the last step NaN.
    """

    predicts = "epsilon"
    takes = ("steps", "timesteps")

    train_steps: Annotated[int, Rule(lambda v: v >= 2, "must be 2 or more")] = 40
    s_noise: float = 1.0
    clip: float | None = 1.0

    def step(self, plan: Plan[CMRow], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        x0 = self.denoised(plan, i, x, out, state)
        noise = draw(out) if len(plan) > 1 else torch.zeros_like(out)
        return x0 + (noise * self.s_noise) * plan.at(i).fresh, state

    def scale_input(self, plan: Plan[CMRow], i: int, x: Tensor) -> Tensor:
        seen: Tensor = x / plan.at(i).scale
        return seen

    def denoised(self, plan: Plan[CMRow], i: int, x: Tensor, out: Tensor, state: Empty) -> Tensor:
        """Return the consistency function, limited."""
        at = plan.at(i)
        return self.limit(at.scaled * out + at.skip * x)

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        total = self.train_steps
        if given.timesteps is None:
            steps = check_steps(given.steps, total)
            rows = np.arange(steps) * (total // steps)
        else:
            check_timesteps(self, given.timesteps, total)
            rows = whole(self, given.timesteps, lowest=0)[::-1]
        s = self.karras(rows / (total - 1))
        sigmas = torch.from_numpy(np.append(s, self.sigma_min).astype(np.float32))
        return self.between(s, sigmas, self.grid.highest(sigmas, self.sigma_max, given.timesteps is not None))

    def between(self, s: Floats, sigmas: Tensor, highest: float) -> Levels:
        """Return the levels of ``sigmas`` (n + 1,), with first noise times ``highest``. ``s`` (n,): in float64."""
        first = torch.tensor(highest, dtype=torch.float32, device="cpu")
        return Levels(torch.from_numpy(1000 * 0.25 * np.log(s + 1e-44)), sigmas[:-1], sigmas[1:], first)

    def rows(self, at: Levels, prediction: Prediction) -> CMRow:
        s, above = self.sigma_data, at.here - self.sigma_min
        scale = (at.here**2 + s**2) ** 0.5
        to = at.to.clamp(min=self.sigma_min, max=self.sigma_max)
        fresh = root(to**2 - self.sigma_min**2, self, "what fresh noise is multiplied by")
        return CMRow(scale, s**2 / (above**2 + s**2), above * s / scale, fresh)
