"""Trial of everything whose gain depends on the processor, made once a machine and kept in the user's cache.

What is faster here may be slower there: another library for linear layers, Winograd's convolutions, attention in
blocks. Each is timed twice beside the plain way, at a shape that stands for the others. A way is chosen if it is
clearly faster, both times, than the plain one and than others nearer to it. Where the two trials disagree, or nothing
was tried, a rule decides: it takes what has lost on no processor that was measured.

:func:`choices` reads the cache; the command line tries for large models, and ``minidiff probe`` does and shows the
result. The first result that is written stands (:mod:`machine`), so the same machine always computes the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from minidiff.fast import linear, machine, many_keys, onednn, winograd
from minidiff.fast.switch import OFF, ON

WORTH = 1.05  # times as fast as a preferred way; with less, that stays
ROUNDS = 3  # of a trial
HOPELESS = 4  # times as slow as the plain way in the first round: not timed again
LONGEST = 2.5  # seconds of all trials; what is left then follows the rule
DTYPES = (torch.float32, torch.bfloat16)

Ways = Mapping[str, Callable[[], object]]
Times = Mapping[str, float]

# Of each choice, what sets up its ways for a dtype, as they are preferred: the plain one first.
TRIALS: Mapping[str, Callable[[torch.dtype], Ways]] = {
    "linear": linear.ways,
    "winograd": winograd.ways,
    **{name: lambda dtype, name=name: many_keys.ways(name, dtype) for name in many_keys.RANGES},  # type: ignore[misc]
}


class Result(NamedTuple):
    """Outcome of a trial: the way that was chosen, and the seconds of each, the shorter of two trials."""

    chosen: str
    seconds: dict[str, float]


Results = dict[str, Result]


def rule(dtype: torch.dtype) -> dict[str, str]:
    """Return what is taken untried, by name."""
    gains = onednn.pays(dtype)
    found = {
        "linear": gains,
        "tokens": gains,
        "winograd": dtype == torch.float32 and not gains,
    }
    return {name: ON if on else OFF for name, on in found.items()} | dict.fromkeys(many_keys.RANGES, many_keys.PLAIN)


def choices(dtype: torch.dtype, measure: bool = False) -> dict[str, str]:
    """Return the way that this machine takes, by name: as tried, or else by the rule.

    ``measure``: try now if that was not done before. What cannot be kept is not used, since it might be another the
    next time.
    """
    if dtype not in DTYPES:
        return {}
    found = results(dtype, measure) or {}
    return rule(dtype) | {name: result.chosen for name, result in found.items()}


def results(dtype: torch.dtype, measure: bool = False, anew: bool = False) -> Results | None:
    """Return the results of this machine's trials; None without any. ``anew``: replace them; for the rest see
    :func:`choices`."""
    found = None if anew else NOTES.all().get(key(dtype))
    if found is None and measure:
        found = NOTES.keep(key(dtype), tried(dtype), anew)
    return found


def key(dtype: torch.dtype) -> str:
    """Return the name of this machine's entry in the cache."""
    return f"{machine.description()}, {str(dtype).removeprefix('torch.')}"


@torch.no_grad()
def tried(dtype: torch.dtype) -> Results:
    """Try everything, for at most 3 seconds."""
    by_rule, begun = rule(dtype), time.perf_counter()
    found = {}
    for name, set_up in TRIALS.items():
        ways = set_up(dtype)
        if len(ways) > 1 and time.perf_counter() - begun < LONGEST:
            trials = [seconds(ways), seconds(ways)]
            plain = next(iter(ways))
            shortest = {way: min(times[way] for times in trials) for way in ways}
            found[name] = Result(chosen(trials, plain, by_rule.get(name, plain)), shortest)
    return found


def seconds(ways: Ways) -> Times:
    """Return the shortest time of each way in seconds, the plain one first. They run in turn, since other load can only
    make one longer."""
    best = dict.fromkeys(ways, math.inf)
    plain = next(iter(ways))
    left = dict(ways)
    for _ in range(ROUNDS):
        for name, work in left.items():
            begun = time.perf_counter()
            work()
            best[name] = min(best[name], max(time.perf_counter() - begun, 1e-9))
        left = {name: work for name, work in left.items() if best[name] <= HOPELESS * best[plain]}
    return best


def chosen(trials: list[Times], plain: str, by_rule: str) -> str:
    """Return the way that is clearly faster than every preferred one in all ``trials``. Ways are listed as they are
    preferred, the plain one first. Where none is, but one is faster than the plain one in some trial, ``by_rule``."""
    best = plain
    for way in trials[0]:
        if all(times[best] >= WORTH * times[way] for times in trials):
            best = way
    doubtful = best == plain and any(times[plain] >= WORTH * min(times.values()) for times in trials)
    return by_rule if doubtful else best


def read(found: Any) -> Results:
    """Return the results of a machine from parsed JSON. Raises ValueError or TypeError for anything else."""
    results = {}
    for name in TRIALS:
        if name in dict(found):
            way, times = found[name]
            checked = {str(other): float(taken) for other, taken in dict(times).items()}
            if way not in checked or not all(0 < taken < math.inf for taken in checked.values()):
                raise ValueError(f"{name}: not the result of a trial")
            results[name] = Result(way, checked)
    return results


NOTES = machine.Notes("kernels.json", read)
