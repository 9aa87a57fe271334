"""Brownian path from a seed, reproducible for any interval and in any order of access.

The increment over the whole range is one normal draw. When the range is halved, the increment of the left half given
that of the whole is normal again (a Brownian bridge), and so on recursively: a binary tree in which every node has a
seed of its own, derived from the path's seed and the node's position (Kidger et al. 2021, "Efficient and Accurate
Gradients for Neural SDEs", section 4). The increment over an interval is the sum over the few nodes that cover it. The
draws are those of the torchsde package for the same seed. The nodes and seeds of an interval are determined in
advance, as plain numbers; a sampler's step only has to draw.
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


class Bridge(NamedTuple):
    """One halving: the seed of its draw, the mean and the standard deviation of the left half's increment (the mean
    is ``left`` * the whole * ``per``), and which half is wanted."""

    seed: int
    left: float
    per: float
    std: float
    is_left: bool


class Node(NamedTuple):
    """An interval of the tree, and the halvings that lead to it from the top."""

    start: float
    end: float
    key: int
    depth: int
    way: tuple[Bridge, ...]


Increment = tuple[tuple[Bridge, ...], ...]
"""The nodes that cover an interval, from left to right."""


@dataclass(frozen=True)
class BrownianTree:
    """Brownian path of ``seed`` over ``start``..``end``."""

    start: float
    end: float
    seed: int

    @property
    def root(self) -> tuple[int, float]:
        """Seed and standard deviation of the draw for the whole range."""
        seeds = np.random.SeedSequence(entropy=self.seed, pool_size=POOL).generate_state(3)
        return int(seeds[0]), math.sqrt(self.end - self.start)

    def increment(self, a: float, b: float) -> Increment:
        """Return the nodes for the interval ``a``..``b``, with a < b."""
        top = Node(round(self.start, DIGITS), round(self.end, DIGITS), 0, 0, ())
        a, b = (round(min(max(t, top.start), top.end), DIGITS) for t in (a, b))
        return tuple(node.way for node in self._cover(top, a, b))

    def _cover(self, node: Node, a: float, b: float) -> list[Node]:
        if a == b:
            return []
        if (a, b) == (node.start, node.end):
            return [node]
        left, right = self._halves(node)
        if b <= left.end:
            return self._cover(left, a, b)
        if a >= left.end:
            return self._cover(right, a, b)
        return self._cover(left, a, left.end) + self._cover(right, left.end, b)

    def _halves(self, node: Node) -> tuple[Node, Node]:
        start, end, key, depth, way = node
        middle = round(0.5 * (end + start), DIGITS)
        left, right, per = middle - start, end - middle, 1 / (end - start)
        std = math.sqrt(left * right * per)
        seed = _seed(self.seed, key, depth)
        return (
            Node(start, middle, 2 * key, depth + 1, (*way, Bridge(seed, left, per, std, True))),
            Node(middle, end, 2 * key + 1, depth + 1, (*way, Bridge(seed, left, per, std, False))),
        )


@lru_cache(maxsize=2**14)  # bounded, for programs that make many pictures with a seed each
def _seed(entropy: int, key: int, depth: int) -> int:
    sequence = np.random.SeedSequence(entropy=entropy, spawn_key=(key, depth), pool_size=POOL)
    return int(sequence.generate_state(4)[0])


def draw_increment(root: tuple[int, float], nodes: Increment, like: Tensor) -> Tensor:
    """Draw the increment over an interval, in the shape and dtype of ``like`` and on its device: normal, with the
    interval's length as variance."""
    seen: dict[tuple[Bridge, ...], Tensor] = {(): seeded(root[0], like) * root[1]}
    total = torch.zeros_like(like)
    for k, way in enumerate(nodes):
        for depth, bridge in enumerate(way):
            if way[: depth + 1] not in seen:
                whole = seen[way[:depth]]
                left = bridge.left * whole * bridge.per + bridge.std * seeded(bridge.seed, like)
                seen[way[: depth + 1]] = left if bridge.is_left else whole - left
        total = seen[way] if k == 0 else total + seen[way]
    return total


def seeded(seed: int, like: Tensor) -> Tensor:
    """Draw standard normal noise from a seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
