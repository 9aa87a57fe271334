"""A run that has been decided on: everything that the denoising loop needs, with nothing computed but its beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from minidiff.pipeline.recipe import Recipe
from minidiff.samplers.method import Draw, Sampler


class Prediction(NamedTuple):
    """Model output: ``out`` goes to the sampler. With guidance it is computed from the two other fields."""

    out: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None


Predict = Callable[[Tensor, Tensor], Prediction]
"""The guided model: scaled sample (B, C, H, W) and timestep -> :class:`Prediction`."""

Keep = Callable[[int, Tensor], Tensor]
"""Change of the sample after row i: inpainting puts the known part of the picture back."""


def nothing() -> None:
    """Do nothing: the end of most runs."""


def as_it_is(i: int, x: Tensor) -> Tensor:
    """Return the sample unchanged: the :data:`Keep` of all other runs."""
    return x


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A run from noise (or a noisy picture) ``x`` (B, C, H, W) to a picture: ``rows`` of ``plan``, stepped by
    ``sampler``.

    ``predict`` is called at every row, but for those for which ``instead`` names another function. ``keep`` is applied
    after every step. ``draw``: noise of the steps. ``rewind`` sets the sources of noise back to where the run began.
    ``beside``: networks that take part beside the model's own, by name. ``done`` is called when the run has ended.
    ``recipes``: for each picture, what makes it again.
    """

    plan: Any
    sampler: Sampler[Any, Any]
    x: Tensor
    predict: Predict
    draw: Draw
    rows: range = range(0)
    instead: Mapping[int, Predict] = field(default_factory=dict)
    keep: Keep = as_it_is
    rewind: Callable[[], None] = nothing
    beside: Mapping[str, nn.Module] = field(default_factory=dict)
    done: Callable[[], None] = nothing
    recipes: tuple[Recipe, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", range(len(self.plan.timesteps)))
