r"""Prompts that change on the way, as AUTOMATIC1111's web UI writes them.

    [before:after:when]   "before" up to ``when``, then "after"
    [after:when]          nothing up to ``when``       [before::when]   nothing from then on
    [one|two|three]       one after the other, a model call each; a place may be empty, as in [fe|]male

``when`` is a number of steps or, with a point in it, a fraction of all: [a:b:10] and [a:b:0.5]. Texts inside nest.
Round and square brackets that are emphasis stay as they are, and so does what matches none of these. A "|" outside of
such brackets, or a backslash before nothing, makes the whole text plain: then no bracket of it is a schedule.

The grammar, after that of the program, with ``text`` for runs without ``\ [ ] ( ) : |`` but with escaped characters:

    start      = { item | "[" | "]" | "(" | ")" | ":" }
    item       = text | emphasis | scheduled | alternate
    prompt     = { item }
    emphasis   = "(" prompt [ ":" prompt ] ")"  |  "[" prompt "]"
    scheduled  = "[" [ prompt ":" ] prompt ":" number "]"
    alternate  = "[" prompt "|" [ prompt ] { "|" [ prompt ] } "]"

It is ambiguous: every bracket may also be a sign of ``start``. Here a schedule always counts. So it does in the program
but for texts with brackets too many beside a schedule, such as [a:b:3]]: its parser (lark 1.1.2) reads those in either
way, from process to process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from minidiff.config import check

DEEPEST = 50  # brackets in brackets
MOST = 10_000  # model calls with a text each, many more than any plan has

_TEXT = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_NUMBER = re.compile(
    r":\s*([+-]?(?:[0-9]+[eE][+-]?[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+))\s*\]"
)


@dataclass(frozen=True)
class Scheduled:
    """``before`` up to step ``when``, a number as it is written, then ``after``."""

    before: Prompt
    after: Prompt
    when: str

    def switch(self, steps: int) -> int:
        """Return the last of ``steps`` steps, counted from 1, that reads ``before``."""
        value = float(self.when) * (steps if "." in self.when else 1)
        return int(min(steps, max(value, -1.0)))


@dataclass(frozen=True)
class Alternate:
    """One of ``texts`` after the other."""

    texts: tuple[Prompt, ...]


Item = str | Scheduled | Alternate
Prompt = tuple[Item, ...]


class _Parser:
    """Reads brackets from the last to the first, so that each finds those inside it already read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found: dict[int, tuple[Prompt, int, int]] = {}  # at a bracket: what it is, its end, how deep it nests
        for i in reversed([m.start() for m in re.finditer(r"[\[(]", text)]):
            self._bracket(i)

    def _prompt(self, i: int) -> tuple[Prompt, int, int]:
        """Read items from ``i`` on: they, where they end, and how deep they nest."""
        items: list[Item] = []
        deep = 0
        while i < len(self.text):
            if i in self.found:
                inner, i, below = self.found[i]
                items += inner
                deep = max(deep, below)
                continue
            plain = _TEXT.match(self.text, i)
            if plain is None:
                break
            items.append(plain[0])
            i = plain.end()
        return tuple(items), i, deep

    def _bracket(self, i: int) -> None:
        text, (first, j, deep) = self.text, self._prompt(i + 1)
        opened, sign = text[i], text[j : j + 1]
        if opened == "(":
            inner = first
            if sign == ":":
                second, j, below = self._prompt(j + 1)
                inner, deep = (*first, ":", *second), max(deep, below)
            if text[j : j + 1] == ")":
                self._keep(i, ("(", *inner, ")"), j + 1, deep)
        elif sign == "]":
            self._keep(i, ("[", *first, "]"), j + 1, deep)
        elif sign == "|":
            texts = [first]
            while text[j : j + 1] == "|":
                one, j, below = self._prompt(j + 1)
                texts.append(one)
                deep = max(deep, below)
            if text[j : j + 1] == "]":
                self._keep(i, (Alternate(tuple(texts)),), j + 1, deep)
        elif sign == ":":
            second, k, below = self._prompt(j + 1)
            both, only = _NUMBER.match(text, k), _NUMBER.match(text, j)
            if both is not None:
                self._keep(i, (Scheduled(first, second, both[1]),), both.end(), max(deep, below))
            elif only is not None:
                self._keep(i, (Scheduled((), first, only[1]),), only.end(), deep)

    def _keep(self, i: int, items: Prompt, end: int, deep: int) -> None:
        check(deep < DEEPEST, f"brackets nest more than {DEEPEST} deep; leave some out")
        self.found[i] = (items, end, deep + 1)

    def whole(self) -> Prompt | None:
        """Return the text, or None if nothing in it is a schedule."""
        items: list[Item] = []
        i = 0
        while i < len(self.text):
            inner, i, _ = self._prompt(i)
            items += inner
            if i < len(self.text):
                if self.text[i] not in "[]():":
                    return None
                items.append(self.text[i])
                i += 1
        return _merged(items)


def _merged(items: Sequence[Item]) -> Prompt:
    """Join neighbouring strings, since a text is put together anew for every step."""
    runs = groupby(items, key=lambda item: isinstance(item, str))
    found: list[Item] = []
    for plain, run in runs:
        found += ["".join(map(str, run))] if plain else run
    return tuple(found)


def _switches(prompt: Prompt, steps: int) -> set[int]:
    found: set[int] = set()
    for item in prompt:
        if isinstance(item, Scheduled):
            found |= {item.switch(steps)} | _switches(item.before, steps) | _switches(item.after, steps)
        elif isinstance(item, Alternate):
            check(steps <= MOST, f"a prompt with [one|two] is read anew at each of {steps} steps; {MOST} are the most")
            found.update(range(1, steps + 1))
            for inner in item.texts:
                found |= _switches(inner, steps)
    return found


def _at(prompt: Prompt, step: int, steps: int) -> str:
    texts = []
    for item in prompt:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, Scheduled):
            texts.append(_at(item.before if step <= item.switch(steps) else item.after, step, steps))
        else:
            texts.append(_at(item.texts[(step - 1) % len(item.texts)], step, steps))
    return "".join(texts)


def schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """Return the texts that a text stands for in ``steps`` steps, each with the last step that reads it.

    The last one reaches to the end. Steps are counted from 1. Raises :class:`ConfigError` for brackets too deep,
    and for more than ``MOST`` steps of a text that is another in each.
    """
    prompt = _Parser(text).whole() if "[" in text else None
    if prompt is None:
        return [(steps, text)]
    ends = sorted({steps, *(end for end in _switches(prompt, steps) if end >= 1)})
    return [(end, _at(prompt, end, steps)) for end in ends]
