r"""Emphasis as AUTOMATIC1111's web UI writes it, and sd_embed after it.

    (words)        weight times 1.1          ((words))  1.21, and so on
    (words:1.3)    weight times 1.3          a number with a point, no exponent
    [words]        weight divided by 1.1
    \( \) \[ \] \\ the character itself; any other backslash is dropped
    BREAK          ends a chunk

Brackets nest, and their factors multiply. One that nothing closes reaches to the end of the text; one that closes
nothing is a character like any other, and so is a colon without a number and a bracket behind it. Neighbours of equal
weight are one fragment. BREAK is a fragment of weight -1; inside brackets their factor applies to that too, and it is
the word "BREAK" again, as in both programs.
"""

from __future__ import annotations

import re

from minidiff.config import quote
from minidiff.errors import ConfigError
from minidiff.pipeline.dialects.chunks import Fragment

MORE, LESS = 1.1, 1 / 1.1
BREAK: Fragment = ("BREAK", -1)

_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_SIGN = r"\\[][()\\]?|[][()]|[^][\\():]+|:"
_LEXERS = {
    spaces: re.compile(rf":{gap}(?P<weight>[+-]?[.\d]+){gap}\)|(?P<text>{_SIGN})")
    for spaces, gap in ((True, r"\s*"), (False, ""))
}


def fragments(text: str, spaces: bool = True) -> list[Fragment]:
    """Return a text in fragments with their weights. ``spaces``: allow them around a number, ``( words : 1.3 )``.

    Raises :class:`ConfigError` for a number that is none, such as 1.2.3.
    """
    found: list[tuple[str, float]] = []
    rounds: list[int] = []
    squares: list[int] = []

    def scale(since: int, factor: float) -> None:
        found[since:] = [(text, weight * factor) for text, weight in found[since:]]

    for match in _LEXERS[spaces].finditer(text):
        sign, weight = match[0], match["weight"]
        if sign[0] == "\\":
            found.append((sign[1:], 1.0))
        elif sign == "(":
            rounds.append(len(found))
        elif sign == "[":
            squares.append(len(found))
        elif weight is not None and rounds:
            scale(rounds.pop(), _number(weight))
        elif sign == ")" and rounds:
            scale(rounds.pop(), MORE)
        elif sign == "]" and squares:
            scale(squares.pop(), LESS)
        else:
            first, *others = _BREAK.split(sign)
            found.append((first, 1.0))
            for part in others:
                found += [BREAK, (part, 1.0)]
    for since in rounds:
        scale(since, MORE)
    for since in squares:
        scale(since, LESS)
    return _joined(found) or [("", 1.0)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the weight {quote(text)} is no number; write it as in (word:1.3)") from None


def _joined(found: list[Fragment]) -> list[Fragment]:
    """Join neighbours of equal weight."""
    joined: list[Fragment] = []
    for text, weight in found:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined
