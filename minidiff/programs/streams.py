"""Random numbers of other programs: the noise that a program would draw for a seed, by picture and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from minidiff.noise import Source, seeds_of
from minidiff.philox import UNLIMITED, Card, CudaStream
from minidiff.programs.profiles import Profile


class Streams(NamedTuple):
    """Noise streams of a run: ``first`` draws its first noise, ``later`` that of its steps. ``seeds``: one for each
    stream, or each picture's; ``shared``: all pictures come from one stream."""

    first: Source
    later: Source
    seeds: list[int]
    shared: bool

    def rewinding(self) -> Callable[[], None]:
        """Return a function that sets both streams back to where they are now."""
        places = [(source, source.mark()) for source in (self.first, self.later)]

        def rewind() -> None:
            for source, place in places:
                source.rewind(place)

        return rewind

    def note(self, k: int, count: int) -> dict[str, int]:
        """Return the recipe entries that reproduce picture ``k`` of ``count``: seed, and place in a shared stream; none
        for the caller's generators."""
        if not self.seeds:
            return {}
        if not self.shared:
            return {"seed": self.seeds[k]}
        return {"seed": self.seeds[0], **({"place": k, "places": count} if count > 1 else {})}


def streams(profile: Profile, seed: int | Sequence[int] | None, count: int, device: str | None, card: Card) -> Streams:
    """Return the streams of ``profile`` for ``count`` pictures. A list of seeds gives every picture its own stream.

    ``device``: "cpu", "gpu" or "nv" if the user chose one, None for the program's own. CUDA's stream is computed on the
    CPU, for ``card``; "nv" is a1111's own way to do that, for pictures of any size. Raises :class:`ConfigError` as
    :func:`noise.seeds_of` does.
    """
    shared = profile.order.value == "batch" and not isinstance(seed, Sequence)
    seeds = seeds_of(1 if shared else count, seed)
    keep = profile.name == "diffusers"  # it alone draws in the model's dtype
    first = _source(seeds, device or profile.device.value, card, shared, keep)
    if profile.later.value == "same":
        return Streams(first, first, seeds, shared)
    # A new generator of the same seed, on the device where the model runs; on a CPU it would repeat the first noise.
    where = device or "gpu"
    again = [s + 1 for s in seeds] if where == "cpu" else seeds
    return Streams(first, _source(again, where, card, shared, keep), seeds, shared)


def _source(seeds: list[int], device: str, card: Card, shared: bool, keep: bool) -> Source:
    if device == "cpu":
        return Source(tuple(torch.Generator().manual_seed(s) for s in seeds), shared, keep)
    return Source(tuple(CudaStream(s, UNLIMITED if device == "nv" else card) for s in seeds), shared, keep)
