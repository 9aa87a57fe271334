"""Where every random number comes from.

A seed gives every image a stream of its own: image k of a run with seed s draws from ``Generator().manual_seed(s + k)``
on the CPU, its first noise and whatever its sampler asks for later, in float32. So the noise of an image is the same
bits in any batch, on any device, in any dtype. A generator that the caller brings is used as diffusers uses it: one for
the whole batch in one draw, or a list with one for each image, on the generator's device and in the sample's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.philox import CudaStream

Generators = torch.Generator | Sequence[torch.Generator]


Stream = torch.Generator | CudaStream
Mark = list[Tensor | int]


@dataclass(frozen=True)
class Source:
    """Called with (shape, dtype, device) it gives standard normal noise, for a whole batch at once.

    ``shared``: one stream draws all images together; otherwise stream k draws image k, and the first entry of shape is
    their number. ``keep``: it is drawn in the dtype that is asked for, not in float32 and converted.
    """

    streams: tuple[Stream, ...]
    shared: bool
    keep: bool

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        own = dtype if self.keep else torch.float32
        row = shape if self.shared else (1, *shape[1:])
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
                stream.set_state(torch.as_tensor(where, device="cpu"))


def _draw(stream: Stream, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(stream, CudaStream):
        return stream.randn(shape).to(dtype)  # on the card too it is drawn in float32
    return torch.randn(shape, generator=stream, dtype=dtype, device=stream.device)


def source(count: int, seed: int | Sequence[int] | None, generator: Generators | None) -> Source:
    """The noise for a batch of ``count``.

    Raises :class:`ConfigError` if seed and generator are both given, a list of them has another length than ``count``,
    or is no list of such. Without either, torch's global generator is drawn from once for a seed.
    """
    check(seed is None or generator is None, "seed and generator are both given; a run has one source of noise")
    if isinstance(generator, torch.Generator):
        return Source((generator,), shared=True, keep=True)
    if generator is not None:
        streams = list(generator) if isinstance(generator, Sequence) else [generator]
        known = all(isinstance(g, torch.Generator) for g in streams)
        check(known, f"generator={generator!r} is no torch.Generator, and no list of them")
        check(len(streams) == count, f"{len(streams)} generators for {count} images; give one, or one for each")
        return Source(tuple(streams), shared=False, keep=True)
    return Source(tuple(torch.Generator().manual_seed(s) for s in seeds_of(count, seed)), shared=False, keep=False)


def seeds_of(count: int, seed: int | Sequence[int] | None) -> list[int]:
    """The seed of each image: ``seed + k``, the list as it is, or a fresh random start.

    Raises :class:`ConfigError` for a list of another length, or a seed that is no whole number of 64 bits.
    """
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    try:
        seeds = list(map(index, seed)) if isinstance(seed, Sequence) else [index(seed) + k for k in range(count)]
    except TypeError:
        raise ConfigError(f"seed={seed!r} is no whole number, and no list of them") from None
    check(len(seeds) == count, f"{len(seeds)} seeds for {count} images; give one, or one for each")
    for s in seeds:
        check(-(2**63) <= s < 2**64, f"seed={s} does not fit into 64 bits")
    return seeds
