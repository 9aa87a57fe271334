"""The report as one page of HTML: no script, nothing fetched, a few kilobytes besides its tables.

The outcome comes first, then a chart of the run: every stage is a point, from left to right in the order of the
network, at the height of its relative difference (logarithmic). Filled points are the sides by themselves, hollow ones
on equal inputs: a high hollow point is where a difference arises. The tables below hold every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from minidiff.parity import report as words
from minidiff.parity.difference import Difference
from minidiff.parity.engine import Row
from minidiff.parity.report import COLUMNS, Report

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1000, 240, 56, 24, 12
LETTER = 7  # approximate width of one
FLOOR, CEILING = -9.0, 1.0  # powers of ten
MOST_POINTS = 4000  # of a long run the points that are drawn; the tables have all

STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--dim:#667085;--line:#e4e7ec;--paper:#fff;--card:#f8f9fb;--good:#067647;
--bad:#b42318;--badback:#fef3f2;--a:#2e6bd6;--b:#d9480f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#98a2b3;--line:#2b3240;--paper:#12161e;--card:#1a2029;
--good:#47cd89;--bad:#f97066;--badback:#331a1a;--a:#7aa7ff;--b:#ff9457}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:28px 24px 60px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:32px 0 8px}
code,td,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px}
.outcome{border-left:4px solid var(--good);background:var(--card);padding:14px 18px;margin:18px 0;border-radius:4px}
.outcome.bad{border-color:var(--bad)}.outcome b{font-size:17px;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:10px 0 0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%}
th{text-align:right;font-weight:600;font-size:12px;color:var(--dim);background:var(--card)}
th,td{padding:4px 12px;border-bottom:1px solid var(--line);white-space:nowrap}
td{text-align:right}th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}
tr.apart td:nth-child(2){color:var(--bad)}tr.cause td{background:var(--badback)}tr.first td{font-weight:700}
tr.first td:first-child::after{content:"  first difference";color:var(--bad)}
details{margin:8px 0}summary{cursor:pointer;padding:6px 0}summary .n{color:var(--dim)}summary .bad{color:var(--bad)}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--dim)}
.grid{stroke:var(--line)}.own{fill:var(--a)}.local{fill:none;stroke:var(--b);stroke-width:1.4}.mark{stroke:var(--bad)}
.key{font-size:13px;color:var(--dim);margin:8px 0}.dot{color:var(--a)}.ring{color:var(--b)}.bar{color:var(--bad)}
a{color:inherit}footer{margin-top:40px;color:var(--dim);font-size:13px}
"""


def page(report: Report) -> str:
    """The whole page."""
    outcome, named = words.outcome(report), words.reasons(report)
    bad = "" if report.equal else " bad"
    facts = {"A": report.a, "B": report.b, "tolerance": _tolerance(report), **report.about}
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(f'{report.a} and {report.b}: {outcome}')}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(report.a)} and {escape(report.b)}</h1>",
            f'<div class="outcome{bad}"><b>{_link(outcome, bool(named))}</b>{_list(named) if named else ""}</div>',
            _list(facts),
            "<h2>The run at a glance</h2>",
            _picture(report),
            f"<p class='key'>{KEY}</p>",
            "<h2>Sections</h2>",
            _table(
                ("section", *COLUMNS[:-1]),
                [words.summary(*group, report)[:-1] for group in _grouped(report)],
                _bars(report),
            ),
            "<h2>Every stage</h2>",
            *(_section(name, rows, report) for name, rows in _grouped(report)),
            _only(report),
            f"<footer>{escape(LEGEND)}</footer>",
            "</body></html>",
        ]
    )


KEY = (
    "Every stage in the order of the run, by its relative difference. <b class='dot'>●</b> A and B each by itself "
    "<b class='ring'>○</b> B on A's values: what differs there arose there <b class='bar'>|</b> first difference"
)
LEGEND = (
    "max abs: the largest |A - B| of a stage. relative: that divided by the largest |A|. ULPs: the largest distance in "
    "units in the last place. on equal inputs: the relative difference when B is handed A's values at every stage, so "
    "that nothing is inherited. nearer: which side is nearer to the same computation in float64; neither: in float64 "
    "the two still differ, so they compute different functions."
)


def _link(outcome: str, parted: bool) -> str:
    """The outcome, leading to the row of the first place."""
    return f'<a href="#first">{escape(outcome)}</a>' if parted else escape(outcome)


def _tolerance(report: Report) -> str:
    return "equal values" if report.tolerance == 0 else f"{report.tolerance:g} of a stage's largest value"


def _grouped(report: Report) -> list[tuple[str, list[Row]]]:
    return list(words.sections(report.rows).items())


def _list(facts: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"


def _bars(report: Report) -> list[str]:
    """Return the CSS class of each section's row."""
    return ["" if all(r.chained.within(report.tolerance) for r in rows) else "apart" for _, rows in _grouped(report)]


def _section(name: str, rows: Sequence[Row], report: Report) -> str:
    apart = sum(not row.chained.within(report.tolerance) for row in rows)
    said = f'<span class="bad">{apart} of {len(rows)} differ</span>' if apart else f"{len(rows)} equal"
    if not apart and report.tolerance:
        said = f"{len(rows)} within the tolerance"
    shown = " open" if report.first in rows else ""
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
    head = f'<summary><code>{escape(name)}</code> <span class="n">{said}</span></summary>'
    return f"<details{shown}>{head}{_table(('stage', *COLUMNS), lines, kinds)}</details>"


def _table(names: Iterable[str], lines: Iterable[Sequence[str]], kinds: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(
        f"<tr{_marks(kind)}>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>"
        for line, kind in zip(lines, kinds, strict=True)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _marks(kind: str) -> str:
    anchor = ' id="first"' if kind.endswith("first") else ""
    return f'{anchor} class="{kind}"' if kind else ""


def _only(report: Report) -> str:
    parts = [
        f"<details><summary>only in {side} <span class='n'>{len(only)} stages</span></summary>"
        f"<p class='mono'>{escape(', '.join(only))}</p></details>"
        for side, only in (("A", report.only_a), ("B", report.only_b))
        if only
    ]
    return "".join(parts)


def _picture(report: Report) -> str:
    """Draw the differences of all stages as an SVG."""
    rows = list(report.rows)
    step = max(1, math.ceil(len(rows) / MOST_POINTS))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="relative difference by stage">']
    for power in range(int(FLOOR) + 1, int(CEILING) + 1, 2):
        y = _height(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{_height(0) + 4:.1f}" text-anchor="end">equal</text>')
    start = 0
    for name, inside in _grouped(report):
        x, end = _across(start, len(rows)), _across(start + len(inside), len(rows))
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM + 4}"/>')
        if end - x > LETTER * len(name) + 6:
            parts.append(f'<text x="{x + 3:.1f}" y="{HEIGHT - 6}">{escape(name)}</text>')
        start += len(inside)
    for k, row in enumerate(rows):
        if row is report.first:
            x = _across(k, len(rows))
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        if k % step and row is not report.first:
            continue
        parts.append(_point("own", k, len(rows), row, row.chained, 1.8))
        if row.local is not None and not row.local.equal:
            parts.append(_point("local", k, len(rows), row, row.local, 3.2))
    return "".join(["<div class='wide'>", *parts, "</svg></div>"])


def _point(kind: str, k: int, count: int, row: Row, d: Difference, radius: float) -> str:
    title = f"<title>{escape(row.stage)}: {escape(words.describe(d))}</title>" if not d.equal else ""
    place = f'cx="{_across(k, count):.1f}" cy="{_height(words.size(d)):.1f}" r="{radius}"'
    return f'<circle class="{kind}" {place}>{title}</circle>' if title else f'<circle class="{kind}" {place}/>'


def _across(k: int, count: int) -> float:
    return LEFT + 6 + (WIDTH - LEFT - 12) * k / max(1, count - 1)


def _height(relative: float) -> float:
    power = FLOOR if relative == 0 else CEILING if math.isinf(relative) else math.log10(relative)
    share = (min(max(power, FLOOR), CEILING) - FLOOR) / (CEILING - FLOOR)
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
