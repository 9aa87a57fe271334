"""Whose random numbers: for a seed, the noise that a program would draw, picture by picture and step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.conventions.profiles import Profile
from minidiff.noise import seeds_of
from minidiff.philox import UNLIMITED, Card, CudaStream

Stream = torch.Generator | CudaStream
Mark = list[Tensor | int]


@dataclass(frozen=True)
class Source:
    """Called with (shape, dtype, device) it gives standard normal noise for a batch: a single stream draws it in one
    go, of several each draws its picture. ``keep``: in the dtype asked for, not in float32 and converted."""

    streams: tuple[Stream, ...]
    keep: bool

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        own = dtype if self.keep else torch.float32
        row = shape if len(self.streams) == 1 else (1, *shape[1:])
        return torch.cat([_draw(stream, row, own) for stream in self.streams]).to(device=device, dtype=dtype)

    def mark(self) -> Mark:
        """Where its streams are, for :meth:`rewind`."""
        return [s.offset if isinstance(s, CudaStream) else s.get_state() for s in self.streams]

    def rewind(self, mark: Mark) -> None:
        """Back to where the streams were: the same noise once more."""
        for stream, where in zip(self.streams, mark, strict=True):
            if isinstance(stream, CudaStream):
                stream.offset = int(where)
            else:
                stream.set_state(torch.as_tensor(where))


def _draw(stream: Stream, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(stream, CudaStream):
        return stream.randn(shape).to(dtype)  # on the card too it is drawn in float32
    return torch.randn(shape, generator=stream, dtype=dtype, device="cpu")


class Streams(NamedTuple):
    """``first`` draws the first noise of a run, ``later`` that of its steps. ``seeds``: one for each stream, or each
    picture's; ``shared``: all pictures come from one stream."""

    first: Source
    later: Source
    seeds: list[int]
    shared: bool

    def note(self, k: int, count: int) -> dict[str, int]:
        """What picture ``k`` of ``count`` needs to be had again: its seed, and in a shared stream its place."""
        if not self.shared:
            return {"seed": self.seeds[k]}
        return {"seed": self.seeds[0], **({"image": k, "images": count} if count > 1 else {})}


def streams(profile: Profile, seed: int | Sequence[int] | None, count: int, device: str | None, card: Card) -> Streams:
    """The streams of ``profile`` for ``count`` pictures. A list of seeds gives every picture a stream of its own.

    ``device``: "cpu", "gpu" or "nv" where the user chose one, else the program's own. CUDA's stream is computed on the
    CPU, for ``card``; "nv" is a1111's own way to do that, which knows no limit. Raises ConfigError as
    :func:`noise.seeds_of` does.
    """
    shared = profile.order.value == "batch" and not isinstance(seed, Sequence)
    seeds = seeds_of(1 if shared else count, seed)
    keep = profile.name == "diffusers"  # it alone draws in the model's dtype
    first = _source(seeds, device or profile.device.value, card, keep)
    if profile.later.value == "same":
        return Streams(first, first, seeds, shared)
    # A new generator of the same seed, on the device where the model runs; on a CPU it would repeat the first noise.
    where = device or "gpu"
    again = [s + 1 for s in seeds] if where == "cpu" else seeds
    return Streams(first, _source(again, where, card, keep), seeds, shared)


def _source(seeds: list[int], device: str, card: Card, keep: bool) -> Source:
    if device == "cpu":
        return Source(tuple(torch.Generator().manual_seed(s) for s in seeds), keep)
    return Source(tuple(CudaStream(s, UNLIMITED if device == "nv" else card) for s in seeds), keep)
