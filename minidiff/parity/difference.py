"""Difference of two tensors: the largest one, absolute and relative, and in units in the last place (ULPs).

The bits of a positive float, read as an integer, grow with the number, by one from each float to the next, so the
distance in ULPs is a difference of integers (negative floats are mirrored, so that -0 and +0 are one number). A last
rounding may cause one ULP, a sum in another order a few hundred, another function millions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Integers of the floats' sizes, and all of their bits but the sign.
BITS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF),
}
MOST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Difference:
    """Difference of two tensors by value: equal numbers of different dtypes are equal.

    ``max_abs`` is the largest |a - b|, ``max_rel`` that divided by the largest |a|, ``ulps`` the largest distance in
    ULPs of the coarser dtype (None for integers, and if either is not finite). ``differing`` of ``total`` entries
    differ. ``bad_a`` and ``bad_b`` count NaN, which equals nothing. If the shapes differ, all figures are infinite.
    """

    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: torch.dtype
    dtype_b: torch.dtype
    max_abs: float
    max_rel: float
    ulps: int | None
    differing: int
    total: int
    bad_a: int = 0
    bad_b: int = 0

    @property
    def same_shape(self) -> bool:
        """True if the shapes are the same."""
        return self.shape_a == self.shape_b

    @property
    def finite(self) -> bool:
        """True if neither side holds a NaN."""
        return self.bad_a == self.bad_b == 0

    @property
    def equal(self) -> bool:
        """True if every entry has the same value."""
        return self.same_shape and self.differing == 0

    def within(self, tolerance: float) -> bool:
        """Return True if the largest difference is at most ``tolerance`` times the largest |a|; 0: equal values."""
        return self.equal or (self.same_shape and self.finite and self.max_rel <= tolerance)


def difference(a: Tensor, b: Tensor) -> Difference:
    """Compare ``b`` with ``a``; any shapes, any real dtypes, on the host."""
    kinds = (tuple(a.shape), tuple(b.shape), a.dtype, b.dtype)
    bad = [int(t.isnan().sum()) if t.is_floating_point() else 0 for t in (a, b)]
    if a.shape != b.shape:
        return Difference(*kinds, math.inf, math.inf, None, max(a.numel(), b.numel()), a.numel(), *bad)
    differing = int((a != b).sum())
    if differing == 0:
        return Difference(*kinds, 0.0, 0.0, 0 if a.is_floating_point() else None, 0, a.numel())
    gap = (a.double() - b.double()).abs()
    gap = torch.where(a == b, 0.0, gap)  # the distance of equal infinities is 0
    max_abs = math.nan if bad[0] or bad[1] else float(gap.max())
    largest = float(a.double().abs().nan_to_num(0.0).max())
    max_rel = max_abs / largest if 0 < largest < math.inf else max_abs if largest == math.inf else math.inf
    if math.isnan(max_abs):
        max_rel = math.nan
    count = ulps(a, b) if math.isfinite(max_abs) and a.is_floating_point() and b.is_floating_point() else None
    return Difference(*kinds, max_abs, max_rel, count, differing, a.numel(), *bad)


def ulps(a: Tensor, b: Tensor) -> int:
    """Return the largest distance of two finite float tensors of one shape, in ULPs of the coarser dtype."""
    coarser = a.dtype if torch.finfo(a.dtype).eps >= torch.finfo(b.dtype).eps else b.dtype
    x, y = _ordered(a.to(coarser)), _ordered(b.to(coarser))
    across = x.abs() + y.abs()  # on either side of 0; in float64 the sum may not fit
    across = torch.where(across < 0, MOST, across)
    return int(torch.where((x < 0) == (y < 0), (x - y).abs(), across).max())


def _ordered(x: Tensor) -> Tensor:
    """Map floats to int64 in the same order, 0 for both zeros."""
    kind, magnitude = BITS[x.dtype]
    bits = x.contiguous().view(kind).to(torch.int64)
    return torch.where(bits < 0, -(bits & magnitude), bits)
