"""Unicode tables of CLIP's tokenizer, which normalise text and split it into words for byte-pair encoding.

CLIP's rule is a single regular expression (Radford et al. 2021) after canonical composition and lower case, but it
depends on the version of Unicode: the reference's three steps use three versions, and Python's tables change with
Python. Therefore the tables are read from ``assets/unicode.txt``, which was generated from the reference, and the
result is the same under every version of Python.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# Kept whole by the first pass over the text, which decides how its neighbours are joined, and split afterwards.
MARKERS = {f"<|{name}|>": ("<|", name, "|>") for name in ("startoftext", "endoftext")}


@dataclass(frozen=True)
class UnicodeTables:
    """Tables: ``word`` matches a word of normalised text, ``composing`` a run that NFC may change; ``lower`` maps
    capitals."""

    word: re.Pattern[str]
    composing: re.Pattern[str]
    lower: dict[int, str]


@cache
def unicode_tables() -> UnicodeTables:
    """Return the generated tables, which are read once, on first use."""
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
    """Convert ``41-5a aa`` to the inside of a character class."""
    return "".join("-".join(f"\\U{int(c, 16):08x}" for c in r.split("-")) for r in ranges)


def _lower(run: str) -> Iterator[tuple[int, str]]:
    """Convert ``41-5a/1:61`` (a run of capitals, step 1) and ``130:69.307`` (one capital, two letters) to pairs."""
    capitals, target = run.split(":")
    first, *more = (int(c, 16) for c in re.split("[-/]", capitals))
    if not more:
        yield first, "".join(chr(int(c, 16)) for c in target.split("."))
        return
    last, step = more
    for c in range(first, last + 1, step):
        yield c, chr(c - first + int(target, 16))


def normalize(text: str) -> str:
    """Apply canonical composition (NFC) in the reference's version of Unicode, then lower case by character.

    Characters unknown to that version stay as they are and separate their neighbours, so NFC is applied to the pieces
    in between; for known characters, Unicode guarantees that composition never changes. There is no special sigma at
    the end of a word.
    """
    if text.isascii():
        return text.lower()
    tables = unicode_tables()
    text = tables.composing.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)
    return text.translate(tables.lower)


def words(text: str) -> list[str]:
    """Split normalised text into words: contractions, runs of letters, single numbers, other runs without spaces."""
    found = unicode_tables().word.findall(text)
    if MARKERS.keys().isdisjoint(found):
        return found
    return [part for word in found for part in MARKERS.get(word, (word,))]


def mend(text: str) -> str:
    """Replace surrogate pairs by their character and lone surrogates by U+FFFD, since UTF-8 can encode neither."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
