"""The loop that makes a picture: from pure noise, one model call after another, towards x0.

It is a generator: every model call yields a :class:`Step`, and whoever consumes it (the progress bar, a preview, a
recording, your own loop) may look at it, keep it, change ``step.x``, or stop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.samplers.base import Draw, Sampler


class Prediction(NamedTuple):
    """What the model said: ``out`` is what the sampler takes, guided from the two others where there was guidance."""

    out: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None


Predict = Callable[[Tensor, Tensor], Prediction]


@dataclass
class Step:
    """One model call: row ``i`` of the plan at timestep ``t`` took the sample to ``x`` (B, C, H, W).

    ``x`` may be assigned to: the next step goes on from there. ``x`` is still noisy until the last step, ``x0`` is what
    the model expects to see in the end: preview that one.
    """

    i: int
    t: Tensor
    x: Tensor
    out: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None
    _x0: Callable[[], Tensor | None] = field(default=lambda: None, repr=False)

    @property
    def x0(self) -> Tensor | None:
        """The denoised estimate of this step, computed when read; None where the method has none."""
        with torch.no_grad():
            return self._x0()


@torch.no_grad()
def denoise(
    predict: Predict, sampler: Sampler[Any, Any], plan: Any, x: Tensor, *, first: int = 0, draw: Draw
) -> Generator[Step, None, None]:
    """Run ``plan`` from row ``first`` on ``x`` (B, C, H, W), noise at that row's level; yields each :class:`Step`.

    Gradients are off inside and as the caller has them between two steps.
    """
    plan = plan.to(x.device)  # once: a host timestep would be copied, and waited for, at every step
    state = sampler.start()
    for i in range(first, len(plan.timesteps)):
        before, before_state = x, state
        prediction = predict(sampler.scale_input(plan, i, x), plan.timesteps[i])
        x, state = sampler.step(plan, i, x, prediction.out, state, draw)

        def x0(
            i: int = i, x: Tensor = before, out: Tensor = prediction.out, state: Any = before_state
        ) -> Tensor | None:
            return sampler.denoised(plan, i, x, out, state)

        step = Step(i, plan.timesteps[i], x, *prediction, x0)
        yield step
        x = step.x


class Run(Iterator[Step]):
    """A denoising that is ready to go: iterate over its steps, or let it run to the end.

    ``plan`` is what it will do (print it); ``recipes`` say, image by image, how to get the same again.
    """

    def __init__(self, trail: Generator[Step, None, None], plan: Any, recipes: list[dict[str, Any]]) -> None:
        self.trail = trail
        self.plan = plan
        self.recipes = recipes
        self._latest: Step | None = None

    def __len__(self) -> int:
        """Model calls, in all."""
        return len(self.plan.timesteps)

    def __next__(self) -> Step:
        self._latest = next(self.trail)
        return self._latest

    def close(self) -> None:
        """Stop where it is."""
        self.trail.close()

    def last(self, progress: bool = False) -> Step:
        """Run what is left, under a bar that shows the time of a step if ``progress``; gives the last step.

        Raises :class:`ConfigError` for a run that was closed before its first step.
        """
        from tqdm import tqdm

        bar = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
        for _ in tqdm(self, total=len(self), disable=not progress, unit="step", bar_format=bar):
            pass
        if self._latest is None:
            raise ConfigError("the run was closed before its first step; there is no last one")
        return self._latest
