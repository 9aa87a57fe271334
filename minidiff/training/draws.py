"""Random numbers of training: each example of the endless stream has a generator of its own.

The timestep, the noise and the coin flips of example k follow from a seed made of the run's seed and k alone. A resumed
run therefore needs no generator state; a batch that is split into parts or over machines sees the same numbers as a
whole one; and an example's noise can be reproduced afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio, odd: seeds 0, 1, 2 ... start far apart


class Draws:
    """Generators of examples ``first`` .. ``first + count - 1``. Results depend on the order of the calls.

    All numbers are drawn on the CPU in float32 or int64, then moved to ``device``.
    """

    def __init__(self, seed: int, first: int, count: int, device: torch.device | str = "cpu") -> None:
        # The CPU's generator uses 32 bits of a seed: streams repeat after four billion examples, not before.
        seeds = [(seed * GOLDEN + k) % 2**32 for k in range(first, first + count)]
        self.streams = [torch.Generator().manual_seed(s) for s in seeds]
        self.device = torch.device(device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, \\*shape)."""
        out = torch.empty(len(self.streams), *shape)
        for row, stream in zip(out, self.streams, strict=True):
            row.normal_(generator=stream)
        return out.to(self.device)

    def integers(self, below: int) -> Tensor:
        """Uniform int64 (B,) in 0 .. below - 1."""
        drawn = [torch.randint(below, (1,), generator=stream) for stream in self.streams]
        return torch.cat(drawn).to(self.device)

    def uniform(self) -> Tensor:
        """Uniform float32 (B,) in [0, 1)."""
        return torch.cat([torch.rand(1, generator=stream) for stream in self.streams]).to(self.device)
