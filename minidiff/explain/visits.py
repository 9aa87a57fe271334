"""Timesteps that a run visits, and those that other spacings, samplers and programs would have visited instead.

Nothing is computed here that the samplers and programs do not compute themselves: every list is read off a plan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minidiff.console import one_line
from minidiff.errors import MinidiffError
from minidiff.explain.collect import Seen
from minidiff.programs import read
from minidiff.programs.profiles import PROFILES
from minidiff.samplers import SAMPLERS, name_of
from minidiff.samplers.method import Plan
from minidiff.schedule import Spacing, spaced

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
GRIDS: tuple[tuple[str, Spacing, int], ...] = (
    ("leading", "leading", 0),
    ("leading + 1", "leading", 1),
    ("trailing", "trailing", 0),
    ("linspace", "linspace", 0),
)
"""Name, spacing and offset of each way to choose timesteps."""


def grids(total: int, n: int) -> dict[str, list[int]]:
    """Return the timesteps of ``n`` steps, by the names of :data:`GRIDS`."""
    return {name: [int(t) for t in spaced(spacing, total, n, offset)] for name, spacing, offset in GRIDS}


class Habit(NamedTuple):
    """A program's plan of the same request: timesteps and sigmas of its model calls, and the sigma on which the last
    step lands. ``why``: what it answers instead."""

    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    last: float = 0.0
    first: float = 1.0
    why: str = ""


def habits(seen: Seen) -> dict[str, Habit]:
    """Return the plans of all programs for the run's sampler and number of steps."""
    return {name: _habit(seen, name) for name in PROFILES}


def _habit(seen: Seen, name: str) -> Habit:
    try:
        plan = read(name).sampler(seen.pipe.config.schedule, sampler_of(seen, name)).plan(None, steps_of(seen))
    except MinidiffError as error:
        return Habit(why=one_line(str(error), 200))
    times, sigmas = (tuple(float(v) for v in column) for column in (plan.timesteps, plan.columns()["sigma"]))
    return Habit(times, sigmas, landing_sigma(plan), float(plan.init_noise_sigma))


def sampler_of(seen: Seen, program: str) -> Any:
    """Return the run's sampler in the form in which a program takes it: ours as it is, others by name."""
    return seen.sampler if program == "minidiff" and not seen.recipe.get("like") else {"name": sampler_name(seen)}


def sampler_name(seen: Seen) -> str:
    """Return the name of the run's sampler."""
    note = seen.recipe.get("sampler") or {}
    return str(note.get("name") or name_of(seen.sampler))


def steps_of(seen: Seen) -> int:
    """Return the number of steps that was asked for."""
    return int(seen.request.steps)


def landing_sigma(plan: Plan[Any]) -> float:
    """Return the sigma on which the last step lands."""
    to = float(plan.levels.to[-1])
    return float(((1 - to) / to) ** 0.5) if plan.space == "alpha_bar" else to


class Entry(NamedTuple):
    """Beginning of image to image: its model calls, and the timestep of the first one. ``why``: there is none."""

    calls: int = 0
    first: float | None = None
    why: str = ""


def strengths(seen: Seen) -> dict[str, list[Entry]]:
    """Return, for every program that has the sampler, where it enters at each of :data:`STRENGTHS`."""
    found = {name: [_entry(seen, name, s) for s in STRENGTHS] for name in PROFILES}
    return {name: row for name, row in found.items() if any(not entry.why for entry in row)}


def _entry(seen: Seen, name: str, strength: float) -> Entry:
    program, schedule = read(name), seen.pipe.config.schedule
    try:
        sampler = program.sampler(schedule, sampler_of(seen, name))
        entry = program.entry(sampler.name, steps_of(seen), strength, schedule.steps)
        plan = sampler.plan(None, entry.steps)
        rows, _ = entry.rows(plan, getattr(sampler.inner, "order", 1))
    except MinidiffError as error:
        return Entry(why=one_line(str(error), 200))
    return Entry(len(rows), float(plan.timesteps[rows[0]]) if rows else None)


def planned(seen: Seen, sampler: str, **options: Any) -> Plan[Any] | None:
    """Return the plan of another sampler on the same schedule, with the same number of steps; None if it has none."""
    try:
        return SAMPLERS[sampler](**options).plan(seen.pipe.schedule, steps_of(seen))
    except MinidiffError:
        return None
