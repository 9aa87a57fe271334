"""Texts in two languages. Both stand in the page, marked with ``lang``, and the style sheet shows one of them.

A text may hold `code` between backticks, *emphasis* between asterisks, and ``{names}`` that are filled in. What is
filled in is escaped. A plain ``str``, such as a name or a number, is the same in all languages, and stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from minidiff.page.html import Html, escaped, flat, resource, tag

LANGUAGES = ("en", "zh")
BETWEEN = "\u00a0/\u00a0"  # of both languages in an attribute, where the kit's script looks for it


class Text(NamedTuple):
    """One text, in English and in Chinese."""

    en: str
    zh: str


Said = Text | str


def words(package: str, name: str) -> dict[str, Text]:
    """Return the texts of a JSON file of a package, by name: {name: {"en": ..., "zh": ...}}."""
    return {key: Text(**both) for key, both in json.loads(resource(package, name)).items()}


def say(
    text: Said, element: str = "span", attributes: Mapping[str, str | float] | None = None, **values: object
) -> Html:
    """Return ``text`` in both languages, each in an ``element`` with these ``attributes``.

    ``values``: what stands for the names in braces; a :class:`Text` among them is taken in the same language.
    """
    if isinstance(text, str):
        return tag(element, text, **(attributes or {}))
    said = ((code, marked(getattr(text, code), code, values)) for code in LANGUAGES)
    return flat([tag(element, html, lang=code, **(attributes or {})) for code, html in said])


def label(text: Said, **values: object) -> str:
    """Return ``text`` as plain words in both languages, for attributes such as ``aria-label``."""
    if isinstance(text, str):
        return text
    return BETWEEN.join(getattr(text, code).format(**_in(code, values)) for code in LANGUAGES)


def marked(text: str, code: str, values: dict[str, object]) -> Html:
    """Return one language's text as HTML, with its marks turned into elements and its names filled in."""
    html = escape(text, quote=False)
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    html = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"<em>\1</em>", html)
    filled = {
        name: value if isinstance(value, Html) else escaped(str(value)) for name, value in _in(code, values).items()
    }
    return Html(html.format(**filled))


def _in(code: str, values: dict[str, object]) -> dict[str, object]:
    return {name: getattr(value, code) if isinstance(value, Text) else value for name, value in values.items()}
