"""Image to image: the step at which a run enters the plan, for a strength, and the noise that the picture gets.

Strength 1 ignores the picture, strength 0 keeps it. Programs agree on that and on little else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from minidiff.config import check
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.schedule import check_steps


class Entry(NamedTuple):
    """Entry of a run into a plan of ``steps`` steps: it runs ``runs`` of them, from step ``first`` on, and the picture
    gets the noise of step ``noised``.

    ``noised`` need not be ``first``: CompVis begins one row above. ``from_top``: ``first`` is counted in model calls
    from the top, also where a plan has more of them than steps (PNDM).
    """

    steps: int
    first: int
    runs: int
    noised: int
    from_top: bool = False

    def rows(self, plan: Any, order: int) -> tuple[range, int]:
        """Return the rows of ``plan`` to run, and the one whose noise the picture gets. A step has ``order`` model
        calls.

        Every run goes on to the end of the plan. Steps are counted from there, as the programs slice: a plan may have
        more rows than steps were asked for (ddim_uniform; PNDM's repeated one) or fewer (beta).
        """
        calls = len(plan.timesteps)
        if self.runs == 0:
            return range(calls, calls), 0
        if self.from_top:
            return range(min(self.first * order, calls), calls), self.noised * order
        levels = plan.alpha_bars.tolist()
        repeated = [order == 1 and levels[i] == levels[i + 1] for i in range(calls - 1)] + [False]
        steps = [i for i in range(0, calls, order) if not repeated[i]]
        first = max(0, len(steps) - self.runs) if self.first else 0
        if first == len(steps):
            return range(calls, calls), 0
        return range(steps[first], calls), steps[max(0, first - (self.first - self.noised))]


def whole(steps: int) -> Entry:
    """Return the entry of a run from noise alone: all steps."""
    return Entry(steps, 0, steps, 0, from_top=True)


def diffusers(steps: int, strength: float, total: int) -> Entry:
    """Return the entry for int(steps * strength) steps, the last ones of a plan of ``steps``."""
    runs = min(int(steps * strength), steps)
    return Entry(steps, steps - runs, runs, steps - runs, from_top=True)


def ldm(steps: int, strength: float, total: int) -> Entry:
    """Return the entry for the last int(strength * steps) steps, noised as the row above them.

    That row must exist. Raises :class:`ConfigError` for strength 1 if ``steps`` divides ``total``, the timesteps of
    training (CompVis' script fails with an IndexError).
    """
    rows, runs = len(range(0, total, total // steps)), int(strength * steps)
    if runs == rows:
        raise ConfigError(f"strength={strength}: ldm noises a picture as one row above the first of {rows}; use less")
    return Entry(steps, rows - runs, runs, rows - runs - 1)


def a1111(steps: int, strength: float, total: int) -> Entry:
    """Return the entry for one step more than int(strength * steps), with strength 0.999 at most."""
    runs = int(min(strength, 0.999) * steps) + 1
    return Entry(steps, steps - runs, runs, steps - runs)


def a1111_strided(steps: int, strength: float, total: int) -> Entry:
    """Return the entry for A1111's DDIM and PLMS: noised as one row above, as in ldm, and without the step of
    timestep 1."""
    rows, kept = len(range(0, total, total // steps)), int(min(strength, 0.999) * steps)
    return Entry(steps, rows - kept, max(kept - 1, 0), rows - kept - 1)


def comfyui(steps: int, strength: float, total: int) -> Entry:
    """Return the entry for all ``steps``, the last ones of a plan of int(steps / strength)."""
    if strength > 0.9999:
        return Entry(steps, 0, steps, 0)
    if strength == 0:
        return Entry(steps, steps, 0, steps)
    planned = int(steps / strength)
    check(planned <= total, f"strength={strength}: comfyui plans {planned} steps for {steps}; there are {total}")
    return Entry(planned, planned - steps, steps, planned - steps)


ENTRIES: dict[str, Callable[[int, float, int], Entry]] = {
    "diffusers": diffusers,
    "ldm": ldm,
    "a1111": a1111,
    "a1111 strided": a1111_strided,
    "comfyui": comfyui,
}


def entry(rule: str, steps: int, strength: float, total: int = 1000) -> Entry:
    """Return the entry of img2img by ``rule`` for ``steps`` in 1..total and ``strength`` in 0..1.

    Raises ConfigError outside these ranges, and UnsupportedError for a program without img2img ("none").
    """
    check_steps(steps, total)
    check(0 <= strength <= 1, f"strength={strength} must lie in 0..1")
    if rule not in ENTRIES:
        raise UnsupportedError("this program has no image to image of its own; choose another with like=")
    return ENTRIES[rule](steps, strength, total)
