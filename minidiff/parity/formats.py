"""The report of a comparison as a program reads it: JSON, and the commands of GitHub's workflows."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

from minidiff.parity.difference import Difference
from minidiff.parity.report import Report, outcome, reasons, text
from minidiff.parity.rows import Row

SHOWN = ("max_abs", "max_rel", "norm", "snr", "correlation", "ulps", "ulps_median", "ulps_99", "differing", "total")


def formatted(report: Report, form: str, *, every: bool = False) -> str:
    """Return the report as "text", "json", "github" or "html".

    ``every``: the text shows all stages, as JSON and HTML always do.
    """
    if form == "json":
        return json.dumps(as_json(report), indent=1)
    if form == "github":
        return github(report, every=every)
    if form == "html":
        from minidiff.parity.page import page

        return page(report)
    return text(report, every=every)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as data that JSON can hold; what is not finite becomes a string."""
    first = report.first
    return {
        "a": report.a,
        "b": report.b,
        "about": dict(report.about),
        "tolerance": report.tolerance,
        "equal": report.equal,
        "outcome": outcome(report),
        "first": None if first is None else first.stage,
        "reasons": reasons(report),
        "causes": [row.stage for row in report.causes],
        "stages": [_row(row, report) for row in report.rows],
        "only_a": list(report.only_a),
        "only_b": list(report.only_b),
    }


def _row(row: Row, report: Report) -> dict[str, Any]:
    judged = row.judgement
    told = None
    if judged is not None:
        told = {f.name: _plain(getattr(judged, f.name)) for f in fields(judged)} | {"nearer": judged.nearer}
    return {
        "stage": row.stage,
        "within": row.chained.within(report.tolerance),
        **_difference(row.chained),
        "local": None if row.local is None else _difference(row.local),
        "judgement": told,
    }


def _difference(d: Difference) -> dict[str, Any]:
    shapes: dict[str, Any] = {"equal": d.equal}
    if d.hashed:
        return {**shapes, "hashed": True, "shape": list(d.shape_a), "total": d.total}
    if not d.same_shape:
        return {**shapes, "shape_a": list(d.shape_a), "shape_b": list(d.shape_b)}
    return {**shapes, "shape": list(d.shape_a), **{name: _plain(getattr(d, name)) for name in SHOWN}}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def github(report: Report, *, every: bool = False) -> str:
    """Return the report for the log of a GitHub workflow: an annotation, and the text in a group that folds."""
    said = "\n".join([outcome(report), *(f"{key}: {what}" for key, what in reasons(report).items())])
    kind = "notice" if report.equal else "error"
    title = _escaped(f"{report.a} and {report.b}").replace(":", "%3A").replace(",", "%2C")
    lines = text(report, every=every).split("\n")
    return "\n".join([f"::{kind} title={title}::{_escaped(said)}", "::group::every section", *lines, "::endgroup::"])


def _escaped(words: str) -> str:
    return words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
