"""Difference of two tensors: the largest one, absolute and relative, in units in the last place (ULPs), and as noise.

The bits of a positive float, read as an integer, grow with the number, by one from each float to the next, so the
distance in ULPs is a difference of integers (negative floats are mirrored, so that -0 and +0 are one number). A last
rounding may cause one ULP, a sum in another order a few hundred, another function millions. Quantiles of ULPs, the norm
of the difference and the correlation tell a difference everywhere from one in a few places.

Everything is summed over pieces (:mod:`minidiff.parity.values`), with numpy alone: recordings are larger than memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from minidiff.parity.header import FLOATS
from minidiff.parity.values import PIECE, Array, Value, corners, pieces, sha256_of, value_of, widened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kinds: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], str, str]  # shapes and dtypes of both
MOST = np.iinfo(np.int64).max
INTEGERS: dict[int, np.dtype[Any]] = {2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
BINS = 16  # of a power of two: counts of ULPs below 32 are exact, larger ones to a sixteenth
ONE = 1023 * BINS  # the exponent and the upper bits of 1.0


@dataclass(frozen=True)
class Difference:
    """Difference of two tensors by value: equal numbers of different dtypes are equal.

    ``max_abs`` is the largest |a - b|, ``max_rel`` that divided by the largest |a|, ``ulps`` the largest distance in
    ULPs of the coarser dtype (None for integers, and if either is not finite), ``ulps_median`` and ``ulps_99`` what a
    half and 99 % of the distances do not exceed. ``differing`` of ``total`` entries differ. ``norm`` is the root mean
    square of a - b divided by that of a, ``correlation`` that of the entries. ``bad_a`` and ``bad_b`` count NaN, which
    equals nothing. If the shapes differ, all figures are infinite. ``hashed``: only hashes were compared, and no figure
    but 0 has a meaning.
    """

    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: torch.dtype | str
    dtype_b: torch.dtype | str
    max_abs: float
    max_rel: float
    ulps: int | None
    differing: int
    total: int
    bad_a: int = 0
    bad_b: int = 0
    ulps_median: int | None = None
    ulps_99: int | None = None
    norm: float = 0.0
    correlation: float = 1.0
    hashed: bool = False

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

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB: a is the signal, a - b the noise."""
        return math.inf if self.norm == 0 else -20 * math.log10(self.norm) if self.norm < math.inf else -math.inf

    def within(self, tolerance: float) -> bool:
        """Return True if the largest difference is at most ``tolerance`` times the largest |a|; 0: equal values."""
        return self.equal or (self.same_shape and self.finite and self.max_rel <= tolerance)


def difference(a: Tensor, b: Tensor) -> Difference:
    """Compare ``b`` with ``a``; any shapes, any real dtypes; tensors or arrays."""
    found = measure(value_of(a), value_of(b))
    return replace(found, dtype_a=getattr(a, "dtype", found.dtype_a), dtype_b=getattr(b, "dtype", found.dtype_b))


def measure(a: Value, b: Value) -> Difference:
    """Compare two values, by their hashes if that is all there is of one."""
    if a.whole != b.whole:
        a, b = (corners(a), b) if b.whole == a.shape else (a, corners(b)) if a.whole == b.shape else (a, b)
    kinds = (a.shape, b.shape, a.dtype, b.dtype)
    if a.shape != b.shape:
        none = a.sha256 is not None or b.sha256 is not None
        bad = (0, 0) if none else (_count_nan(a), _count_nan(b))
        most = max(a.size, b.size)
        return Difference(*kinds, math.inf, math.inf, None, most, a.size, *bad, norm=math.inf, correlation=0.0)
    if a.sha256 is not None or b.sha256 is not None:
        same = (a.sha256 or sha256_of(a)) == (b.sha256 or sha256_of(b))
        far, n = (0.0, 0) if same else (math.inf, a.size)
        return Difference(*kinds, far, far, None, n, a.size, norm=far, hashed=True)
    if _same_bits(a, b):
        return _no_difference(kinds, a.size, floating=a.floating)
    tally = Tally(_coarser(a, b))
    for x, y in pieces(a, b):
        tally.add(x, y)
    return tally.result(kinds)


def comparable(a: Value, b: Value) -> bool:
    """Return True unless one value is a hash of another dtype than the other's, which tells nothing."""
    return a.dtype == b.dtype or (a.sha256 is None and b.sha256 is None)


def rms(a: Value, b: Value) -> float:
    """Return the root mean square difference of two values of one shape."""
    total = 0.0
    for x, y in pieces(a, b):
        gap = x.astype(np.float64) - y.astype(np.float64)
        total += float(gap @ gap)
    return math.sqrt(total / max(1, a.size))


def _no_difference(kinds: Kinds, total: int, *, floating: bool) -> Difference:
    zero = 0 if floating else None
    return Difference(*kinds, 0.0, 0.0, zero, 0, total, ulps_median=zero, ulps_99=zero)


class Room:
    """Arrays by name, to be used again for every piece: fresh memory costs more than most of what is done in it."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def __call__(self, name: str, size: int, dtype: Any = np.float64) -> Array:
        """Return an array of ``size`` numbers, which hold anything."""
        found = self.arrays.get(name)
        if found is None or len(found) < size or found.dtype != dtype:
            found = self.arrays[name] = np.empty(size, dtype)
        return found[:size]


@dataclass
class Tally:
    """Sums over pieces of two values. ``precision``: name of the float whose ULPs are counted; "" counts none."""

    precision: str
    count: int = 0
    differing: int = 0
    max_abs: float = 0.0
    largest: float = 0.0  # |a|
    bad: list[int] = field(default_factory=lambda: [0, 0])
    sums: Any = field(default_factory=lambda: np.zeros(5))  # of a, b, a * a, b * b, (a - b) ** 2
    ulps: int = 0
    bins: Any = field(default_factory=lambda: np.zeros(65 * BINS, np.int64))
    room: Room = field(default_factory=Room)

    def add(self, x: Array, y: Array) -> None:
        """Add two flat pieces, whose numbers belong together."""
        with np.errstate(all="ignore"):
            a, b = self.room("a", len(x)), self.room("b", len(x))
            a[...], b[...] = x, y
            gap = np.subtract(a, b, out=self.room("gap", len(x)))
            most = max(gap.max(initial=0.0), -gap.min(initial=0.0))
            if math.isnan(gap.sum()):
                most = self._not_finite(a, b, gap)
            self.differing += int(np.count_nonzero(x != y))  # float64 does not hold the largest integers
            self.max_abs = math.nan if math.isnan(most) or math.isnan(self.max_abs) else max(self.max_abs, float(most))
            self.largest = max(
                self.largest, float(np.fmax.reduce(a, initial=0.0)), -float(np.fmin.reduce(a, initial=0.0))
            )
            self.sums += (a.sum(), b.sum(), a @ a, b @ b, gap @ gap)
            self.count += len(a)
            if self.precision and math.isfinite(self.max_abs):
                apart = distances(x, y, self.precision, self.room)
                self.ulps = max(self.ulps, int(apart.max(initial=0)))
                index = np.right_shift(
                    apart.astype(np.float64, copy=False).view(np.int64), 48, out=self.room("index", len(x), np.int64)
                )
                index -= ONE - 1
                self.bins += np.bincount(np.maximum(index, 0, out=index), minlength=len(self.bins))

    def _not_finite(self, a: Array, b: Array, gap: Array) -> float:
        """Count NaN; set the distance of equal infinities to 0; return the largest distance."""
        bad = [int(np.count_nonzero(np.isnan(side))) for side in (a, b)]
        self.bad = [n + m for n, m in zip(self.bad, bad, strict=True)]
        gap[a == b] = 0.0
        return math.nan if any(bad) else float(np.abs(gap).max())

    def _quantile(self, share: float) -> int:
        """Return what ``share`` of the distances does not exceed, to the precision of the bins."""
        k = int(np.searchsorted(np.cumsum(self.bins), share * self.count))
        return 0 if k == 0 else int(np.int64((k + ONE - 1) << 48).view(np.float64))

    def result(self, kinds: Kinds) -> Difference:
        """Return what the sums amount to."""
        if self.differing == 0:
            return _no_difference(kinds, self.count, floating=bool(self.precision))
        largest = min(self.largest, np.finfo(np.float64).max)
        max_rel = self.max_abs / largest if largest > 0 else math.inf
        counted = bool(self.precision) and math.isfinite(self.max_abs)
        with np.errstate(all="ignore"):
            norm = float(np.sqrt(self.sums[4] / self.sums[2])) if self.sums[2] != 0 else math.inf
        return Difference(
            *kinds,
            self.max_abs,
            math.nan if math.isnan(self.max_abs) else max_rel,
            self.ulps if counted else None,
            self.differing,
            self.count,
            bad_a=self.bad[0],
            bad_b=self.bad[1],
            ulps_median=self._quantile(0.5) if counted else None,
            ulps_99=self._quantile(0.99) if counted else None,
            norm=norm,
            correlation=self._correlation(),
        )

    def _correlation(self) -> float:
        """Return the correlation; the covariance follows from the variances of a, b and a - b."""
        a, b, aa, bb, gaps = (float(total) / self.count for total in self.sums)
        with np.errstate(all="ignore"):
            of_a, of_b, of_gap = aa - a * a, bb - b * b, gaps - (a - b) ** 2
        if not (of_a > 0 and of_b > 0):
            return math.nan if math.isnan(of_a + of_b) else 0.0
        return max(-1.0, min(1.0, (of_a + of_b - of_gap) / (2 * math.sqrt(of_a) * math.sqrt(of_b))))


def ulps(a: Tensor, b: Tensor) -> int:
    """Return the largest distance of two finite float tensors of one shape, in ULPs of the coarser dtype."""
    x, y = value_of(a), value_of(b)
    return max((int(distances(*both, _coarser(x, y)).max()) for both in pieces(x, y)), default=0)


def distances(x: Array, y: Array, precision: str, room: Room | None = None) -> Array:
    """Return the distances of flat floats in ULPs of ``precision``, after rounding to it. ``room``: where they lie,
    until it is used again."""
    room = room or Room()
    a, b = _ordered(x, precision, room, "ordered a"), _ordered(y, precision, room, "ordered b")
    if precision != "float64":  # which holds all of these
        gap: Array = np.subtract(a, b, dtype=np.float64, out=room("apart", len(a)))
        return np.abs(gap, out=gap)
    across = np.abs(a) + np.abs(b)  # on either side of 0 the sum may not fit
    across[across < 0] = MOST
    return np.where((a < 0) == (b < 0), np.abs(a - b), across)


def _ordered(x: Array, precision: str, room: Room, name: str) -> Array:
    """Map floats to integers in the same order, 0 for both zeros."""
    if precision == "bfloat16":  # rounded to the upper half of a float32, to even
        wide = x.astype(np.float32, copy=False).view(np.uint32).astype(np.int64)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)
    else:
        narrow = x.astype(precision, copy=False)
        bits = narrow.view(INTEGERS[int(narrow.dtype.itemsize)])
    kind = bits.dtype
    negative = np.right_shift(bits, 8 * kind.itemsize - 1, out=room("negative", len(bits), kind))  # -1 or 0
    ordered: Array = np.bitwise_and(negative, np.iinfo(kind).max, out=room(name, len(bits), kind))
    ordered ^= bits  # of negative ones -1 minus the magnitude
    ordered -= negative
    return ordered


def _coarser(a: Value, b: Value) -> str:
    """Return the coarser of the floats that two values were computed in; "" if either is no float."""
    if not (a.floating and b.floating):
        return ""
    return max(a.precision, b.precision, key=FLOATS.index)


def _same_bits(a: Value, b: Value) -> bool:
    """Return True if two values have the same bits and no NaN; reading stops where they differ."""
    if a.dtype != b.dtype or a.last != b.last:
        return False
    for start in range(0, a.size, PIECE):
        count = min(PIECE, a.size - start)
        x, y = a.read(start, count), b.read(start, count)
        at_once = isinstance(x, bytes) and isinstance(y, bytes)
        if not (x == y if at_once else np.array_equal(np.frombuffer(x, np.uint8), np.frombuffer(y, np.uint8))):
            return False
        if a.floating and _any_nan(widened(x, a.dtype)):
            return False
    return True


def _any_nan(x: Array) -> bool:
    if x.dtype == np.float16:
        return bool(((x.view(np.uint16) & 0x7FFF) > 0x7C00).any())
    return bool(np.isnan(x.max(initial=0.0)))  # the maximum of numbers with a NaN is NaN


def _count_nan(value: Value) -> int:
    if not value.floating:
        return 0
    return sum(
        int(np.count_nonzero(np.isnan(value.numbers(start, min(PIECE, value.size - start)))))
        for start in range(0, value.size, PIECE)
    )
