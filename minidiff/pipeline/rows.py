"""Which rows of a plan a run executes, and at which of them it is guided.

Parts of the way from noise (0) to picture (1) are compared by timestep, so that two models with different plans meet at
the same noise level.
"""

from __future__ import annotations

from typing import Any

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.pipeline.request import Request
from minidiff.programs.img2img import Entry


def choose_rows(plan: Any, order: int, entry: Entry, request: Request, train_steps: int) -> tuple[range, int]:
    """Return the rows of ``plan`` to run, and the row whose noise a picture gets.

    A run begins where ``entry`` says or, if another model hands over, at ``denoising_start``, and stops at
    ``denoising_end``. A method with ``order`` 2 makes two calls per step, and can only be entered at the first. Raises
    :class:`ConfigError` if no row is left.
    """
    start, end = request.denoising_start, request.denoising_end
    if start is None:
        rows, noised = entry.rows(plan, order)
    else:
        left = int((plan.timesteps < cutoff(start, train_steps)).sum())
        first = len(plan.timesteps) - left - (1 if order == 2 and left % 2 == 0 else 0)
        rows, noised = range(first, len(plan.timesteps)), first
    if end is not None:
        rows = rows[: int((plan.timesteps[rows.start :] >= cutoff(end, train_steps)).sum())]
    if not rows:
        strength = None if request.image is None or start is not None else request.taken_strength
        given = {"strength": strength, "denoising_start": start, "denoising_end": end}
        shown = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ConfigError(
            f"{shown} of steps={request.steps} leaves no step to do; take more steps or another part of them"
        )
    return rows, noised


def cutoff(fraction: float, train_steps: int) -> int:
    """Return the timestep at ``fraction`` of the way from pure noise (0) to the picture (1)."""
    return round(train_steps - fraction * train_steps)


def unguided(plan: Any, rows: range, sampler: Any, request: Request, train_steps: int) -> list[int]:
    """Return the ``rows`` outside the guidance interval, which use the conditional prediction alone.

    Raises :class:`ConfigError` for a sampler that does not use the model's timesteps.
    """
    if request.guidance_interval is None:
        return []
    name, foreign = type(sampler).__name__, getattr(sampler, "own_levels", False)
    check(not foreign, f"guidance_interval is told by timesteps, and {name} has levels of its own; leave it out")
    low, high = map(float, request.guidance_interval)
    return rows_outside(plan, rows, low, high, train_steps)


def rows_outside(plan: Any, rows: range, low: float, high: float, train_steps: int) -> list[int]:
    """Return the ``rows`` of ``plan`` that lie before ``low`` or from ``high`` on. No row lies outside 0 to 1."""
    early, late = cutoff(low, train_steps), cutoff(high, train_steps)
    t = plan.timesteps
    return [i for i in rows if (low > 0 and t[i] >= early) or (high < 1 and t[i] < late)]
