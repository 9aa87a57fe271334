"""Brownian path from a seed, reproducible for any interval and in any order of access.

The increment over the whole range is one normal draw. When the range is halved, the increment of the left half given
that of the whole is normal again (a Brownian bridge), and so on recursively: a binary tree in which every node has a
seed of its own, derived from the path's seed and the node's position (Kidger et al. 2021, "Efficient and Accurate
Gradients for Neural SDEs", section 4). The increment over an interval is the sum over the few nodes that cover it. The
draws are those of the torchsde package for the same seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGITS = 6  # the ends of intervals are rounded to this many decimals
POOL = 24


class Node(NamedTuple):
    """An interval of the tree, its place among the 2**depth nodes of its depth, and the path's increment over it."""

    start: float
    end: float
    place: int
    depth: int
    increment: Tensor


@dataclass(frozen=True)
class BrownianTree:
    """Brownian path of ``seed`` over ``start``..``end``."""

    start: float
    end: float
    seed: int

    def increment(self, a: float, b: float, like: Tensor) -> Tensor:
        """Draw the increment over ``a``..``b``, with a < b, in the shape and dtype of ``like`` and on its device:
        normal, with the interval's length as variance."""
        seeds = np.random.SeedSequence(entropy=self.seed, pool_size=POOL).generate_state(3)
        whole = seeded(int(seeds[0]), like) * math.sqrt(self.end - self.start)
        top = Node(round(self.start, DIGITS), round(self.end, DIGITS), 0, 0, whole)
        a, b = (round(min(max(t, top.start), top.end), DIGITS) for t in (a, b))
        parts = [node.increment for node in self._cover(top, a, b)] or [torch.zeros_like(like)]
        return sum(parts[1:], parts[0])

    def _cover(self, node: Node, a: float, b: float) -> list[Node]:
        """Return the nodes that cover ``a``..``b``, from left to right: ``node`` itself, or parts of its halves."""
        start, end, place, depth, whole = node
        if a >= b:
            return []
        if (a, b) == (start, end):
            return [node]
        # given the whole increment W, that of the left half is normal: mean W * left / (left + right)
        middle = round(0.5 * (end + start), DIGITS)
        left, right, per = middle - start, end - middle, 1 / (end - start)
        fresh = seeded(_seed(self.seed, place, depth), whole)
        half = left * whole * per + math.sqrt(left * right * per) * fresh
        first = Node(start, middle, 2 * place, depth + 1, half)
        second = Node(middle, end, 2 * place + 1, depth + 1, whole - half)
        return self._cover(first, a, min(b, middle)) + self._cover(second, max(a, middle), b)


@lru_cache(maxsize=2**14)  # bounded, for programs that make many pictures with a seed each
def _seed(entropy: int, place: int, depth: int) -> int:
    sequence = np.random.SeedSequence(entropy=entropy, spawn_key=(place, depth), pool_size=POOL)
    return int(sequence.generate_state(4)[0])


def seeded(seed: int, like: Tensor) -> Tensor:
    """Draw standard normal noise from a seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
