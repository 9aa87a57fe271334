"""One part of the page, the questions that it answers, and the lines of code that it is about."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import minidiff
from minidiff.page.html import Child, Html, tag
from minidiff.page.languages import Text, say

TYPING = re.compile(r"\s*# type: ignore\S*")  # notes for mypy, not for readers
PACKAGE = Path(minidiff.__file__).resolve().parent


class Line(NamedTuple):
    """One line of minidiff's code."""

    file: str
    number: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """``anchor``: its name in the address. ``body``: what it shows without a script. ``data``: what scripts and tests
    read. ``code``: the lines that did what it shows. ``uses``: other panels whose script and style it needs."""

    anchor: str
    title: Text
    body: Html
    code: tuple[Line, ...]
    data: Any = None
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Left:
    """A panel that is left out, and why."""

    anchor: str
    title: Text
    why: Text


def line(function: Callable[..., Any] | type, holding: str = "") -> Line:
    """Return the first line of a function or class that holds a text, by default its beginning.

    Raises LookupError if there is none: the code has changed, and the page with it.
    """
    function = inspect.unwrap(function)  # from decorators
    code, first = inspect.getsourcelines(function)
    for number, text in enumerate(code, start=first):
        if holding in text and text.strip():
            file = Path(inspect.getsourcefile(function) or "").resolve()
            return Line(f"minidiff/{file.relative_to(PACKAGE).as_posix()}", number, TYPING.sub("", text.strip()))
    raise LookupError(f"no line of {function.__qualname__} holds {holding!r}")


def answer(anchor: str, question: Text, *children: Child) -> Html:
    """Return a question with its answer, which an address can name."""
    return tag("section", say(question, "h3"), *children, id=anchor, cls="answer")
