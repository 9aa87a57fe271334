"""Display of programs: plans side by side, and the table of the choices of each program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minidiff.config import ScheduleConfig
from minidiff.programs import read
from minidiff.programs.profiles import FIELDS, PROFILES, Source


def plans(likes: Sequence[str], schedule: ScheduleConfig, choice: Mapping[str, Any], steps: int) -> str:
    """Return the plan of one program in full, or those of several side by side, as text."""
    made = {like: read(like).sampler(schedule, choice).plan(None, steps) for like in likes}
    return str(made[likes[0]]) if len(made) == 1 else side_by_side(made)


def side_by_side(plans: Mapping[str, Any]) -> str:
    """Return plans by name, row by row: timestep and sigma of each. A row ends in ``*`` if its printed numbers differ,
    in ``~`` if only further bits do."""
    heads = [
        f"{name}: {len(plan)} model calls, x starts as noise * {plan.init_noise_sigma.item():.6g}"
        for name, plan in plans.items()
    ]
    times = [plan.timesteps.tolist() for plan in plans.values()]
    sigmas = [plan.columns()["sigma"].tolist() for plan in plans.values()]
    names = list(plans)
    rows = [["row", *(f"t {name}" for name in names), *(f"sigma {name}" for name in names), ""]]
    for i in range(max(map(len, times))):
        values = [[float(column[i]) if i < len(column) else None for column in table] for table in (times, sigmas)]
        cells = [["" if value is None else f"{value:.6g}" for value in group] for group in values]
        printed, bits = (any(len(set(group)) > 1 for group in of) for of in (cells, values))
        rows.append([str(i), *cells[0], *cells[1], "*" if printed else "~" if bits else ""])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*heads, *lines])


def markdown() -> str:
    """Return the table of all facts for the README beside it, a column for each program, and the sources."""
    sources: list[Source] = []

    def cell(name: str, field: str) -> str:
        fact = getattr(PROFILES[name], field)
        if fact.source is None:
            return f"{fact.says} *(unverified)*"
        if fact.source not in sources:
            sources.append(fact.source)
        return f"{fact.says} [{sources.index(fact.source) + 1}]"

    rows = [["", *PROFILES, "what a difference does"], ["---"] * (len(PROFILES) + 2)]
    rows += [[heading, *(cell(name, field) for name in PROFILES), why] for field, (heading, why) in FIELDS.items()]
    listed = [f"{k}. `{source.where}`, {source.version}" for k, source in enumerate(sources, 1)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *listed])
