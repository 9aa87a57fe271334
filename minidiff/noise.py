"""Sources of random numbers.

With a seed, every image has a stream of its own. Image k of a run with seed s draws from
``Generator().manual_seed(s + k)`` on the CPU, in float32: first its initial noise, then all noise that its sampler asks
for. The noise of an image is therefore bit-identical in any batch, on any device and in any dtype. A generator passed
by the caller is used as in diffusers: one for the whole batch in a single draw, or a list with one for each image, on
the generator's device and in the sample's dtype.
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
    """Source of standard normal noise: call it with (shape, dtype, device) for the noise of a whole batch.

    ``shared``: one stream draws all images together; otherwise stream k draws image k, and the first entry of shape is
    the number of images. ``keep``: draw in the requested dtype, instead of drawing in float32 and converting.
    """

    streams: tuple[Stream, ...]
    shared: bool
    keep: bool

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        own = dtype if self.keep else torch.float32
        row = shape if self.shared else (1, *shape[1:])
        return torch.cat([_draw(stream, row, own) for stream in self.streams]).to(device=device, dtype=dtype)

    def mark(self) -> Mark:
        """Return the positions of the streams, for :meth:`rewind`."""
        return [s.offset if isinstance(s, CudaStream) else s.get_state() for s in self.streams]

    def rewind(self, mark: Mark) -> None:
        """Set the streams back to ``mark``, so that the same noise is drawn again."""
        for stream, where in zip(self.streams, mark, strict=True):
            if isinstance(stream, CudaStream):
                stream.offset = int(where)
            else:
                stream.set_state(torch.as_tensor(where, device="cpu"))


def _draw(stream: Stream, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(stream, CudaStream):
        return stream.randn(shape).to(dtype)  # CUDA draws in float32 too
    return torch.randn(shape, generator=stream, dtype=dtype, device=stream.device)


def source(count: int, seed: int | Sequence[int] | None, generator: Generators | None) -> Source:
    """Return the noise source for a batch of ``count`` images.

    Without a seed or generator, the seed is drawn from torch's global generator. Raises :class:`ConfigError` if both
    are given, if a list does not have ``count`` entries, or if an entry has the wrong type.
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
    """Return the seed of each image: ``seed + k`` for image k, the given list, or seeds counted from a random start.

    Raises :class:`ConfigError` for a list of another length, or a seed that is not a whole number of 64 bits.
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
