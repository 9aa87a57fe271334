"""Search for the first stage at which two runs differ, and for its cause, by three comparisons at every stage.

* **Chained**: each side continues with its own numbers. This shows whether the results are equal, and at which stage
  they first differ; after that stage, differences may be inherited.
* **Local**: the other side runs again and continues at each stage with the first side's value. A difference now arose
  at that very stage, however deep in the network, so several mistakes are found in one run.
* **Judge**: both sides run once more in float64, with the same values at each stage. If they agree there, they are the
  same function and the difference is rounding: float64 is the truth and shows which side is nearer to it. Otherwise one
  of them computes something else: another weight, epsilon, activation, order.

The last two are done only if the first found a difference, so equal implementations cost one run each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import torch
from torch import Tensor

from minidiff.errors import MinidiffError
from minidiff.parity.comparing import line_up
from minidiff.parity.difference import Difference, difference
from minidiff.parity.operations import between, describe, parting
from minidiff.parity.rows import Judgement, Row
from minidiff.parity.taps import Tap

# Not judged in float64: samplers compute their steps in float32 for any input, and noise that is drawn in float64 is
# other noise.
UNJUDGED = ("/x", "/noise", "/added", "/latents", "/masked")


class Side(Protocol):
    """A side that can be run repeatedly, and in float64.

    Not every value can be replaced: the internal state of a program (its plan, its history) stays its own.
    """

    title: str

    def run(self, tap: Tap) -> None:
        """Run everything from the start."""

    def wide(self) -> AbstractContextManager[None]:
        """Return a context in which runs are in float64."""


def record(side: Side) -> dict[str, Tensor]:
    """Return the value of every stage, on the host, in the order of computation."""
    tape: dict[str, Tensor] = {}

    def keep(stage: str, value: Tensor) -> Tensor:
        tape[stage] = _copy(value)
        return value

    side.run(keep)
    return tape


def chained(tape: Mapping[str, Tensor], side: Side) -> tuple[dict[str, Difference], list[str]]:
    """Run ``side`` by itself and compare it with ``tape``; return the differences and the names of all stages."""
    found: dict[str, Difference] = {}
    stages: list[str] = []

    def hold(stage: str, value: Tensor) -> Tensor:
        stages.append(stage)
        if stage in tape:
            found[stage] = difference(tape[stage], value.detach().cpu())
        return value

    side.run(hold)
    return found, stages


def locally(
    tape: Mapping[str, Tensor], side: Side, wanted: Iterable[str], own: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Run ``side`` on the tape's values: return, for each of the stages ``wanted``, its value before it was replaced.

    ``own`` is filled during the run, so that a run that is aborted leaves what it had.
    """
    wanted, own = set(wanted), {} if own is None else own

    def replace(stage: str, value: Tensor) -> Tensor:
        if stage in wanted:
            own[stage] = _copy(value)
        return in_place_of(value, tape[stage]) if stage in tape else value

    side.run(replace)
    return own


def find(
    a: Side, b: Side, tolerance: float = 0.0, *, judge: bool = True, tell: Callable[[str], None] = lambda text: None
) -> tuple[list[Row], list[str], list[str]]:
    """Run both: return one row per common stage in a's order, and the stages that only a and only b have.

    ``tell`` is called with a message about what happens next.
    Raises :class:`ConfigError` if they have no stage in common.
    """
    tell(f"running {a.title}")
    tape = record(a)
    tell(f"running {b.title}")
    apart, stages = chained(tape, b)
    rows, only_a, only_b = line_up(tape, stages, apart, a.title, b.title)
    if all(row.chained.within(tolerance) for row in rows):
        return rows, only_a, only_b
    tell(f"they differ; running {b.title} again, from {a.title}'s values at every stage")
    tape = {row.stage: tape[row.stage] for row in rows}
    mine = locally(tape, b, tape)
    local = {stage: difference(tape[stage], mine[stage]) for stage in tape if stage in mine}
    unequal = [s for s, d in local.items() if d.same_shape and d.finite and not d.equal and not s.endswith(UNJUDGED)]
    parted = _operation(tape, a, b, local, tolerance)
    judge = judge and len(unequal) > 0
    if judge:
        tell("running both in float64")
    judged = _judge(tape, mine, a, b, unequal) if judge else {}
    found = [Row(r.stage, r.chained, local.get(r.stage), judged.get(r.stage), parted.get(r.stage)) for r in rows]
    return found, only_a, only_b


def _operation(
    tape: Mapping[str, Tensor], a: Side, b: Side, local: Mapping[str, Difference], tolerance: float
) -> dict[str, str]:
    """Return the operation at which both part, by the first stage that differs on equal inputs."""
    cause = next((stage for stage in tape if stage in local and not local[stage].within(tolerance)), None)
    if cause is None or not local[cause].same_shape:
        return {}
    runs = [lambda recorder, s=side: s.run(between(tape, cause, in_place_of, recorder)) for side in (a, b)]
    return {cause: describe(*parting(*runs))}


def _judge(
    tape: Mapping[str, Tensor], mine: Mapping[str, Tensor], a: Side, b: Side, stages: Iterable[str]
) -> dict[str, Judgement]:
    truth_a, truth_b = (_truth(tape, side, stages) for side in (a, b))
    found = {}
    for s in stages:
        truths = [truth[s] for truth in (truth_a, truth_b) if s in truth]
        if truths:
            gap = _rms(*truths) if len(truths) == 2 else None
            found[s] = Judgement(_rms(tape[s], truths[0]), _rms(mine[s], truths[-1]), gap)
    return found


def _truth(tape: Mapping[str, Tensor], side: Side, stages: Iterable[str]) -> dict[str, Tensor]:
    """Run ``side`` on the tape's values in float64, as far as possible if a dtype is hard-coded."""
    own: dict[str, Tensor] = {}
    with side.wide(), suppress(RuntimeError, MinidiffError):
        locally(tape, side, stages, own)
    return {stage: value for stage, value in own.items() if value.dtype == torch.float64}


def _rms(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).square().mean().sqrt())


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def in_place_of(value: Tensor, other: Tensor) -> Tensor:
    """Return ``other`` in the dtype, device and layout of ``value``: strides decide the next kernel."""
    same = value.dtype == other.dtype and torch.equal(value.detach().cpu(), other)
    if same or value.shape != other.shape:
        return value
    return torch.empty_like(value).copy_(other)
