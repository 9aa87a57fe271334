"""CLIP's notion of letters, numbers, white space and capitals: splits text into words for byte-pair encoding.

CLIP's rule is one line of regular expression (Radford et al. 2021) behind canonical composition and lower case, but
it leans on Unicode, and every program brings its own: the reference's three steps follow three versions, and Python's
tables change with Python. So the facts are read from ``assets/unicode.txt``, generated from the reference, and the
result is the same under every Python.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# Kept in one piece by the first pass over the text, which decides what its neighbours join; then split after all.
MARKERS = {f"<|{name}|>": ("<|", name, "|>") for name in ("startoftext", "endoftext")}


@dataclass(frozen=True)
class UnicodeTables:
    """``word`` finds one word of normalised text, ``composing`` a run that NFC may change; ``lower`` maps capitals."""

    word: re.Pattern[str]
    composing: re.Pattern[str]
    lower: dict[int, str]


@cache
def unicode_tables() -> UnicodeTables:
    """The generated table, read once, when the first text comes."""
    lines = files("minidiff").joinpath("assets/unicode.txt").read_text(encoding="ascii").splitlines()
    facts = {name: rest.split() for name, rest in (line.split(" ", 1) for line in lines if not line.startswith("#"))}
    letters, numbers, spaces = (_members(facts[name]) for name in ("letters", "numbers", "spaces"))
    markers = "|".join(map(re.escape, MARKERS))
    word = f"{markers}|'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{numbers}]|[^{spaces}{letters}{numbers}]+"
    return UnicodeTables(
        word=re.compile(word),
        composing=re.compile(f"[{_members(facts['composing'])}]+"),
        lower=dict(pair for run in facts["lower"] for pair in _lower(run)),
    )


def _members(ranges: list[str]) -> str:
    """``41-5a aa`` as the inside of a character class."""
    return "".join("-".join(f"\\U{int(c, 16):08x}" for c in r.split("-")) for r in ranges)


def _lower(run: str) -> Iterator[tuple[int, str]]:
    """``41-5a/1:61`` (every capital of a run, step 1) and ``130:69.307`` (one capital, two letters) as pairs."""
    capitals, target = run.split(":")
    first, *more = (int(c, 16) for c in re.split("[-/]", capitals))
    if not more:
        yield first, "".join(chr(int(c, 16)) for c in target.split("."))
        return
    last, step = more
    for c in range(first, last + 1, step):
        yield c, chr(c - first + int(target, 16))


def normalize(text: str) -> str:
    """Canonical composition (NFC) of the reference's version of Unicode, then lower case, character by character.

    Everything that this version does not know stands for itself and keeps its neighbours apart, so NFC runs on the
    pieces between; what it does know, Unicode promised to never compose in another way. There is no special sigma at
    the end of a word.
    """
    if text.isascii():
        return text.lower()
    tables = unicode_tables()
    text = tables.composing.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)
    return text.translate(tables.lower)


def words(text: str) -> list[str]:
    """Normalised text as words: contractions, runs of letters, single numbers, runs of anything else but space."""
    found = unicode_tables().word.findall(text)
    if MARKERS.keys().isdisjoint(found):
        return found
    return [part for word in found for part in MARKERS.get(word, (word,))]


def mend(text: str) -> str:
    """A surrogate pair becomes the character it stands for, a lone surrogate U+FFFD: UTF-8 can write neither."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
