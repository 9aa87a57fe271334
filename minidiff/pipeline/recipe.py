"""A picture's recipe: the request that makes it again, and where it was made. One schema, written and read.

In JSON a recipe is one flat object. The request's part follows the fields of :class:`Request` that are kept; the rest
is :class:`Made`. Recipes come with pictures, and pictures come from strangers: every value is read with its type, and
what a later version adds is named and left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_type_hints

from minidiff.config import check, quote, read_value, within
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.request import Request, options

WIDEST, LONGEST = 1 << 16, 1 << 20  # pixels; steps
PICTURES = ("image", "mask")  # of these a recipe keeps the file's name and a hash of what the run saw


class Origin(NamedTuple):
    """Input picture of a run: the name of its file, None without one, and a hash of its pixels."""

    name: str | None
    hash: str | None


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A control of a run (:class:`minidiff.Control`): its file and its picture, by name and hash, and its settings."""

    name: str | None = None
    hash: str | None = None
    picture: str | None = None
    picture_hash: str | None = None
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    soft: float = 1.0
    guess: bool = False


@dataclass(frozen=True, kw_only=True)
class Made:
    """Circumstances in which a picture was made: model, device, adapters, versions; None or empty if not applicable.

    ``place``, ``places``: position among the pictures that were drawn from one stream of noise. ``together``: number of
    pictures that were computed at once, if more than one, which changes the last bits. ``model``: the family.
    ``model_hash``: see :mod:`minidiff.storage.identity`. ``dtype_chosen``: what chose the dtype, if not the caller.
    ``kernels``: those of attention that :mod:`minidiff.fast` chose, by number of keys.
    ``lora``: (file, strength), ``embedding``: (file, word), each with its hash at the same place of the list below.
    ``control``: the controls.
    """

    place: int | None = None
    places: int | None = None
    together: int | None = None
    lora: tuple[tuple[str, float], ...] = ()
    lora_hashes: tuple[str, ...] = ()
    embedding: tuple[tuple[str, str | None], ...] = ()
    embedding_hashes: tuple[str, ...] = ()
    control: tuple[Steered, ...] = ()
    model: str | None = None
    model_hash: str | None = None
    dtype: str | None = None
    dtype_chosen: str | None = None
    device: str | None = None
    fast: tuple[str, ...] = ()
    kernels: dict[str, str] = field(default_factory=dict)
    approximate: dict[str, Any] = field(default_factory=dict)
    minidiff: str | None = None
    torch: str | None = None

    def __post_init__(self) -> None:
        within(0, 2**32, place=self.place, places=self.places, together=self.together)
        for name, strength in self.lora:
            check(math.isfinite(strength), f"lora {quote(name)}={quote(strength)} is not finite")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything needed to make a picture again. ``request`` is for it alone; ``pictures``: those that it started from,
    by option."""

    request: Request
    made: Made
    pictures: Mapping[str, Origin] = field(default_factory=dict)
    text: bool = True  # the model reads a prompt

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as it is stored with a picture."""
        found: dict[str, Any] = {}
        for f, option in options(type(self.request)):
            if option.kept is not None and (
                self.request.gives(f) or (option.always and (self.text or not option.text))
            ):
                found[f.name] = plain(getattr(self.request, f.name))
        for name, origin in self.pictures.items():
            found[name] = origin.name
            found |= {f"{name}_hash": origin.hash} if origin.hash else {}
        for f in dataclasses.fields(self.made):
            value = getattr(self.made, f.name)
            if value not in (None, (), {}):
                found[f.name] = plain(value)
        return found


def parse(found: Mapping[str, Any], source: str, kind: type[Request] = Request) -> tuple[Recipe, list[str]]:
    """Return the recipe in ``found`` (parsed JSON), and the names in it that are not known.

    Raises :class:`CheckpointError`, naming ``source`` and the field, for a value of a wrong type or out of range.
    """
    kept = {f.name: option.kept for f, option in options(kind) if option.kept is not None}
    made = get_type_hints(Made)
    try:
        asked = {name: read_value(t | None, found[name], name) for name, t in kept.items() if name in found}
        where = {name: read_value(t, found[name], name) for name, t in made.items() if name in found}
        request = kind(**{"prompt": None, **{name: value for name, value in asked.items() if value is not None}})
        check_range(request)
        pictures = {name: _origin(found, name) for name in PICTURES if name in found}
        recipe = Recipe(request=request, made=Made(**where), pictures=pictures, text="prompt" in found)
    except ConfigError as e:
        raise CheckpointError(f"{source}: its recipe is damaged ({e})") from None
    known = {*kept, *made, *PICTURES, *(f"{name}_hash" for name in PICTURES)}
    return recipe, sorted(found.keys() - known)


def _origin(found: Mapping[str, Any], name: str) -> Origin:
    return Origin(*(read_value(str | None, found.get(key), key) for key in (name, f"{name}_hash")))


def check_range(request: Request) -> None:
    """Raise :class:`ConfigError` for values that no run of minidiff can have had."""
    within(1, WIDEST, width=request.width, height=request.height)
    within(1, LONGEST, steps=request.steps)
    if isinstance(request.seed, int):
        within(-(2**63), 2**64 - 1, seed=request.seed)
    if isinstance(request.sampler, Mapping):
        called = request.sampler.get("name")
        check(isinstance(called, str), f"sampler has the name {quote(called)}, which is no text")


def plain(value: Any) -> Any:
    """Return ``value`` as JSON has it: dataclasses as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
