"""HTML from Python: elements whose text and attributes are escaped, and whole documents without any request.

Whatever comes from outside (a prompt, a tensor's name, a file's metadata) reaches a page as a plain ``str``, and is
escaped there. Only :class:`Html` is taken as it is, and only this package and its callers' literals make it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any

# No request can leave a page, and nothing runs in it but the one script that it was written with.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {}"
VOID = frozenset(("br", "hr", "img", "input", "meta"))  # elements without an end


# HTML has no way to write most control characters (nor half of a surrogate pair): pictures of them stand in.
UNSEEN = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\f\r"}
UNSEEN |= {0x7F: 0x2421} | dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def flat(child: Child) -> Html:
    """Join children to HTML: :class:`Html` as it is, other text escaped, None as nothing."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, (str, int, float)):
        return Html(escaped(str(child)))
    return Html("".join(flat(each) for each in child))


def escaped(text: str) -> str:
    """Return text as it is written in HTML, between elements and inside of quotes."""
    return escape(text.translate(UNSEEN))


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """Return an element. ``cls`` is its class; in other names ``_`` stands for ``-``, and one at the end is dropped.

    An attribute that is True is written without a value; one that is None or False is left out.
    """
    said = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        said.append(f" {key}" if value is True else f' {key}="{escaped(str(value))}"')
    start = f"<{name}{''.join(said)}>"
    return Html(start if name in VOID else f"{start}{flat(children)}</{name}>")


def embedded(data: Any, id_: str) -> Html:
    """Return a script element that holds ``data`` as JSON, which no content can end: ``<`` is written as an escape."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{escape(id_)}">{text}</script>')


def data_uri(content: bytes, kind: str) -> str:
    """Return ``content`` as an address that holds it; ``kind``: its media type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def resource(package: str, name: str) -> str:
    """Return a text file of a package, such as a style sheet."""
    return files(package).joinpath(name).read_text("utf-8")


def table(names: Iterable[Child], lines: Iterable[Iterable[Child]], cls: str | None = None) -> Html:
    """Return a table that scrolls sideways if it is wider than the page."""
    head = tag("tr", *(tag("th", name, scope="col") for name in names))
    body = [tag("tr", *(tag("td", cell) for cell in line)) for line in lines]
    whole = tag("table", tag("thead", head), tag("tbody", *body), cls=cls)
    return tag("div", whole, cls="wide", tabindex=0, role="region")


def document(
    title: str,
    body: Child,
    *,
    language: str = "en",
    styles: Iterable[str] = (),
    scripts: Iterable[str] | None = None,
    data: Mapping[str, Any] | None = None,
) -> str:
    """Return the whole page.

    ``language``: that which is shown first. ``styles`` and ``scripts`` follow the kit's own; without ``scripts``
    nothing runs in the page. ``data``: JSON by the name of its script element. Raises ValueError for a style sheet or
    script that would end its own element.
    """
    style = "\n".join([resource("minidiff.page", "kit.css"), *styles])
    script = "" if scripts is None else "\n".join([resource("minidiff.page", "kit.js"), *scripts])
    for text in (style, script):
        if "</" in text:
            raise ValueError("a style sheet or a script of a page holds '</', which would end its element")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content=POLICY.format(f"'sha256-{known}'" if script else "'none'"),
        ),
        tag("title", title),
        tag("style", Html(style)),
    )
    held = [embedded(value, name) for name, value in (data or {}).items()]
    body = tag("body", body, held, tag("script", Html(script)) if script else None)
    return f"<!doctype html>\n{tag('html', head, body, lang=language, data_lang=language)}\n"
