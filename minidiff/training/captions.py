"""Captions of the shapes: a small language in which each fact about a picture can be worded in several ways.

    a large red star on a blue background            blue background with a big red star
    small white ring above green cross on grey       a pink circle in the middle of a black background

A caption is generated from :class:`Facts`, which hold one canonical word for each fact ("large", "gray"); synonyms and
the order of the phrases are chosen at that point. Captions are in lower case, with the comma as the only punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = ("white", "black", "gray", "blue", "green", "yellow")
SIZES = ("small", "medium", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "above")  # of the first thing to the second

SYNONYMS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "gray": ("gray", "grey"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "centre": ("in the centre", "in the center", "in the middle"),
    "left of": ("left of", "to the left of"),
}

# {a}: article; {thing}: size, colour and shape; {at}: the place with a space before it, or nothing; {of}: the relation.
ONE = (
    "{a} {thing}{at} on a {ground} background",
    "{a} {thing} on a {ground} background{at}",
    "a {ground} background with {a} {thing}{at}",
    "{ground} background with {a} {thing}{at}",
    "{ground} background, {thing}{at}",
    "{thing}{at}, {ground} background",
    "{thing}{at} on {ground}",
    "{a} {thing}{at} on {ground}",
)
TWO = (
    "{a} {thing} {of} {b} {other} on a {ground} background",
    "a {ground} background with {a} {thing} {of} {b} {other}",
    "{ground} background with {a} {thing} {of} {b} {other}",
    "{ground} background, {thing} {of} {other}",
    "{thing} {of} {other}, {ground} background",
    "{thing} {of} {other} on {ground}",
    "{a} {thing} {of} {b} {other} on {ground}",
)


@dataclass(frozen=True)
class Named:
    """One thing as a caption names it; ``size`` is None if the caption does not say it."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Facts:
    """Facts that a caption states: the background, one or two things, and optionally where they are.

    ``place``: of a single thing, one of ``PLACES``. ``relation``: of the first of two things to the second, one of
    ``RELATIONS``; None for two things joined by "and".
    """

    background: str
    things: tuple[Named, ...]
    place: str | None = None
    relation: str | None = None


def caption(facts: Facts, choice: int) -> str:
    """Word ``facts`` as a caption. ``choice``, any number from 0, selects the wording; its digits the synonyms."""

    def pick(options: Sequence[str]) -> str:
        nonlocal choice
        choice, i = divmod(choice, len(options))
        return options[i]

    def say(word: str) -> str:
        return pick(SYNONYMS[word]) if word in SYNONYMS else word

    def name(thing: Named) -> str:
        size = say(thing.size) + " " if thing.size else ""
        return f"{size}{thing.colour} {thing.shape}"

    ground, first = say(facts.background), name(facts.things[0])
    if len(facts.things) == 1:
        at = " " + say(facts.place) if facts.place else ""
        return pick(ONE).format(a=article(first), thing=first, at=at, ground=ground)
    second = name(facts.things[1])
    of = say(facts.relation) if facts.relation else "and"
    form = pick(TWO)
    return form.format(a=article(first), thing=first, of=of, b=article(second), other=second, ground=ground)


def article(name: str) -> str:
    """Return the article of a size or a colour: only "orange" takes "an"."""
    return "an" if name.startswith("orange") else "a"


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """Return every word that a caption can contain, about fifty, without the comma."""
    canonical = (*SHAPES, *COLOURS, *BACKGROUNDS, "medium", "above", "and", "a", "an")
    phrases = (*canonical, *(phrase for options in SYNONYMS.values() for phrase in options), *ONE, *TWO)
    return frozenset(word for phrase in phrases for word in words(re.sub(r"\{\w+\}", " ", phrase)))


def words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case, in order, without surrounding punctuation ("Star!" -> "star")."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())
