"""A sampler around another one: its methods are those of the inner one, and whoever derives from it changes some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minidiff.samplers.method import Draw, Sampler


@dataclass(frozen=True, eq=False)
class Wrapped:
    """``inner`` does the work."""

    inner: Sampler[Any, Any]

    @property
    def order(self) -> int:
        """Model calls per step."""
        return int(getattr(self.inner, "order", 1))

    def plan(self, schedule: Any = None, steps: int | None = None, *, timesteps: Any = None, sigmas: Any = None) -> Any:
        """One row per model call."""
        return self.inner.plan(schedule, steps, timesteps=timesteps, sigmas=sigmas)

    def start(self) -> Any:
        """The state before the first step."""
        return self.inner.start()

    def scale_input(self, plan: Any, i: int, x: Tensor) -> Tensor:
        """Return the model input for sample ``x``."""
        return self.inner.scale_input(plan, i, x)

    def denoised(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any) -> Tensor | None:
        """The picture x0 that the model sees in ``x``; None where the method has no such estimate."""
        return self.inner.denoised(plan, i, x, out, state)

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Draw) -> tuple[Tensor, Any]:
        """The sample at the next row and the state that goes with it."""
        return self.inner.step(plan, i, x, out, state, draw)
