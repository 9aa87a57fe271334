r"""Grammar of prompts for compel 2.5.1, after its prompt_parser.py.

    word+   word--    weight times 1.1 for each +, 0.9 for each -
    (words)+  "words"1.3  (words)0.8    the same for several words, or a number; no space in between
    word.attend(1.3)  (words).attend(++)    the same in full
    (words)           just the words; brackets nest, and their weights multiply
    \( \) \"          the character itself
    ("one", "two").blend(0.7, 0.3)      an average; the last argument may be no_normalize
    ("one", "two").and(1, 0.5)          one behind the other

The last two are a whole prompt or nothing. What does not match is plain text up to the next space; inside brackets and
quotes, where anything that is no word, comma or full stop fails, the brackets themselves are plain text then.

    prompt    = { attention | quoted | bracket | any characters up to a space }
    bracket   = "(" { attention | bracket | quoted | word | "," | "." } ")"
    quoted    = a string in double quotes, which is read as the inside of a bracket
    attention = ( quoted | bracket | word ) ".attend" "(" factor ")"
              | ( quoted | bracket ) factor  |  word ( "+" ... | "-" ... )
    factor    = "+" ... | "-" ... | number

``.swap(...)`` (attention maps of another prompt), ``withLora(...)`` and ``useLora(...)`` are named and refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minidiff.config import check, quote
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.pipeline.dialects.chunks import Fragment, check_weight

MORE, LESS = 1.1, 0.9
DEEPEST = 50  # brackets in brackets
RAW = "no_normalize"

_SPACE = " \t\n\r"
_SIGNS = r'()",.+\-='
_WORD = re.compile(rf"(?:\\[{_SIGNS}]|[-+](?![{_SPACE}{_SIGNS}]|\Z)|[^{_SPACE}{_SIGNS}])+")
_FREE = re.compile(rf"[^{_SPACE}]+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n\r])*)"')
_SIGNED = re.compile(r"\++|-+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)|-?[0-9]+")
_KEYWORD = re.compile(r"[A-Za-z0-9_-]+")
_COMMA = re.compile(r",(\S)")
_OPERATOR = re.compile(r"\.(and|add|blend)")
_SWAP = re.compile(r"\.swap\s*\(")
_NETWORK = re.compile(r"(?:with|use)Lora\s*\(")
_ESCAPES = {"\\t": "\t", "\\n": "\n", "\\f": "\f", "\\r": "\r"}


@dataclass(frozen=True)
class Blend:
    """One part of a prompt: ``prompts``, more than one if they are ``blended``, with their ``shares``; ``weight``: that
    of the part."""

    prompts: tuple[list[Fragment], ...]
    shares: tuple[float, ...] = (1.0,)
    normalize: bool = True
    blended: bool = False
    weight: float = 1.0


class Weighted(NamedTuple):
    """Words whose weight is multiplied by ``factor``."""

    items: Items
    factor: float


Items = Sequence["str | Weighted"]
Found = tuple[Items, int] | None
"""Result of a reader and the place where it ends, or None."""


def clauses(text: str) -> list[Blend]:
    """Return the parts of a prompt, which stand one behind the other.

    Raises :class:`ConfigError` for ``.blend`` and ``.and`` with wrong arguments, and :class:`UnsupportedError` for what
    is not done here.
    """
    text = _COMMA.sub(r", \1", text).replace("\v", " ").replace("\f", " ")
    if _SWAP.search(text):
        raise UnsupportedError(
            ".swap() exchanges attention maps between two prompts, which is not done here; leave it out"
        )
    network = _NETWORK.search(text)
    if network is not None:
        raise UnsupportedError(
            f"{network[0]}...) asks for another network; leave it out, and give its file with --lora"
        )
    if not text.strip():
        return [Blend(([("", 1.0)],))]
    return _Parser(text).joined() or [Blend((_flat(_Parser(text).prompt()),))]


class _Parser:
    """Reads one text; every method takes a place in it, and returns what it found there and where that ends."""

    def __init__(self, text: str, deep: int = 0) -> None:
        check(deep <= DEEPEST, f"brackets and quotes nest more than {DEEPEST} deep; leave some out")
        self.text, self.deep = text, deep
        self.known: dict[int, Found] = {}  # brackets and quotes, which several rules ask for

    def skip(self, i: int) -> int:
        """Return the next place that is no space."""
        while i < len(self.text) and self.text[i] in _SPACE:
            i += 1
        return i

    def sign(self, i: int, sign: str) -> int | None:
        """Return the place behind ``sign``, with spaces before it allowed."""
        i = self.skip(i)
        return i + len(sign) if self.text.startswith(sign, i) else None

    def prompt(self) -> Items:
        """Read the whole text, in which everything has a meaning."""
        items: list[str | Weighted] = []
        i = self.skip(0)
        while i < len(self.text):
            found = self.attention(i) or self.group(i)
            if found is None:
                free = _FREE.match(self.text, i)
                assert free is not None
                found = [_plain(free[0])], free.end()
            items += found[0]
            i = self.skip(found[1])
        return items

    def inside(self, i: int) -> tuple[Items, int]:
        """Read what may stand in brackets."""
        items: list[str | Weighted] = []
        while True:
            found = self.attention(i) or self.group(i) or self.word(i)
            if found is None:
                i = self.skip(i)
                if self.text[i : i + 1] not in (",", "."):
                    return items, i
                found = [self.text[i]], i + 1
            items += found[0]
            i = found[1]

    def group(self, i: int) -> Found:
        """Read quotes or brackets."""
        i = self.skip(i)
        if i not in self.known and self.text[i : i + 1] in ('"', "("):
            self.known[i] = self._quoted(i) if self.text[i] == '"' else self._bracket(i)
        return self.known.get(i)

    def _bracket(self, i: int) -> Found:
        self.deep += 1
        check(self.deep <= DEEPEST, f"brackets and quotes nest more than {DEEPEST} deep; leave some out")
        items, end = self.inside(i + 1)
        self.deep -= 1
        closed = self.sign(end, ")")
        return None if closed is None else (items, closed)

    def _quoted(self, i: int) -> Found:
        found = _QUOTED.match(self.text, i)
        if found is None:
            return None
        text = _unquoted(found[1])
        if not text.strip():
            return [""], found.end()
        inner = _Parser(text, self.deep + 1)
        items, end = inner.inside(0)
        return (items, found.end()) if inner.skip(end) == len(text) else None

    def word(self, i: int) -> Found:
        """Read a word without any sign."""
        found = _WORD.match(self.text, self.skip(i))
        return None if found is None else ([_plain(found[0])], found.end())

    def attention(self, i: int) -> Found:
        """Read words with a weight."""
        grouped = self.group(i)
        target = grouped or self.word(i)
        if target is None:
            return None
        items, end = target
        named = self.sign(end, ".attend")
        opened = None if named is None else self.sign(named, "(")
        if opened is not None:
            factor = self.factor(self.skip(opened))
            closed = None if factor is None else self.sign(factor[1], ")")
            if factor is not None and closed is not None:
                return [Weighted(items, factor[0])], closed
        factor = self.factor(end, numbers=grouped is not None)
        return None if factor is None else ([Weighted(items, factor[0])], factor[1])

    def factor(self, i: int, numbers: bool = True) -> tuple[float, int] | None:
        """Read signs or a number."""
        signs = _SIGNED.match(self.text, i)
        if signs is not None:
            return (MORE if signs[0][0] == "+" else LESS) ** len(signs[0]), signs.end()
        number = _NUMBER.match(self.text, i) if numbers else None
        return None if number is None else (float(number[0]), number.end())

    def joined(self) -> list[Blend] | None:
        """Read ``(...).blend(...)`` or ``(...).and(...)``; None if the text is neither."""
        place = self.sign(0, "(")
        prompts: list[list[Fragment]] = []
        while place is not None:
            found = self.group(place) or self.word(place) or self._quoted_prompt(place)
            if found is None:
                return None
            prompts.append(_flat(found[0]))
            end = found[1]
            place = self.sign(end, ",")
        closed = self.sign(end, ")") if prompts else None
        operator = None if closed is None else _OPERATOR.match(self.text, self.skip(closed))
        opened = None if operator is None else self.sign(operator.end(), "(")
        options = None if opened is None else self._options(opened)
        if operator is None or options is None:
            return None
        rest = self.text[options[1] :].strip()
        what = operator[0]
        check(not rest, f"{quote(rest)} stands behind {what}(...), where compel reads nothing; leave it out")
        given = options[0]
        raw = operator[1] == "blend" and given[-1:] == [RAW]
        weights = [_weight(one, what) for one in (given[:-1] if raw else given)] or [1.0] * len(prompts)
        check(len(weights) == len(prompts), f"{what}() joins {len(prompts)} prompts, and has {len(weights)} weights")
        if operator[1] == "blend":
            check(raw or sum(weights) != 0, f"{what}() divides its weights by their sum, which is 0; add {RAW}")
            return [Blend(tuple(prompts), tuple(weights), normalize=not raw, blended=True)]
        return [Blend((own,), weight=weight) for own, weight in zip(prompts, weights, strict=True)]

    def _quoted_prompt(self, i: int) -> Found:
        """Read quotes around a whole prompt."""
        found = _QUOTED.match(self.text, self.skip(i))
        return None if found is None else (_Parser(_unquoted(found[1]), self.deep + 1).prompt(), found.end())

    def _options(self, i: int) -> tuple[list[str], int] | None:
        """Read the arguments of an operator up to its bracket: numbers and words."""
        given: list[str] = []
        closed = self.sign(i, ")")
        while closed is None:
            i = self.skip(i)
            found = _NUMBER.match(self.text, i) or _KEYWORD.match(self.text, i)
            if found is None:
                return None
            given.append(found[0])
            after = self.sign(found.end(), ",")
            closed = self.sign(found.end(), ")")
            if after is None and closed is None:
                return None
            i = after or found.end()
        return given, closed


def _weight(text: str, what: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise ConfigError(f"{what}(): the weight {quote(text)} is no number") from None
    check_weight(what, weight)
    return weight


def _unquoted(text: str) -> str:
    r"""Return the inside of quotes as it is read: \" stays escaped, \n and its like become what they stand for."""
    for mark, sign in _ESCAPES.items():
        text = text.replace(mark, sign)
    return text


def _plain(text: str) -> str:
    """Return a word without the backslashes before brackets and quotes."""
    return text.replace("\\(", "(").replace("\\)", ")").replace('\\"', '"')


def _flat(items: Items) -> list[Fragment]:
    """Return words in fragments: neighbours of equal weight are one, with spaces in between."""
    joined: list[Fragment] = []
    for text, weight in _walk(items, 1.0):
        if joined and joined[-1][1] == weight:
            joined[-1] = (_plain(f"{joined[-1][0]} {text}"), weight)
        else:
            joined.append((text, weight))
    return joined


def _walk(items: Items, factor: float) -> Iterator[Fragment]:
    for item in items:
        if isinstance(item, str):
            yield _plain(item), factor
        else:
            yield from _walk(item.items, factor * item.factor)
