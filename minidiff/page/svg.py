"""Charts as inline SVG: lines, points and bars over two axes. They follow the page's colours and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from minidiff.page.html import Html, tag
from minidiff.page.languages import Said, label, say

LEFT, RIGHT, TOP, BOTTOM = 56, 12, 22, 38  # margins in pixels; the name of the vertical axis stands in the upper one
Kind = Literal["line", "points", "bars"]


@dataclass(frozen=True)
class Series:
    """One curve: points (x, y), of which those that are not finite are left out. ``colour``: 1 to 6, of the page's."""

    name: Said
    points: Sequence[tuple[float, float]]
    colour: int = 1
    kind: Kind = "line"


@dataclass(frozen=True)
class Chart:
    """Two axes with what is drawn over them. ``log``: the vertical axis is logarithmic."""

    title: Said
    x: Said
    y: Said
    series: Sequence[Series]
    log: bool = False
    width: int = 640
    height: int = 240
    marks: Sequence[tuple[float, str]] = field(default=())  # vertical lines: place and what is written there
    wanted_x: tuple[float, float] | None = None  # range of the horizontal axis; None: that of the points
    wanted_y: tuple[float, float] | None = None

    def svg(self) -> Html:
        """Draw the chart, with a legend below if there are several curves."""
        inside = self.drawn()
        if not inside:
            return inside
        names = label(self.title)
        size = f"0 0 {self.width} {self.height}"
        picture = tag("svg", tag("title", names), inside, viewBox=size, role="img", aria_label=names, cls="chart")
        legend = [tag("span", tag("i", cls=f"key {s.kind} c{s.colour}"), say(s.name)) for s in self.series]
        several = tag("p", legend, cls="legend") if len(self.series) > 1 else ""
        return tag("figure", tag("figcaption", say(self.title)), picture, several)

    @property
    def tall(self) -> int:
        """Height in pixels."""
        return self.height

    def drawn(self) -> Html:
        """Return what stands inside the picture; nothing if there are no points."""
        shown = [[(x, y) for x, y in s.points if self._fits(x, y)] for s in self.series]
        every = [point for points in shown for point in points]
        if not every:
            return Html("")
        low_x, high_x = self.wanted_x or _range([x for x, _ in every])
        low_y, high_y = self._vertical([y for _, y in every])
        wide, high = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM

        def at(x: float, y: float) -> tuple[float, float]:
            along = (x - low_x) / ((high_x - low_x) or 1)
            up = (self._scaled(y) - low_y) / ((high_y - low_y) or 1)
            return round(LEFT + along * wide, 1), round(TOP + (1 - up) * high, 1)

        whole = all(float(x).is_integer() for x, _ in every)
        parts = [self._axes(low_x, high_x, low_y, high_y, whole)]
        for place, name in self.marks:
            x, _ = at(place, every[0][1])
            parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=TOP + high, cls="mark"))
            parts.append(tag("text", name, x=x + 3, y=TOP + 10))
        for one, points in zip(self.series, shown, strict=True):
            parts.append(_drawn(one, [at(x, y) for x, y in points], TOP + high, wide))
        return Html("".join(parts))

    def _fits(self, x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and (y > 0 or not self.log)

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def _vertical(self, values: Sequence[float]) -> tuple[float, float]:
        if self.wanted_y is not None:
            return self._scaled(self.wanted_y[0]), self._scaled(self.wanted_y[1])
        if self.log:
            powers = [math.log10(y) for y in values]
            return math.floor(min(powers)), math.ceil(max(powers)) + (min(powers) == max(powers))
        return _range(values)

    def _axes(self, low_x: float, high_x: float, low_y: float, high_y: float, whole: bool) -> Html:
        wide, high = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        parts = []
        for y in steps(low_y, high_y, 5):
            place = round(TOP + (1 - (y - low_y) / ((high_y - low_y) or 1)) * high, 1)
            parts.append(tag("line", x1=LEFT, x2=LEFT + wide, y1=place, y2=place, cls="grid"))
            shown = _power(y) if self.log else f"{y:.4g}"
            parts.append(tag("text", shown, x=LEFT - 6, y=place + 4, text_anchor="end"))
        for x in steps(low_x, high_x, 8):
            if whole and not float(x).is_integer():  # there is no step 1.5
                continue
            place = round(LEFT + (x - low_x) / ((high_x - low_x) or 1) * wide, 1)
            parts.append(tag("text", f"{x:.4g}", x=place, y=TOP + high + 14, text_anchor="middle"))
        parts.append(say(self.x, "text", {"x": LEFT + wide, "y": self.height - 4, "text_anchor": "end"}))
        parts.append(say(self.y, "text", {"x": LEFT + 4, "y": TOP - 8, "cls": "unit"}))
        return Html("".join(parts))


def _power(y: float) -> str:
    """Return 10 ** y as it stands at an axis: a narrow range has places between the powers of 10."""
    return f"1e{y:.0f}" if math.isclose(y, round(y), abs_tol=1e-9) else f"{10**y:.2g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def steps(low: float, high: float, most: int) -> list[float]:
    """Return up to ``most`` + 1 round numbers from ``low`` to ``high``."""
    span = (high - low) or 1.0
    size = 10 ** math.floor(math.log10(span / most))
    size = next(size * k for k in (1, 2, 5, 10) if span / (size * k) <= most)
    first = math.ceil(low / size - 1e-9)
    return [k * size for k in range(first, math.floor(high / size + 1e-9) + 1)]


def _drawn(one: Series, places: Sequence[tuple[float, float]], floor: float, wide: float) -> Html:
    colour = f"c{one.colour}"
    if one.kind == "line":
        return tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), cls=f"line {colour}")
    if one.kind == "points":
        return Html("".join(tag("circle", cx=x, cy=y, r=2.6, cls=f"dot {colour}") for x, y in places))
    thick = max(1.0, round(0.9 * wide / max(len(places), 1), 1))
    bars = (
        tag(
            "rect", x=round(x - thick / 2, 1), y=y, width=thick, height=round(max(floor - y, 0), 1), cls=f"bar {colour}"
        )
        for x, y in places
    )
    return Html("".join(bars))
