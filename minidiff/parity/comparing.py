"""Comparison of recordings, stage by stage, without torch: names, branches, the local verdict and the judge.

Two recordings of programs that each continued with their own numbers show where they part, and not where else. A third
one, of either program, in which every stage was computed from the other's values (its run says ``on``), shows what
arises at each stage: that is the local verdict. Recordings in float64 are judges: one tells which side is nearer, two
(one of each program) tell rounding from another function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from minidiff.config import check, quote
from minidiff.parity.difference import Difference, comparable, measure, rms
from minidiff.parity.header import BRANCHES, SAME
from minidiff.parity.report import Report
from minidiff.parity.rows import Judgement, Row
from minidiff.parity.values import Source, Value

# Stages whose batch has two halves with guidance.
GUIDED = re.compile(r"step\.\d+/(unet/.*|(input|mask|masked|context|pooled|sizes|prediction)(#\d+)?)|control\.\d+.*/.*")


def compare(
    a: Source,
    b: Source,
    tolerance: float = 0.0,
    judges: Sequence[Source] = (),
    local: Source | None = None,
    names: Mapping[str, str] | None = None,
) -> Report:
    """Compare two recordings, each of a program that continued with its own numbers.

    ``judges``: recordings in float64, of one of the programs or of both. ``local``: a recording whose stages were
    computed from the values of ``a`` or ``b``. ``names``: a's name of a stage -> b's, where they differ.
    Raises :class:`ConfigError` if they are of different models or runs, or have no stage in common.
    """
    for other in (b, *judges, *([local] if local is not None else [])):
        check_same_run(a.run, other.run)
    names = names or {}
    values_a, values_b = paired(a, b, names)
    common = {s: (x, values_b[s]) for s, x in values_a.items() if s in values_b and comparable(x, values_b[s])}
    apart = {stage: measure(x, y) for stage, (x, y) in common.items()}
    rows, only_a, only_b = line_up(values_a, values_b, apart, a.title, b.title)
    on_a = _is_on_a(a, b, local)
    lost = [s for s in values_a if s in values_b and s not in common]
    about = {"run": ", ".join(f"{key} {a.run[key]!r}" for key in ("family", *SAME, "dtype") if key in a.run)}
    if lost:
        about["left out"] = f"{len(lost)} stages of which one side has a hash of another dtype, {lost[0]} first"
    if local is not None:
        about["on equal inputs"] = f"{local.title}, on the values of {'A' if on_a else 'B'}"
        known = {x: y for x, y in names.items() if y in (local if on_a else b).values}
        values_a, values_b = paired(a, local, known) if on_a else paired(local, b, known)
        rows = [_locally(row, values_a.get(row.stage), values_b.get(row.stage)) for row in rows]
    if judges:
        truths = [paired(a, judge, _known(names, judge, a))[1] for judge in judges]
        rows = [_judged(row, values_a.get(row.stage), values_b.get(row.stage), truths) for row in rows]
    return Report(a.title, b.title, rows, tolerance, only_a, only_b, about)


def check_same_run(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` if two descriptions are of different models or runs."""
    for key in SAME:
        if key in a and key in b:
            x, y = a[key], b[key]
            check(x == y, f"the recordings are of different runs: {key} is {quote(x)} and {quote(y)}")


def paired(a: Source, b: Source, names: Mapping[str, str]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Return the values of both sides under a's names, with batches split where one side has only halves of them.

    ``names``: a's name of a stage -> b's. Raises :class:`ConfigError` for a name that is in neither.
    """
    for x, y in names.items():
        check(x in a.values, f"names: the first recording has no stage {quote(x)}")
        check(y in b.values, f"names: the second recording has no stage {quote(y)}")
    renamed = {y: x for x, y in names.items()}
    values_b = {renamed.get(stage, stage): value for stage, value in b.values.items()}
    twice = next((x for x, y in names.items() if x in b.values and y != x and x not in renamed), None)
    check(twice is None, f"names: the second recording has a stage {quote(twice)} of its own")
    turned = tuple(a.run.get("branches", BRANCHES)) != tuple(b.run.get("branches", BRANCHES))
    return _split(a, a.values, values_b, turned), _split(b, values_b, a.values, turned)


def _split(side: Source, values: Mapping[str, Value], other: Mapping[str, Value], turned: bool) -> dict[str, Value]:
    found: dict[str, Value] = {}
    branches = tuple(side.run.get("branches", BRANCHES))
    for stage, value in values.items():
        halves = [f"{stage}@{branch}" for branch in branches]
        wanted = any(half in other for half in halves) or (turned and stage in other and GUIDED.fullmatch(stage))
        if wanted and value.sha256 is None and value.shape and value.shape[0] % 2 == 0 and value.shape[0] > 0:
            found |= {half: value.half(k) for k, half in enumerate(halves)}
        else:
            found[stage] = value
    return found


def line_up(
    stages_a: Sequence[str] | Mapping[str, Any],
    stages_b: Sequence[str] | Mapping[str, Any],
    apart: Mapping[str, Difference],
    a: str,
    b: str,
) -> tuple[list[Row], list[str], list[str]]:
    """Return rows for the stages that both have, in a's order, and the stages that only a and only b have.

    Raises :class:`ConfigError` if there is nothing in common.
    """
    stages_a, stages_b = list(stages_a), list(stages_b)
    some = [", ".join(repr(s) for s in stages[:3]) or "none" for stages in (stages_a, stages_b)]
    check(len(apart) > 0, f"no stage is common to both: {a} has {some[0]}, ...; {b} has {some[1]}, ...")
    in_a, in_b = set(stages_a), set(stages_b)
    rows = [Row(stage, apart[stage]) for stage in stages_a if stage in apart]
    return rows, [s for s in stages_a if s not in in_b], [s for s in stages_b if s not in in_a]


def _is_on_a(a: Source, b: Source, local: Source | None) -> bool:
    if local is None:
        return True
    on = local.run.get("on")
    check(isinstance(on, str), f"{local.title}: not a recording on another's values; its run does not say `on`")
    known = {a.identity: True, b.identity: False}
    check(
        on in known, f"{local.title}: recorded on the values of {quote(on)}, and these are {a.identity}, {b.identity}"
    )
    return known[str(on)]


def _known(names: Mapping[str, str], judge: Source, a: Source) -> dict[str, str]:
    """Return those ``names`` that a judge has, if it calls its stages as the second recording does."""
    known = {x: y for x, y in names.items() if y in judge.values}
    return known if len(known) > len(judge.values.keys() & a.values.keys()) else {}


def _locally(row: Row, a: Value | None, b: Value | None) -> Row:
    if a is None or b is None or not comparable(a, b):
        return row
    return Row(row.stage, row.chained, measure(a, b), row.judgement)


def _judged(row: Row, a: Value | None, b: Value | None, truths: Sequence[Mapping[str, Value]]) -> Row:
    """Add the judgement of a stage that differs; the last judge is b's if there are two."""
    judges = [truth[row.stage] for truth in truths if row.stage in truth]
    shown = row.chained if row.local is None else row.local
    if shown.equal or a is None or b is None or not judges:
        return row
    sides = (a, b, *judges)
    if any(side.shape != a.shape or side.sha256 is not None for side in sides) or any(
        judge.dtype != "float64" for judge in judges
    ):
        return row
    gap = rms(judges[0], judges[-1]) if len(judges) > 1 else None
    return Row(row.stage, row.chained, row.local, Judgement(rms(a, judges[0]), rms(b, judges[-1]), gap))
