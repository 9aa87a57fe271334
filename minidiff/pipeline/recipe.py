"""A picture's recipe with its types: what is read of one before any of it is used.

Recipes come with pictures, and pictures come from strangers. Every field that minidiff ever wrote stands here once,
with its type; what a later version adds is named, and left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minidiff.config import check, from_json, quote, within
from minidiff.errors import CheckpointError, ConfigError

WIDEST, LONGEST = 1 << 16, 1 << 20  # pixels; steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Recipe that ``generate`` stores with a picture; None, or no entry, for settings that were not given."""

    prompt: str | None = None
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int | None = None
    place: int | None = None  # in a stream of noise that was shared by so many places
    places: int | None = None
    sampler: dict[str, Any] | None = None
    like: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    sizes: dict[str, Any] | None = None
    negative_sizes: dict[str, Any] | None = None
    clip_skip: int | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    lora: tuple[tuple[str, float], ...] = ()
    embedding: tuple[tuple[str, str | None], ...] = ()
    model: str | None = None
    model_hash: str | None = None
    dtype: str | None = None
    dtype_chosen: str | None = None
    device: str | None = None
    fast: tuple[str, ...] = ()
    approximate: dict[str, Any] = field(default_factory=dict)
    minidiff: str | None = None
    torch: str | None = None

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                check(not isinstance(number, float) or math.isfinite(number), f"{name}={quote(value)} is not finite")
        within(1, WIDEST, width=self.width, height=self.height)
        within(1, LONGEST, steps=self.steps)
        within(0, 2**32, place=self.place, places=self.places)
        within(-(2**63), 2**64 - 1, seed=self.seed)
        called = "" if self.sampler is None else self.sampler.get("name")
        check(isinstance(called, str), f"sampler has the name {quote(called)}, which is no text")


FIELDS = frozenset(f.name for f in dataclasses.fields(Recipe))


def typed(recipe: Mapping[str, Any], source: str) -> tuple[Recipe, list[str]]:
    """``recipe`` with its types, and the names in it that are not known.

    Raises :class:`CheckpointError`, naming ``source`` and the field, for a value of a wrong type or out of all range.
    """
    try:
        found = from_json(Recipe, {name: value for name, value in recipe.items() if name in FIELDS})
    except ConfigError as e:
        raise CheckpointError(f"{source}: its recipe is damaged ({e})") from None
    return found, sorted(recipe.keys() - FIELDS)
