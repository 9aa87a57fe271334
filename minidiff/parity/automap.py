"""Names proposed for two recordings that call their stages otherwise: by order, shape and nearest values.

Both are lists in the order of computation, so the pairs follow each other on either side: the best such pairing is
found as two texts are aligned (Needleman and Wunsch, 1970), where a pair's weight says how near some of the values of
its stages are. Only stages of one shape are paired. What both call the same stays paired.

Equal values may stand in several stages: a dropout that does nothing returns its input, and a block the output of its
last layer. Order decides between them, and the words that two names share; a stage whose values are somewhere else is
paired with no other that only has its shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minidiff.config import check
from minidiff.parity.values import Array, Source, Value

SAMPLED = 64  # values of a stage that are looked at
NEAR, ALIKE = 1e-2, 0.5  # relative distance of the same value computed twice, and of one with a fault
BARELY = 0.05  # weight of a pair that only has the same shape
SHARED = 1e-3  # weight of names with the same words
WORD = re.compile(r"[a-z]+|\d+")


@dataclass(frozen=True)
class Pair:
    """Two stages that may be the same. ``distance``: of the sampled values, relative to the first's; ``rival``: the
    smallest of another stage of that shape. ``confidence``: "values", "values and order" (other stages have the same
    values), "likely" or "order and shape"."""

    a: str
    b: str
    distance: float
    rival: float

    @property
    def confidence(self) -> str:
        """Confidence in the pair."""
        if self.distance <= NEAR:
            return "values" if self.distance < self.rival / 2 else "values and order"
        return "likely" if self.distance <= ALIKE and self.distance < self.rival else "order and shape"


def propose(a: Source, b: Source) -> list[Pair]:
    """Return pairs of stages that the recordings name differently.

    Raises :class:`ConfigError` if no two stages have the same shape.
    """
    left = [stage for stage in a.values if stage not in b.values]
    right = [stage for stage in b.values if stage not in a.values]
    distances = _distances([a.values[s] for s in left], [b.values[s] for s in right])
    check(
        bool(np.isfinite(distances).any()) or len(left) < len(a.values),
        f"no stage of {a.title} has the shape of one of {b.title}: no names can be proposed",
    )
    found = []
    for i, j in align(weights(distances) + _shared(left, right, distances)):
        others = np.concatenate([np.delete(distances[i], j), np.delete(distances[:, j], i)])
        rival = float(others.min()) if others.size else float("inf")
        found.append(Pair(left[i], right[j], float(distances[i, j]), rival))
    return found


def weights(distances: Array) -> Array:
    """Return the weight of each pair: 1 for equal values, little for another value, 0 for another shape, and for
    another value if either stage's values are found elsewhere."""
    near = np.exp(-np.minimum(distances, 50.0) / (ALIKE / 2))
    found = distances <= NEAR
    elsewhere = (found.any(1, keepdims=True) | found.any(0, keepdims=True)) & (distances > ALIKE)
    return np.where(np.isfinite(distances) & ~elsewhere, BARELY + (1 - BARELY) * near, 0.0)


def _shared(a: Sequence[str], b: Sequence[str], distances: Array) -> Array:
    """Return what the words that two names share add to their weight, where the values are equal: too little to count
    against a value, and enough where nothing else tells stages apart."""
    words = [[set(WORD.findall(name)) for name in names] for names in (a, b)]
    found = np.zeros_like(distances)
    for i, j in zip(*np.nonzero(distances <= NEAR), strict=True):
        x, y = words[0][i], words[1][j]
        found[i, j] = SHARED * len(x & y) / max(1, len(x | y))
    return found


def align(weight: Array) -> list[tuple[int, int]]:
    """Return pairs (i, j), rising in both, whose weights have the largest sum; those of weight 0 are left out."""
    n, m = weight.shape
    best = np.zeros((n + 1, m + 1))
    for i in range(n):
        taken = best[i, :-1] + weight[i]
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], taken))
    pairs: list[tuple[int, int]] = []
    i, j = n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            if weight[i, j] > 0:
                pairs.append((i, j))
    return pairs[::-1]


def _distances(a: Sequence[Value], b: Sequence[Value]) -> Array:
    """Return the relative distance of some values of each stage of a and b; infinite if their shapes differ."""
    found = np.full((len(a), len(b)), np.inf)
    shapes: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for side, values in enumerate((a, b)):
        for k, value in enumerate(values):
            if value.sha256 is None and value.size > 0:
                shapes.setdefault(value.shape, ([], []))[side].append(k)
    for rows, columns in shapes.values():
        if rows and columns:
            x, y = (np.stack([sample(side[k]) for k in ks]) for side, ks in ((a, rows), (b, columns)))
            gap = np.stack([np.sqrt(((one - y) ** 2).mean(-1)) for one in x])  # all at once would not fit
            size = np.sqrt((x**2).mean(-1))[:, None]
            ratio = np.divide(gap, size, out=np.full_like(gap, 1.0), where=size > 0)
            ratio[(gap == 0) & (size == 0)] = 0.0
            found[np.ix_(rows, columns)] = np.nan_to_num(ratio, nan=1e3, posinf=1e3)
    return found


def sample(value: Value) -> Array:
    """Return some of a value's numbers, at the same places whatever its layout."""
    total = value.size
    places = np.unique(np.linspace(0, max(0, total - 1), min(total, SAMPLED)).astype(np.int64))
    if value.last:
        _, c, h, w = value.shape
        k, channel, y, x = np.unravel_index(places, value.shape)
        places = ((k * h + y) * w + x) * c + channel
    numbers = [value.numbers(int(place), 1)[0] for place in places]
    return np.nan_to_num(np.array(numbers, dtype=np.float64), nan=1e30, posinf=1e30, neginf=-1e30)


def as_names(pairs: Sequence[Pair]) -> Mapping[str, str]:
    """Return the map of names that :func:`minidiff.parity.comparing.compare` takes."""
    return {pair.a: pair.b for pair in pairs}


def table(pairs: Sequence[Pair]) -> str:
    """Format the pairs for a terminal."""
    if not pairs:
        return "no names proposed: every stage that has a counterpart is called the same"
    wide = [max(len(side) for side in column) for column in zip(*((p.a, p.b) for p in pairs), strict=True)]
    lines = [f"{p.a:<{wide[0]}}  {p.b:<{wide[1]}}  {p.distance:8.1e}  {p.confidence}" for p in pairs]
    kinds = ("values", "values and order", "likely", "order and shape")
    counts = {kind: sum(p.confidence == kind for p in pairs) for kind in kinds}
    said = ", ".join(f"{n} by {kind}" if kind != "likely" else f"{n} likely" for kind, n in counts.items() if n)
    return "\n".join([f"names proposed for {len(pairs)} stages ({said}):", *lines])
