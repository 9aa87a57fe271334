"""Training, seen once more: one picture at several timesteps, the loss by timestep, and a few real optimiser steps.

Everything runs on a model of its own, loaded from the file of the bundled one, and on the data that it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.pipeline import StableDiffusion
from minidiff.schedule import to_epsilon, to_x0, v_from_x0
from minidiff.training.adamw import AdamW
from minidiff.training.data import ShapesStream
from minidiff.training.draws import Draws
from minidiff.training.loop import Report, Trainer
from minidiff.training.objective import draw_noise, target
from minidiff.training.settings import TrainConfig

SEED = 1
LEVELS = 9  # timesteps at which the picture is shown
TIMES = 10  # timesteps of the loss, each with ...
EXAMPLES = 6  # ... as many pictures
BATCH = 16  # of the model while it is asked
CONFIG = TrainConfig(steps=5, batch=4, warmup=2, rate=1e-4, clip=0.2, ema=0.9, seed=SEED)


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers:
    """Answers of the model to noised latents, (B, C, h, w) each, at timesteps ``t`` (B,). ``wanted``: the target.
    ``signal`` and ``noise``: the rates of the mixture, (B, 1, 1, 1)."""

    t: Tensor
    x0: Tensor
    epsilon: Tensor
    x: Tensor
    wanted: Tensor
    out: Tensor
    prediction: str
    signal: Tensor
    noise: Tensor

    @property
    def found(self) -> dict[str, Tensor]:
        """Return the answer as x0, epsilon and v."""
        given = (self.prediction, self.x, self.out, self.signal, self.noise)
        x0, epsilon = to_x0(*given), to_epsilon(*given)  # type: ignore[arg-type]
        return {"x0": x0, "epsilon": epsilon, "v": v_from_x0(x0, epsilon, self.signal, self.noise)}

    @property
    def losses(self) -> dict[str, Tensor]:
        """Return the squared error of each example, (B,), as trained ("loss") and as x0, epsilon and v."""
        true = {"x0": self.x0, "epsilon": self.epsilon}
        true["v"] = v_from_x0(self.x0, self.epsilon, self.signal, self.noise)
        pairs = {"loss": (self.out, self.wanted)} | {name: (x, true[name]) for name, x in self.found.items()}
        return {name: (a.float() - b.float()).square().flatten(1).mean(dim=1) for name, (a, b) in pairs.items()}

    @property
    def nothing(self) -> Tensor:
        """Return the loss of a network that answers 0, (B,)."""
        return self.wanted.float().square().flatten(1).mean(dim=1)


@torch.no_grad()
def answered(pipe: StableDiffusion, first: int, count: int, t: Tensor) -> tuple[Answers, list[str]]:
    """Ask the model about examples ``first`` .. of its data, each at every one of ``t``, as its training does. Return
    the answers, example after example, and the captions."""
    pixels, captions = ShapesStream(SEED).batch(first, count)[:2]
    draws = Draws(SEED, first, count)
    factor, schedule = pipe.vae.config.scaling_factor, pipe.schedule
    latents = pipe.vae.encode(pixels)
    x0 = latents.sample(noise=draws.normal(latents.mean.shape[1:])) * factor
    epsilon = draw_noise(draws, x0.shape[1:])
    context, _ = pipe.encode_prompt(list(captions or ()))
    x0, epsilon, context = (value.repeat_interleave(len(t), dim=0) for value in (x0, epsilon, context))
    every = t.repeat(count)
    x = schedule.add_noise(x0, epsilon, every)
    parts = zip(*(torch.split(value, BATCH) for value in (x, every, context)), strict=True)
    out = torch.cat([pipe.unet(*part) for part in parts])
    signal, noise = schedule.rates(every, x)
    wanted = target(schedule, x0, epsilon, every)
    values = {"t": every, "x0": x0, "epsilon": epsilon, "x": x, "wanted": wanted, "out": out}
    return Answers(**values, prediction=schedule.prediction, signal=signal, noise=noise), list(captions or ())


def spread_times(schedule_length: int, count: int) -> Tensor:
    """Return ``count`` timesteps from near 0 to the last, int64."""
    return torch.linspace(schedule_length // 50, schedule_length - 1, count).round().long()


class Brief(Trainer):
    """The trainer, with the optimiser written out: the same bits, without torch's compiler, which takes a second or two
    to load."""

    Optimizer = AdamW


def trained(pipe: StableDiffusion) -> list[Report]:
    """Take the optimiser steps of ``CONFIG`` with ``pipe``, whose weights they change."""
    return list(Brief(pipe, ShapesStream(SEED), CONFIG).steps())


def clipped(report: Report) -> float:
    """Return the norm of the gradient after clipping."""
    return min(report.norm, math.inf if CONFIG.clip is None else CONFIG.clip)
