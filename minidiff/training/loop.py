"""Training loop: forward, backward, clip, step, average.

One call of :meth:`Trainer.step` is one optimiser step: read it from top to bottom, a comment says what each line is
for. Nothing here writes a file or prints; whoever iterates over :meth:`Trainer.steps` does (run.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.training.batch import Batch, Data
from minidiff.training.curves import rate_at
from minidiff.training.draws import Draws
from minidiff.training.ema import EMA
from minidiff.training.ranks import Alone
from minidiff.training.settings import TrainConfig
from minidiff.training.task import make_task

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Report:
    """Result of one optimiser step. ``norm``: norm of the gradient before clipping."""

    step: int  # the first one is 1
    loss: float
    rate: float
    norm: float


class Trainer:
    """Model, data, optimiser and the number of steps ``done``; state.py saves and restores all of that."""

    Optimizer: ClassVar[Any] = torch.optim.AdamW  # a subclass may take another of its interface

    def __init__(
        self, pipe: StableDiffusion | Unconditional, data: Data, config: TrainConfig, ranks: Alone | None = None
    ) -> None:
        """Prepare to train ``pipe`` in place. Raises :class:`ConfigError` if it lacks a part that is to be trained."""
        self.pipe, self.data, self.config = pipe, data, config
        pipe.hash, pipe.source = "", ""  # its weights will no longer be those of its file
        self.ranks = Alone() if ranks is None else ranks
        share = config.accumulate * self.ranks.count
        fits = config.batch % share == 0
        check(fits, f"batch={config.batch} does not divide into accumulate x machines = {share} equal parts")
        self.task = make_task(pipe, config)
        if config.channels_last:
            self.task.to(memory_format=torch.channels_last)
        self.device = self.task.device
        self.model = self.ranks.wrap(self.task)
        self.weights: dict[str, Tensor] = dict(self.task.named_parameters())
        self.optimizer = self.Optimizer(
            list(self.weights.values()),
            lr=config.rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.decay,
            **({"fused": True} if config.fused else {}),  # otherwise torch's default for the device
        )
        self.ema = None if config.ema is None else EMA(self.weights, config.ema)
        # Most gradients are below 6e-8, float16's smallest number: the loss is scaled up, the gradients down again.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.done = 0
        self.base_model: dict[str, str] | None = None  # "path" and "hash" of the model that weights came from, if any

    def steps(self) -> Iterator[Report]:
        """Train to the end of the run; yield a :class:`Report` after every step."""
        while self.done < self.config.steps:
            yield self.step()

    def step(self) -> Report:
        """Take one optimiser step on the next ``batch`` examples.

        Raises :class:`ConfigError`, before any weight is changed, if the loss or the gradient is not finite.
        """
        c = self.config
        total = torch.zeros((), device=self.device)
        for part in range(c.accumulate):
            first, count = self.share(part)
            with self.ranks.quiet(self.model, last=part == c.accumulate - 1):
                # Forward diffusion mixes noise into the pictures, at random timesteps, so that one network learns every
                # amount of it. The loss is the squared error of the network's answer to the question which noise it
                # was (task.py); divided, since the losses of the parts add up to the mean over the batch.
                loss = self.loss(self.model, self.data, first, count, c.seed) / c.accumulate
                # Backward: add to every weight's .grad how the loss changes with that weight.
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        # Clipping: shorten a gradient that is too long, so that one unlucky batch cannot throw the weights far off.
        self.scaler.unscale_(self.optimizer)  # first, or the length would be that of the scaled gradient
        norm = clip_grad_norm_(self.weights.values(), math.inf if c.clip is None else c.clip)
        report = self.report(total, norm)
        # Learning-rate schedule: small steps while AdamW's averages fill, large ones to learn, small ones to settle.
        for group in self.optimizer.param_groups:
            group["lr"] = report.rate
        # Optimiser step: move each weight against its gradient, by about the learning rate, however long the gradient.
        self.scaler.step(self.optimizer)  # skipped if a scaled gradient overflowed; the next scale is then smaller
        self.scaler.update()
        # zero_grad: backward adds, so the next step must begin from no gradient, or it would repeat this one.
        self.optimizer.zero_grad()
        self.done += 1
        # EMA: average the weights over the last steps, since each step leaves them off the middle by its own noise.
        if self.ema is not None:
            self.ema.update(self.weights, self.done)
        return report

    def share(self, part: int) -> tuple[int, int]:
        """Return (first, count): this machine's examples of the stream in part ``part`` of the next step."""
        count = self.config.batch // (self.config.accumulate * self.ranks.count)
        return self.done * self.config.batch + (part * self.ranks.count + self.ranks.rank) * count, count

    def loss(self, model: nn.Module, data: Data, first: int, count: int, seed: int) -> Tensor:
        """Return the loss of examples ``first`` .. ``first + count - 1`` of ``data``, in the precision of the run."""
        batch = Batch(*data.batch(first, count)).to(self.device)
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(batch, Draws(seed, first, count, self.device))
        return loss

    def report(self, total: Tensor, norm: Tensor) -> Report:
        """Return the numbers of a step, fetched from the device at once, after checking them."""
        loss, length = torch.stack([self.ranks.mean(total), self.ranks.whole(norm).to(total)]).tolist()
        step = self.done + 1
        # The scaler handles overflow in float16; in other precisions it would destroy the weights.
        for name, value in (("loss", loss), ("gradient", 0.0 if self.scaler.is_enabled() else length)):
            if not math.isfinite(value):
                advice = "try a lower rate, a longer warm-up or another precision"
                raise ConfigError(
                    f"step {step}: the {name} is {value}; the weights of step {self.done} stand; {advice}"
                )
        return Report(step, loss, rate_at(self.config, self.done), length)

    @torch.no_grad()
    def evaluate(self, data: Data, count: int) -> float:
        """Return the mean loss of the averaged weights on the first ``count`` examples of ``data``.

        Timesteps and noise are the same in every call and differ from those of the training.
        """
        size = max(1, self.config.batch // self.config.accumulate)
        with self.averaged():
            parts = [(k, min(size, count - k)) for k in range(0, count, size)]
            losses = [self.loss(self.task, data, k, n, self.config.seed + 1) * n for k, n in parts]
        return float(torch.stack(losses).sum() / count)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has its averaged weights, if an average is kept."""
        return nullcontext() if self.ema is None else self.ema.applied(self.weights)
