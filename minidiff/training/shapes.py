"""Procedural data set: any number of pictures of coloured shapes with captions, the same on every machine.

Item k of seed s is a function of (s, k) alone, computed by a hash instead of a stateful generator (the output function
of SplitMix64: Steele, Lea, Flood 2014), so a run can stop and resume at any item, and workers need no state. Half of
the scenes have one thing, half have two.

One in ten (shape, colour, background) triples is held out: no training scene contains it and no caption names it,
although each of its words, and each pair of them, occurs in training. A model that draws these has learned to compose.

Loose items have captions with parts left out. What is not said is drawn at random, a trained triple as ever, so that a
thing never has the colour of its background.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from minidiff.config import check
from minidiff.training.captions import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Facts,
    Named,
    caption,
    loose_caption,
)
from minidiff.training.scenes import SIDE, Scene, Thing, draw

Kind = Literal["train", "single", "held_out", "two", "loose", "ordered"]
Triple = tuple[str, str, str]  # shape, colour, background

RADIUS = {"small": 7.0, "medium": 9.6, "large": 13.0}  # pixels
MIDDLE = SIDE / 2
OFF = 16.0  # distance from the centre of "left", "top" and the things of a pair
CENTRES = {"left": (-OFF, 0.0), "right": (OFF, 0.0), "top": (0.0, -OFF), "bottom": (0.0, OFF), "centre": (0.0, 0.0)}
PAIR = {"left of": (CENTRES["left"], CENTRES["right"]), "above": (CENTRES["top"], CENTRES["bottom"])}
SCATTER = {1: 2.0, 2: 1.0}  # random shift in pixels by number of things: two large ones keep a gap of at least 3.5
SWELL = 0.02  # relative variation of a radius

TWO_THINGS = 0.5  # shares of the scenes, or of their captions
SIZE_NAMED = 0.6
PLACE_NAMED = 0.6
JOINED_BY_AND = 0.2
DRAWS = 16  # number of random numbers per item

LOOSE_PAIRS = 0.4  # shares of the loose scenes, or of their captions
LOOSE_PLURAL = 0.5  # of the pairs
LOOSE_COLOUR_NAMED = 0.6
LOOSE_GROUND_NAMED = 0.35
LOOSE_SIZE_NAMED = 0.3
LOOSE_PLACE_NAMED = 0.4
LOOSE_DRAWS = 24


def held_out(shape: str, colour: str, background: str) -> bool:
    """Return True if the triple is held out from training: 26 of the 264 whose colour and background differ.

    The factors 1, 3, 1 are coprime to 10, so at most one of the triples with a given pair of words is held out.
    """
    return (SHAPES.index(shape) + 3 * COLOURS.index(colour) + BACKGROUNDS.index(background)) % 10 == 9


TRIPLES: tuple[Triple, ...] = tuple(t for t in itertools.product(SHAPES, COLOURS, BACKGROUNDS) if t[1] != t[2])
HELD_OUT: tuple[Triple, ...] = tuple(t for t in TRIPLES if held_out(*t))
TRAINED: tuple[Triple, ...] = tuple(t for t in TRIPLES if not held_out(*t))
ON_GROUND = {ground: tuple(t for t in TRAINED if t[2] == ground) for ground in BACKGROUNDS}
PLACE_IN = {t: i for ground in BACKGROUNDS for i, t in enumerate(ON_GROUND[ground])}


@dataclass(frozen=True)
class Item:
    """One sample: the scene, the facts that its caption states, and the caption."""

    scene: Scene
    facts: Facts
    caption: str


def items(seed: int, start: int, count: int, kind: Kind = "train") -> list[Item]:
    """Return items ``start`` to ``start + count - 1`` of ``seed``, without drawing their scenes.

    ``kind``: "train"; or for evaluation "single" (one thing, a trained triple), "held_out" (one thing, a held-out
    triple), "two" (two things whose relation the caption states); "loose" (one or two things, captions with parts left
    out). Each kind is a separate stream, but for "ordered", for training: the scenes of "loose", with things that are
    joined by "and" named from left to right or from top to bottom, where "loose" has either order.
    Raises :class:`ConfigError` for a seed or a start below 0 or a count below 1.
    """
    check(0 <= seed < 2**63, f"seed={seed} must lie in 0..2**63 - 1")
    check(start >= 0 and count >= 1, f"start={start}, count={count}: items are counted from 0, at least one at a time")
    check(kind in _SALT, f"kind={kind!r} is none of {', '.join(_SALT)}")
    rows = _uniforms(seed, start, count, kind).tolist()
    if kind in ("loose", "ordered"):
        return [_loose(row, ordered=kind == "ordered") for row in rows]
    return [_item(row, kind) for row in rows]


def batch(seed: int, start: int, count: int) -> tuple[Tensor, list[str]]:
    """Return training items ``start`` to ``start + count - 1``: float32 (count, 3, 64, 64) in [-1, 1] and captions."""
    return drawn(items(seed, start, count))


def drawn(chosen: Sequence[Item]) -> tuple[Tensor, list[str]]:
    """Return the pixels (B, 3, 64, 64) and captions of ``chosen`` items."""
    return draw([item.scene for item in chosen]), [item.caption for item in chosen]


class Shapes(Dataset[tuple[Tensor, str]]):
    """Data set for torch's loaders: the first ``length`` training items of ``seed``, (pixels (3, 64, 64), caption).

    Items that are requested as a list are drawn together.
    """

    def __init__(self, seed: int = 0, length: int = 1_000_000) -> None:
        check(length >= 1, f"length={length} must be at least 1")
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> tuple[Tensor, str]:
        return self.__getitems__([k])[0]

    def __getitems__(self, ks: Sequence[int]) -> list[tuple[Tensor, str]]:
        for k in ks:
            if not 0 <= k < self.length:
                raise IndexError(f"item {k} of a data set of {self.length}")
        pixels, captions = drawn([items(self.seed, int(k), 1)[0] for k in ks])
        return list(zip(pixels, captions, strict=True))


def single_object_prompts(n: int, seed: int = 0) -> list[tuple[str, Facts]]:
    """Return ``n`` captions of one thing, from trained triples, each with the facts of a correct picture."""
    return [(item.caption, item.facts) for item in items(seed, 0, n, "single")]


def held_out_prompts(n: int, seed: int = 0) -> list[tuple[str, Facts]]:
    """Return ``n`` captions of one thing, from held-out triples, each with the facts of a correct picture."""
    return [(item.caption, item.facts) for item in items(seed, 0, n, "held_out")]


def two_object_prompts(n: int, seed: int = 0) -> list[tuple[str, Facts]]:
    """Return ``n`` captions of two things and their relation, each with the facts of a correct picture."""
    return [(item.caption, item.facts) for item in items(seed, 0, n, "two")]


def loose_prompts(n: int, seed: int = 0) -> list[tuple[str, Facts]]:
    """Return ``n`` captions with parts left out, each with the facts of a correct picture."""
    return [(item.caption, item.facts) for item in items(seed, 0, n, "loose")]


_SALT: dict[str, int] = {"train": 0, "single": 1, "held_out": 2, "two": 3, "loose": 4, "ordered": 4}


def _uniforms(seed: int, start: int, count: int, kind: str) -> np.ndarray:
    """Return float64 (count, DRAWS or LOOSE_DRAWS) in [0, 1), a hash of seed, kind, item and column."""
    draws = LOOSE_DRAWS if _SALT[kind] == _SALT["loose"] else DRAWS
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(_SALT[kind]))
    rows = _mix(key + np.arange(start, start + count, dtype=np.uint64))
    bits = _mix(rows[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of uint64 in which every output bit depends on all input bits."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _item(u: list[float], kind: Kind) -> Item:
    """Make an item from ``DRAWS`` numbers in [0, 1), each of which is used once."""
    triples = HELD_OUT if kind == "held_out" else TRAINED
    shape, colour, ground = triples[int(u[0] * len(triples))]
    size = SIZES[int(u[1] * 3)]
    named = Named(shape, colour, size if u[3] < SIZE_NAMED else None)
    wording = int(u[5] * 2**39)
    if kind != "two" and (kind != "train" or u[6] >= TWO_THINGS):
        place = PLACES[int(u[8] * len(PLACES))]
        scene = Scene(ground, (_thing(shape, colour, size, CENTRES[place], SCATTER[1], u[9], u[10], u[11]),))
        facts = Facts(ground, (named,), place=place if u[15] < PLACE_NAMED else None)
        return Item(scene, facts, caption(facts, wording))
    shape_2, colour_2, _ = _another((shape, colour, ground), u[7])
    size_2 = SIZES[int(u[2] * 3)]
    named_2 = Named(shape_2, colour_2, size_2 if u[4] < SIZE_NAMED else None)
    relation = RELATIONS[int(u[8] * 2)]
    here, there = PAIR[relation]
    thing = _thing(shape, colour, size, here, SCATTER[2], u[9], u[10], u[11])
    thing_2 = _thing(shape_2, colour_2, size_2, there, SCATTER[2], u[12], u[13], u[14])
    if kind == "train" and u[15] < JOINED_BY_AND:  # "and" promises no order
        facts = Facts(ground, (named_2, named) if u[15] < JOINED_BY_AND / 2 else (named, named_2))
    else:
        facts = Facts(ground, (named, named_2), relation=relation)
    return Item(Scene(ground, (thing, thing_2)), facts, caption(facts, wording))


def _loose(u: list[float], ordered: bool = False) -> Item:
    """Make a loose item from ``LOOSE_DRAWS`` numbers in [0, 1), each of which is used once. ``ordered``: things joined
    by "and" are named as they are read, from left to right or from top to bottom."""
    shape, colour, ground = TRAINED[int(u[0] * len(TRAINED))]
    size = SIZES[int(u[1] * 3)]
    sized, coloured = u[2] < LOOSE_SIZE_NAMED, u[3] < LOOSE_COLOUR_NAMED
    named = Named(shape, colour if coloured else None, size if sized else None)
    told = ground if u[4] < LOOSE_GROUND_NAMED else None
    wording = int(u[5] * 2**39)
    if u[6] >= LOOSE_PAIRS:
        place = PLACES[int(u[8] * len(PLACES))]
        scene = Scene(ground, (_thing(shape, colour, size, CENTRES[place], SCATTER[1], u[9], u[10], u[11]),))
        facts = Facts(told, (named,), place=place if u[7] < LOOSE_PLACE_NAMED else None)
        return Item(scene, facts, loose_caption(facts, wording))
    relation: str | None = RELATIONS[int(u[8] * 2)]
    here, there = PAIR[str(relation)]
    size_2 = SIZES[int(u[15] * 3)]
    if u[7] < LOOSE_PLURAL:
        # Of one shape; what is said, colour or size, is said of both.
        colours = [colour] if coloured else [c for s, c, _ in ON_GROUND[ground] if s == shape]
        shape_2, colour_2, size_2 = shape, colours[int(u[16] * len(colours))], size if sized else size_2
        named_2, relation_said = named, False
    else:
        shape_2, colour_2, _ = _another((shape, colour, ground), u[16])
        said = colour_2 if u[17] < LOOSE_COLOUR_NAMED else None
        named_2 = Named(shape_2, said, size_2 if u[18] < LOOSE_SIZE_NAMED else None)
        relation_said = u[19] < LOOSE_PLACE_NAMED
    things = (
        _thing(shape, colour, size, here, SCATTER[2], u[9], u[10], u[11]),
        _thing(shape_2, colour_2, size_2, there, SCATTER[2], u[12], u[13], u[14]),
    )
    if not relation_said and u[20] < 0.5 and not ordered:  # "and" promises no order
        named, named_2 = named_2, named
    facts = Facts(told, (named, named_2), relation=relation if relation_said else None)
    return Item(Scene(ground, things), facts, loose_caption(facts, wording))


def _another(first: Triple, u: float) -> Triple:
    """Return a trained triple on the same background as ``first`` with another shape, another colour or both."""
    candidates = ON_GROUND[first[2]]
    return candidates[(PLACE_IN[first] + 1 + int(u * (len(candidates) - 1))) % len(candidates)]


def _thing(
    shape: str, colour: str, size: str, off: tuple[float, float], scatter: float, u: float, v: float, w: float
) -> Thing:
    """Place a thing near ``off`` from the centre; ``u``, ``v``, ``w`` in [0, 1) vary its position and size."""
    x = MIDDLE + off[0] + scatter * (2 * u - 1)
    y = MIDDLE + off[1] + scatter * (2 * v - 1)
    return Thing(shape, colour, size, x, y, RADIUS[size] * (1 + SWELL * (2 * w - 1)))


__all__ = [
    "HELD_OUT",
    "TRAINED",
    "Item",
    "Shapes",
    "batch",
    "drawn",
    "held_out",
    "held_out_prompts",
    "items",
    "loose_prompts",
    "single_object_prompts",
    "two_object_prompts",
]
