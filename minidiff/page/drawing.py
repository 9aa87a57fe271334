"""Charts and rulers as a file of their own: one SVG below another, with the colours of the kit, light and dark."""

from __future__ import annotations

from collections.abc import Sequence

from minidiff.page.html import Html, resource, tag
from minidiff.page.ruler import Ruler
from minidiff.page.svg import Chart

HEAD, GAP, LINE = 32, 12, 20  # heights in pixels: of the title, between two pictures, of a line of the legend
KEY = 14


def drawing(title: str, pictures: Sequence[Chart | Ruler]) -> str:
    """Return an SVG file. ``title``: what stands above the pictures."""
    width = max(picture.width for picture in pictures)
    parts, y = [tag("text", title, x=GAP, y=HEAD - 10, cls="head")], HEAD
    for picture in pictures:
        parts.append(tag("g", picture.drawn(), transform=f"translate(0 {y})"))
        y += picture.tall
        if isinstance(picture, Chart):
            for one in (s for s in picture.series if s.kind != "points"):
                parts.append(_key(str(one.name), one.colour, y))
                y += LINE
        y += GAP
    style = tag("style", Html(resource("minidiff.page", "drawing.css")))
    paper = tag("rect", width=width, height=y, cls="paper")
    whole = tag(
        "svg",
        tag("title", title),
        style,
        paper,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {y}",
        width=width,
        height=y,
    )
    return f"{whole}\n"


def _key(name: str, colour: int, y: int) -> Html:
    rect = tag("rect", x=52, y=y + 6, width=KEY, height=4, cls=f"key c{colour}")
    return Html(rect + tag("text", name, x=52 + KEY + 6, y=y + 12))
