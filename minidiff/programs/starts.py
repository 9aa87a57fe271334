"""Starting point of img2img in other programs: the number of steps for a strength, and the initial noise level.

Strength 1 ignores the picture, strength 0 keeps it. Programs agree on that and on little else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from minidiff.config import check
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.schedule import check_steps


class Start(NamedTuple):
    """A plan of ``steps`` is made; the picture gets the noise of row ``noised`` (at ``plan.timesteps[noised]``), and
    ``runs`` rows are run from row ``first``. Rows count steps here; :func:`rows` finds them in a plan. ``noised`` need
    not be ``first``: CompVis begins one row above. ``from_top``: ``first`` is counted in model calls from the top, also
    where a plan has more of them than steps (PNDM)."""

    steps: int
    first: int
    runs: int
    noised: int
    from_top: bool = False


def rows(start: Start, plan: Any, order: int) -> tuple[range, int]:
    """Return the rows of ``plan`` to run, and the one whose noise the picture gets. A step has ``order`` model calls.

    Every run goes on to the end of the plan. Steps are counted from there, as the programs slice: a plan may have more
    rows than steps were asked for (ddim_uniform; PNDM's repeated one) or fewer (beta).
    """
    calls = len(plan.timesteps)
    if start.from_top:
        return range(min(start.first * order, calls), calls), start.noised * order
    levels = plan.alpha_bars.tolist()
    repeated = [order == 1 and levels[i] == levels[i + 1] for i in range(calls - 1)] + [False]
    steps = [i for i in range(0, calls, order) if not repeated[i]]
    first = max(0, len(steps) - start.runs) if start.first else 0
    if first == len(steps):
        return range(0), 0
    return range(steps[first], calls), steps[max(0, first - (start.first - start.noised))]


def diffusers(steps: int, strength: float, total: int) -> Start:
    """int(steps * strength) steps, the last ones of a plan of ``steps``."""
    runs = min(int(steps * strength), steps)
    return Start(steps, steps - runs, runs, steps - runs, from_top=True)


def ldm(steps: int, strength: float, total: int) -> Start:
    """int(strength * steps) steps from the bottom, noised as the row above them: that row must be there, so strength 1
    fails where ``steps`` divides training's timesteps ``total`` (in CompVis' script by an IndexError)."""
    rows, runs = len(range(0, total, total // steps)), int(strength * steps)
    if runs == rows:
        raise ConfigError(f"strength={strength}: ldm noises a picture as one row above the first of {rows}; use less")
    return Start(steps, rows - runs, runs, rows - runs - 1)


def a1111(steps: int, strength: float, total: int) -> Start:
    """One step more than int(strength * steps), with strength 0.999 at most."""
    runs = int(min(strength, 0.999) * steps) + 1
    return Start(steps, steps - runs, runs, steps - runs)


def a1111_strided(steps: int, strength: float, total: int) -> Start:
    """Rule for A1111's DDIM and PLMS: noised as one row above, as in ldm, and the step of timestep 1 is left out."""
    rows, kept = len(range(0, total, total // steps)), int(min(strength, 0.999) * steps)
    return Start(steps, rows - kept, max(kept - 1, 0), rows - kept - 1)


def comfyui(steps: int, strength: float, total: int) -> Start:
    """All ``steps``, the last ones of a plan of int(steps / strength)."""
    if strength > 0.9999:
        return Start(steps, 0, steps, 0)
    if strength == 0:
        return Start(steps, steps, 0, steps)
    planned = int(steps / strength)
    check(planned <= total, f"strength={strength}: comfyui plans {planned} steps for {steps}; there are {total}")
    return Start(planned, planned - steps, steps, planned - steps)


STARTS: dict[str, Callable[[int, float, int], Start]] = {
    "diffusers": diffusers,
    "ldm": ldm,
    "a1111": a1111,
    "a1111 strided": a1111_strided,
    "comfyui": comfyui,
}


def start(rule: str, steps: int, strength: float, total: int = 1000) -> Start:
    """Return the start of img2img by ``rule`` for ``steps`` in 1..total and ``strength`` in 0..1.

    Raises ConfigError outside these ranges, and UnsupportedError for a program without img2img ("none").
    """
    check_steps(steps, total)
    check(0 <= strength <= 1, f"strength={strength} must lie in 0..1")
    if rule not in STARTS:
        raise UnsupportedError("this program has no image to image of its own; choose another with like=")
    return STARTS[rule](steps, strength, total)
