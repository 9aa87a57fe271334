"""Rows of a comparison: what is known of one stage. No torch, so that recordings are compared without it."""

from __future__ import annotations

from dataclasses import dataclass

from minidiff.parity.difference import Difference

INPUT = ":in"  # ends the name of a stage that is a module's input
# From float32 to float64, rounding shrinks by 2**29 and the effect of another function not at all; a tenth is between.
STILL_THERE = 0.1


@dataclass(frozen=True)
class Judgement:
    """Comparison of a stage with float64: the distance of each side from it, and the distance of the sides in float64.

    All are root mean square differences, since the largest difference is a matter of chance. ``gap`` is None if one
    side cannot run in float64; then the other's result is used.
    """

    error_a: float
    error_b: float
    gap: float | None

    @property
    def same_function(self) -> bool:
        """True if the sides differ by rounding only."""
        return self.gap is None or self.gap < STILL_THERE * max(self.error_a, self.error_b)

    @property
    def nearer(self) -> str:
        """ "A", "B" or "both" (equally near); "" if there is no common truth."""
        if not self.same_function:
            return ""
        return "both" if self.error_a == self.error_b else "A" if self.error_a < self.error_b else "B"


@dataclass(frozen=True)
class Row:
    """One stage: the difference of the sides, each on its own and (None: not computed) on equal inputs.

    ``operation``: of the first cause, if both sides run in torch, the first operation at which they part within it.
    """

    stage: str
    chained: Difference
    local: Difference | None = None
    judgement: Judgement | None = None
    operation: str | None = None
