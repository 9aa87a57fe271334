"""The report as one page of HTML: nothing fetched, a few kilobytes besides its tables.

The outcome comes first, then a chart of the run: every stage is a point, from left to right in the order of the
network, at the height of its relative difference (logarithmic). Filled points are the sides by themselves, hollow ones
on equal inputs: a high hollow point is where a difference arises. The tables below hold every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from minidiff.page.html import Child, Html, document, resource, tag
from minidiff.parity import report as words
from minidiff.parity.difference import Difference
from minidiff.parity.report import COLUMNS, Report
from minidiff.parity.rows import Row

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1000, 240, 56, 24, 12
LETTER = 7  # approximate width of one
FLOOR, CEILING = -9.0, 1.0  # powers of ten
MOST_POINTS = 4000  # of a long run the points that are drawn; the tables have all


def page(report: Report) -> str:
    """The whole page."""
    outcome, named = words.outcome(report), words.reasons(report)
    facts = {"A": report.a, "B": report.b, "tolerance": _tolerance(report), **report.about}
    return document(
        f"{report.a} and {report.b}: {outcome}",
        [
            tag("h1", f"{report.a} and {report.b}"),
            tag(
                "div",
                tag("b", _link(outcome, bool(named))),
                _list(named) if named else None,
                cls="outcome" if report.equal else "outcome bad",
            ),
            _list(facts),
            tag("h2", "The run at a glance"),
            _picture(report),
            tag("p", KEY, cls="caption"),
            tag("h2", "Sections"),
            _table(
                ("section", *COLUMNS[:-1]),
                [words.summary(*group, report)[:-1] for group in _grouped(report)],
                _bars(report),
            ),
            tag("h2", "Every stage"),
            [_section(name, rows, report) for name, rows in _grouped(report)],
            _only(report),
            tag("footer", LEGEND),
        ],
        styles=[resource("minidiff.parity", "page.css")],
    )


KEY = Html(
    "Every stage in the order of the run, by its relative difference. <b class='dot'>●</b> A and B each by itself "
    "<b class='ring'>○</b> B on A's values: what differs there arose there <b class='bar'>|</b> first difference"
)
LEGEND = (
    "max abs: the largest |A - B| of a stage. relative: that divided by the largest |A|. ULPs: the largest distance in "
    "units in the last place. SNR: the energy of A over that of A - B. "
    "on equal inputs: the relative difference when B is handed A's values at every stage, so "
    "that nothing is inherited. nearer: which side is nearer to the same computation in float64; neither: in float64 "
    "the two still differ, so they compute different functions."
)


def _link(outcome: str, parted: bool) -> Child:
    """The outcome, leading to the row of the first place."""
    return tag("a", outcome, href="#first") if parted else outcome


def _tolerance(report: Report) -> str:
    return "equal values" if report.tolerance == 0 else f"{report.tolerance:g} of a stage's largest value"


def _grouped(report: Report) -> list[tuple[str, list[Row]]]:
    return list(words.sections(report.rows).items())


def _list(facts: dict[str, str]) -> Html:
    return tag("dl", [(tag("dt", name), tag("dd", fact)) for name, fact in facts.items()])


def _bars(report: Report) -> list[str]:
    """Return the CSS class of each section's row."""
    return ["" if all(r.chained.within(report.tolerance) for r in rows) else "apart" for _, rows in _grouped(report)]


def _section(name: str, rows: Sequence[Row], report: Report) -> Html:
    apart = sum(not row.chained.within(report.tolerance) for row in rows)
    kept = "within the tolerance" if report.tolerance else "equal"
    said = tag("span", f"{apart} of {len(rows)} differ", cls="bad") if apart else f"{len(rows)} {kept}"
    causes = {row.stage for row in report.causes}
    kinds = [
        " ".join(
            kind
            for kind, holds in (
                ("apart", not row.chained.within(report.tolerance)),
                ("cause", row.stage in causes),
                ("first", row is report.first),
            )
            if holds
        )
        for row in rows
    ]
    lines = [words.line(row, report) for row in rows]
    lines = [(*line[:-1], line[-1].split("  <-")[0]) for line in lines]
    head = tag("summary", tag("code", name), " ", tag("span", said, cls="n"))
    return tag("details", head, _table(("stage", *COLUMNS), lines, kinds), open=report.first in rows)


def _table(names: Iterable[str], lines: Iterable[Sequence[str]], kinds: Iterable[str]) -> Html:
    head = tag("tr", [tag("th", name, scope="col") for name in names])
    body = [
        tag("tr", [tag("td", cell) for cell in line], id="first" if kind.endswith("first") else None, cls=kind or None)
        for line, kind in zip(lines, kinds, strict=True)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), cls="wide")


def _only(report: Report) -> list[Html]:
    return [
        tag(
            "details",
            tag("summary", f"only in {side} ", tag("span", f"{len(only)} stages", cls="n")),
            tag("p", ", ".join(only), cls="mono"),
        )
        for side, only in (("A", report.only_a), ("B", report.only_b))
        if only
    ]


def _picture(report: Report) -> Html:
    """Draw the differences of all stages as an SVG."""
    rows = list(report.rows)
    step = max(1, math.ceil(len(rows) / MOST_POINTS))
    parts = [*_levels(), *_sections(report)]
    for k, row in enumerate(rows):
        if row is report.first:
            parts.append(_upright("mark", _across(k, len(rows)), HEIGHT - BOTTOM))
        if k % step and row is not report.first:
            continue
        parts.append(_point("own", k, len(rows), row, row.chained, 1.8))
        if row.local is not None and not row.local.equal:
            parts.append(_point("local", k, len(rows), row, row.local, 3.2))
    picture = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label="relative difference by stage")
    return tag("div", picture, cls="wide")


def _levels() -> Iterator[Html]:
    """Yield the lines of the powers of ten, and their names."""
    for power in range(int(FLOOR) + 1, int(CEILING) + 1, 2):
        y = _height(10.0**power)
        yield tag("line", cls="grid", x1=LEFT, x2=WIDTH, y1=f"{y:.1f}", y2=f"{y:.1f}")
        yield tag("text", f"1e{power}", x=LEFT - 8, y=f"{y + 4:.1f}", text_anchor="end")
    yield tag("text", "equal", x=LEFT - 8, y=f"{_height(0) + 4:.1f}", text_anchor="end")


def _sections(report: Report) -> Iterator[Html]:
    """Yield a line where each section begins, and its name where there is room."""
    start, count = 0, len(report.rows)
    for name, inside in _grouped(report):
        x, end = _across(start, count), _across(start + len(inside), count)
        yield _upright("grid", x, HEIGHT - BOTTOM + 4)
        if end - x > LETTER * len(name) + 6:
            yield tag("text", name, x=f"{x + 3:.1f}", y=HEIGHT - 6)
        start += len(inside)


def _upright(cls: str, x: float, bottom: float) -> Html:
    return tag("line", cls=cls, x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=bottom)


def _point(kind: str, k: int, count: int, row: Row, d: Difference, radius: float) -> Html:
    title = None if d.equal else tag("title", f"{row.stage}: {words.describe(d)}")
    x, y = _across(k, count), _height(words.size(d))
    return tag("circle", title, cls=kind, cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius)


def _across(k: int, count: int) -> float:
    return LEFT + 6 + (WIDTH - LEFT - 12) * k / max(1, count - 1)


def _height(relative: float) -> float:
    power = FLOOR if relative == 0 else CEILING if math.isinf(relative) else math.log10(relative)
    share = (min(max(power, FLOOR), CEILING) - FLOOR) / (CEILING - FLOOR)
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
