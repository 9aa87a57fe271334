"""Rulers as inline SVG: places along one axis, a row of marks for each of several choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minidiff.page.html import Html, tag
from minidiff.page.languages import Said, label, say
from minidiff.page.svg import steps

LEFT, RIGHT, HIGH, BELOW = 150, 14, 26, 22  # margins and the height of a row, in pixels


@dataclass(frozen=True)
class Marks:
    """One row: places on the axis. ``colour``: 1 to 6, of the page's. ``pale``: places that are marked less."""

    name: Said
    places: Sequence[float]
    colour: int = 1
    pale: Sequence[float] = ()


@dataclass(frozen=True)
class Ruler:
    """Rows of marks over one axis from ``low`` to ``high``. ``id_``: that of the picture, for a script."""

    title: Said
    rows: Sequence[Marks]
    low: float
    high: float
    width: int = 760
    id_: str | None = None

    def svg(self) -> Html:
        """Draw it."""
        names = label(self.title)
        picture = tag(
            "svg",
            tag("title", names),
            self.drawn(),
            viewBox=f"0 0 {self.width} {self.tall}",
            role="img",
            aria_label=names,
            cls="ruler",
            id=self.id_,
            data_low=self.low,
            data_high=self.high,
            data_left=LEFT,
            data_right=self.width - RIGHT,
        )
        return tag("figure", tag("figcaption", say(self.title)), picture)

    @property
    def tall(self) -> int:
        """Height in pixels."""
        return HIGH * len(self.rows) + BELOW

    def drawn(self) -> Html:
        """Return what stands inside the picture."""
        bottom = HIGH * len(self.rows)
        parts = []
        for x in steps(self.low, self.high, 10):
            at = self.at(x)
            parts.append(tag("line", x1=at, x2=at, y1=0, y2=bottom, cls="grid"))
            parts.append(tag("text", f"{x:g}", x=at, y=bottom + 15, text_anchor="middle"))
        for k, row in enumerate(self.rows):
            parts.append(say(row.name, "text", {"x": LEFT - 10, "y": HIGH * k + 17, "text_anchor": "end"}))
            parts.append(self.row(row, k))
        return Html("".join(parts))

    def at(self, x: float) -> float:
        """Return the pixel of a place on the axis."""
        return round(LEFT + (x - self.low) / (self.high - self.low) * (self.width - LEFT - RIGHT), 1)

    def row(self, row: Marks, k: int) -> Html:
        """Draw the marks of row ``k``, counted from the top."""
        top, end = HIGH * k + 5, HIGH * k + HIGH - 5
        groups = ((row.pale, f"tick pale c{row.colour}"), (row.places, f"tick c{row.colour}"))
        drawn = [
            tag("line", x1=self.at(x), x2=self.at(x), y1=top, y2=end, cls=cls) for places, cls in groups for x in places
        ]
        return tag("g", *drawn, data_row=k)
