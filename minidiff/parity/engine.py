"""Search for the first stage at which two runs differ, and for its cause: three questions, asked stage by stage.

* **Chained**: each side goes on with its own numbers. Says whether the results are equal, and at which stage they first
  are not; beyond that stage every difference may be inherited.
* **Local**: the other side runs again, and at each stage is handed the first side's value to go on with. What differs
  now arose at that very stage, however far down the network; several slips are found in one go.
* **Judge**: both sides run once more in float64, handed the same values. If they agree there, they are one function
  and the difference is rounding: float64 is the truth, and says which side is nearer. If they do not, one of them
  computes something else: another weight, epsilon, activation, order.

The last two are asked only where the first found something, so equal implementations cost one run each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import MinidiffError
from minidiff.parity.difference import Difference, difference
from minidiff.parity.taps import Tap

# Rounding shrinks by 2**29 from float32 to float64, another function not at all; a tenth lies far from both.
STILL_THERE = 0.1
# float64 has no word on these: samplers go to float32 for their steps, whatever they are given, and noise that is drawn
# in float64 is other noise.
UNJUDGED = ("/x", "/noise", "/added", "/latents", "/masked")


class Runner(Protocol):
    """A side that can be run again, and in float64. Not every stage's value can be handed on: what a program keeps to
    itself (its plan, its history) stays its own."""

    title: str

    def run(self, tap: Tap) -> None:
        """Everything from the start."""

    def wide(self) -> AbstractContextManager[None]:
        """While this is entered, runs are in float64."""


@dataclass(frozen=True)
class Judgement:
    """float64's word on a stage: how far each side is from it, and how far the sides still are from one another there.

    All are root mean squares of differences: of the largest alone, chance would decide. ``gap`` is None where one side
    cannot run in float64, and the other's word is taken.
    """

    error_a: float
    error_b: float
    gap: float | None

    @property
    def same_function(self) -> bool:
        """True if it is rounding that sets the sides apart."""
        return self.gap is None or self.gap < STILL_THERE * max(self.error_a, self.error_b)

    @property
    def nearer(self) -> str:
        """ "A", "B" or "both" (equally near); "" where there is no common truth."""
        if not self.same_function:
            return ""
        return "both" if self.error_a == self.error_b else "A" if self.error_a < self.error_b else "B"


@dataclass(frozen=True)
class Row:
    """One stage: how far the sides are apart, each on its own and (None: not asked) on equal inputs."""

    stage: str
    chained: Difference
    local: Difference | None = None
    judgement: Judgement | None = None


def record(side: Runner) -> dict[str, Tensor]:
    """Every stage's value, on the host, in the order in which they came."""
    tape: dict[str, Tensor] = {}

    def keep(stage: str, value: Tensor) -> Tensor:
        tape[stage] = _copy(value)
        return value

    side.run(keep)
    return tape


def chained(tape: Mapping[str, Tensor], side: Runner) -> tuple[dict[str, Difference], list[str]]:
    """A run of ``side`` by itself, held against ``tape`` as it goes, and the names of all of its stages."""
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
    tape: Mapping[str, Tensor], side: Runner, wanted: Iterable[str], own: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Run ``side`` on the tape's values: return, at each of the stages ``wanted``, its value before it was replaced.

    ``own`` is filled as the run goes, so that a run that breaks off leaves what it had.
    """
    wanted, own = set(wanted), {} if own is None else own

    def replace(stage: str, value: Tensor) -> Tensor:
        if stage in wanted:
            own[stage] = _copy(value)
        return _in_place_of(value, tape[stage]) if stage in tape else value

    side.run(replace)
    return own


def find(
    a: Runner, b: Runner, tolerance: float = 0.0, *, judge: bool = True, tell: Callable[[str], None] = lambda text: None
) -> tuple[list[Row], list[str], list[str]]:
    """Run both: one row a common stage in a's order, and the stages that only a and only b have. ``tell`` is called
    with what happens next.

    Raises :class:`ConfigError` if they have no stage in common.
    """
    tell(f"running {a.title}")
    tape = record(a)
    tell(f"running {b.title}")
    apart, stages = chained(tape, b)
    rows, only_a, only_b = line_up(tape, stages, apart, a.title, b.title)
    if all(row.chained.within(tolerance) for row in rows):
        return rows, only_a, only_b
    tell(f"they part; running {b.title} again, from {a.title}'s values at every stage")
    tape = {row.stage: tape[row.stage] for row in rows}
    mine = locally(tape, b, tape)
    local = {stage: difference(tape[stage], mine[stage]) for stage in tape if stage in mine}
    unequal = [s for s, d in local.items() if d.same_shape and d.finite and not d.equal and not s.endswith(UNJUDGED)]
    judge = judge and len(unequal) > 0
    if judge:
        tell("running both in float64")
    judged = _judge(tape, mine, a, b, unequal) if judge else {}
    return [Row(r.stage, r.chained, local.get(r.stage), judged.get(r.stage)) for r in rows], only_a, only_b


def line_up(
    stages_a: Iterable[str], stages_b: Iterable[str], apart: Mapping[str, Difference], a: str, b: str
) -> tuple[list[Row], list[str], list[str]]:
    """Rows for the stages that both have, in a's order, and what only a and only b have.

    Raises :class:`ConfigError` if there is nothing in common.
    """
    stages_a, stages_b = list(stages_a), list(stages_b)
    some = [", ".join(repr(s) for s in stages[:3]) or "none" for stages in (stages_a, stages_b)]
    check(len(apart) > 0, f"no stage is common to both: {a} has {some[0]}, ...; {b} has {some[1]}, ...")
    in_a, in_b = set(stages_a), set(stages_b)
    rows = [Row(stage, apart[stage]) for stage in stages_a if stage in apart]
    return rows, [s for s in stages_a if s not in in_b], [s for s in stages_b if s not in in_a]


def _judge(
    tape: Mapping[str, Tensor], mine: Mapping[str, Tensor], a: Runner, b: Runner, stages: Iterable[str]
) -> dict[str, Judgement]:
    truth_a, truth_b = (_truth(tape, side, stages) for side in (a, b))
    found = {}
    for s in stages:
        truths = [truth[s] for truth in (truth_a, truth_b) if s in truth]
        if truths:
            gap = _rms(*truths) if len(truths) == 2 else None
            found[s] = Judgement(_rms(tape[s], truths[0]), _rms(mine[s], truths[-1]), gap)
    return found


def _truth(tape: Mapping[str, Tensor], side: Runner, stages: Iterable[str]) -> dict[str, Tensor]:
    """Run ``side`` on the tape's values in float64; as far as it gets, if a dtype is hard-coded."""
    own: dict[str, Tensor] = {}
    with side.wide(), suppress(RuntimeError, MinidiffError):
        locally(tape, side, stages, own)
    return {stage: value for stage, value in own.items() if value.dtype == torch.float64}


def _rms(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).square().mean().sqrt())


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _in_place_of(value: Tensor, other: Tensor) -> Tensor:
    """The numbers of ``other`` in the dtype, device and layout of ``value``: strides decide which kernel comes next."""
    same = value.dtype == other.dtype and torch.equal(value.detach().cpu(), other)
    if same or value.shape != other.shape:
        return value
    return torch.empty_like(value).copy_(other)
