"""Whose random numbers: for a seed, the noise that a program would draw, picture by picture and step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.conventions.profiles import Profile
from minidiff.noise import Randn, seeds_of
from minidiff.philox import Card, CudaStream

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Streams(NamedTuple):
    """``first`` draws the first noise of a run, ``later`` that of its steps. ``seeds``: one for each stream, or each
    picture's; ``shared``: all pictures come from one stream."""

    first: Randn
    later: Randn
    seeds: list[int]
    shared: bool

    def note(self, k: int, count: int) -> dict[str, int]:
        """What picture ``k`` of ``count`` needs to be had again: its seed, and in a shared stream its place."""
        if not self.shared:
            return {"seed": self.seeds[k]}
        return {"seed": self.seeds[0], **({"image": k, "images": count} if count > 1 else {})}


def streams(profile: Profile, seed: int | Sequence[int] | None, count: int, device: str | None, card: Card) -> Streams:
    """The streams of ``profile`` for ``count`` pictures. A list of seeds gives every picture a stream of its own.

    ``device``: "cpu" or "cuda" where the user chose one, else the program's own; "cuda" is computed on the CPU, for
    ``card``. Raises ConfigError as :func:`noise.seeds_of` does.
    """
    shared = profile.order.value == "batch" and not isinstance(seed, Sequence)
    seeds = seeds_of(1 if shared else count, seed)
    keep = profile.name == "diffusers"  # it alone draws in the model's dtype
    first = _source(seeds, device or profile.device.value, card, keep)
    if profile.later.value == "same":
        return Streams(first, first, seeds, shared)
    # A new generator of the same seed, on the device where the model runs; on a CPU it would repeat the first noise.
    where = device or "cuda"
    again = [s + 1 for s in seeds] if where == "cpu" else seeds
    return Streams(first, _source(again, where, card, keep), seeds, shared)


def _source(seeds: list[int], device: str, card: Card, keep: bool) -> Randn:
    """A function (shape, dtype, device) -> noise from a stream of each seed; one stream draws the whole batch."""
    draws = [_cuda(s, card) if device == "cuda" else _cpu(s) for s in seeds]

    def draw(shape: tuple[int, ...], dtype: torch.dtype, to: torch.device) -> Tensor:
        own = dtype if keep else torch.float32
        if len(draws) == 1:
            return draws[0](shape, own).to(device=to, dtype=dtype)
        return torch.cat([one((1, *shape[1:]), own) for one in draws]).to(device=to, dtype=dtype)

    return draw


def _cuda(seed: int, card: Card) -> Draw:
    stream = CudaStream(seed, card)
    return lambda shape, dtype: stream.randn(shape).to(dtype)


def _cpu(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, dtype: torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
