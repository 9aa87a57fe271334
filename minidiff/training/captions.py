"""Captions of the shapes: a small language in which each fact about a picture can be worded in several ways.

    a large red star on a blue background            blue background with a big red star
    small white ring above green cross on grey       a pink circle in the middle of a black background

A caption is generated from :class:`Facts`, which hold one canonical word for each fact ("large", "gray"); synonyms and
the order of the phrases are chosen at that point. Captions are in lower case, with the comma as the only punctuation.
A loose caption is one as people type it first, which leaves out what it likes:

    a blue square       small green circle       two circles       star on a blue background       the ring on top
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
LOOSE_SYNONYMS = SYNONYMS | {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top", "on the top"),
    "bottom": ("at the bottom", "on the bottom"),
    "centre": ("in the middle", "in the centre", "in the center"),
    "left of": ("left of", "to the left of", "on the left of"),
}
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}

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
# Loose captions: {subject} is the thing with its article and place, two things, or "two" and a plural.
LOOSE_ON_GROUND = (
    "{subject} on a {ground} background",
    "{subject} on {ground}",
    "{subject}, {ground} background",
    "a {ground} background with {subject}",
    "{ground} background with {subject}",
    "{ground} background, {subject}",
)
LOOSE_ARTICLES = ("{a} ", "", "", "the ")


@dataclass(frozen=True)
class Named:
    """One thing as a caption names it; ``size`` and ``colour`` are None if the caption does not say them."""

    shape: str
    colour: str | None
    size: str | None = None


@dataclass(frozen=True)
class Facts:
    """Facts that a caption states: the background, one or two things, and optionally where they are.

    ``background``: None if the caption does not say it. ``place``: of a single thing, one of ``PLACES``. ``relation``:
    of the first of two things to the second, one of ``RELATIONS``; None for two things joined by "and" or by a plural.
    """

    background: str | None
    things: tuple[Named, ...]
    place: str | None = None
    relation: str | None = None


def caption(facts: Facts, choice: int) -> str:
    """Word ``facts``, which state all colours, as a caption.

    ``choice``, any number from 0, selects the wording; its digits the synonyms.
    """
    chosen = _Chosen(choice, SYNONYMS)
    pick, say, name = chosen.pick, chosen.say, chosen.name
    assert facts.background is not None
    ground, first = say(facts.background), name(facts.things[0])
    if len(facts.things) == 1:
        at = " " + say(facts.place) if facts.place else ""
        return pick(ONE).format(a=article(first), thing=first, at=at, ground=ground)
    second = name(facts.things[1])
    of = say(facts.relation) if facts.relation else "and"
    form = pick(TWO)
    return form.format(a=article(first), thing=first, of=of, b=article(second), other=second, ground=ground)


def loose_caption(facts: Facts, choice: int) -> str:
    """Word ``facts`` as a loose caption; two things that are named alike become a plural. ``choice``: as above."""
    chosen = _Chosen(choice, LOOSE_SYNONYMS)
    articles, first = chosen.pick(LOOSE_ARTICLES), facts.things[0]
    if len(facts.things) == 1:
        at = " " + chosen.say(facts.place) if facts.place else ""
        subject = chosen.named(first, articles) + at
    elif facts.things[1] == first and facts.relation is None:
        subject = "two " + chosen.name(first, PLURALS[first.shape])
    else:
        of = chosen.say(facts.relation) if facts.relation else "and"
        subject = f"{chosen.named(first, articles)} {of} {chosen.named(facts.things[1], articles)}"
    if facts.background is None:
        return subject
    return chosen.pick(LOOSE_ON_GROUND).format(subject=subject, ground=chosen.say(facts.background))


class _Chosen:
    """Choices of a wording, taken one after another from the digits of a number."""

    def __init__(self, choice: int, synonyms: Mapping[str, Sequence[str]]) -> None:
        self.choice, self.synonyms = choice, synonyms

    def pick(self, options: Sequence[str]) -> str:
        self.choice, i = divmod(self.choice, len(options))
        return options[i]

    def say(self, word: str) -> str:
        return self.pick(self.synonyms[word]) if word in self.synonyms else word

    def name(self, thing: Named, shape: str | None = None) -> str:
        """Return size, colour and shape, as far as they are said."""
        size = self.say(thing.size) if thing.size else ""
        return " ".join(filter(None, (size, thing.colour, shape or thing.shape)))

    def named(self, thing: Named, articles: str) -> str:
        name = self.name(thing)
        return articles.format(a=article(name)) + name


def article(name: str) -> str:
    """Return the article of a size, a colour or a shape: only "orange" takes "an"."""
    return "an" if name.startswith("orange") else "a"


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """Return every word that a caption with all parts can contain, about fifty, without the comma."""
    canonical = (*SHAPES, *COLOURS, *BACKGROUNDS, "medium", "above", "and", "a", "an")
    return _words_of(*canonical, *(phrase for options in SYNONYMS.values() for phrase in options), *ONE, *TWO)


@lru_cache(maxsize=1)
def loose_vocabulary() -> frozenset[str]:
    """Return every word that any caption can contain: those of loose ones, such as plurals, as well."""
    synonyms = (phrase for options in LOOSE_SYNONYMS.values() for phrase in options)
    return vocabulary() | _words_of("two", *PLURALS.values(), *synonyms, *LOOSE_ON_GROUND, *LOOSE_ARTICLES)


def _words_of(*phrases: str) -> frozenset[str]:
    return frozenset(word for phrase in phrases for word in words(re.sub(r"\{\w+\}", " ", phrase)))


def words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case, in order, without surrounding punctuation ("Star!" -> "star")."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())
