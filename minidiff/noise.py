"""Where every random number comes from.

A seed gives every image a stream of its own: image k of a run with seed s draws from ``Generator().manual_seed(s + k)``
on the CPU, its first noise and whatever its sampler asks for later, in float32. So the noise of an image is the same
bits in any batch, on any device, in any dtype. A generator that the caller brings is used as diffusers uses it: one for
the whole batch in one draw, or a list with one for each image, on the generator's device and in the sample's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError

Generators = torch.Generator | Sequence[torch.Generator]
Randn = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def source(count: int, seed: int | Sequence[int] | None, generator: Generators | None) -> Randn:
    """A function (shape, dtype, device) -> noise for a batch of ``count``; the first entry of shape is ``count``.

    Raises :class:`ConfigError` if seed and generator are both given, a list of them has another length than ``count``,
    or is no list of such. Without either, torch's global generator is drawn from once for a seed.
    """
    check(seed is None or generator is None, "seed and generator are both given; a run has one source of noise")
    if isinstance(generator, torch.Generator):
        return lambda shape, dtype, device: _draw(shape, generator, dtype).to(device)
    if generator is not None:
        streams, keep = list(generator) if isinstance(generator, Sequence) else [generator], True
        known = all(isinstance(g, torch.Generator) for g in streams)
        check(known, f"generator={generator!r} is no torch.Generator, and no list of them")
        check(len(streams) == count, f"{len(streams)} generators for {count} images; give one, or one for each")
    else:
        seeds = seeds_of(count, seed)
        streams, keep = [torch.Generator().manual_seed(s) for s in seeds], False

    def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        own = dtype if keep else torch.float32
        rows = [_draw((1, *shape[1:]), stream, own) for stream in streams]
        return torch.cat(rows).to(device=device, dtype=dtype)

    return draw


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


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
