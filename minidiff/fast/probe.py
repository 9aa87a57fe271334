"""Choice of bfloat16 or float32 by the speed of this processor, measured once and cached.

Some processors compute bfloat16 at twice the speed of float32, others at a tenth, and no identifier tells which.
Therefore a convolution and a matrix product of the size of a UNet's are timed in both. The result is kept in the user's
cache folder, by processor, threads and version of torch; if that cannot be read or written, it is measured again.

bfloat16 keeps 8 of 24 bits, so it is chosen only if it is clearly faster, and only for large models: a small one is
done in seconds, most of which is the overhead of many operations, which is no faster in bfloat16.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.fast import machine

WORTH = 1.3  # times as fast; with less, it is not worth 16 bits of precision
# Bytes on disk. Every Stable Diffusion has more, even in float16. Unconditional models have fewer; they take hundreds
# of steps, each smaller than the resolution of bfloat16.
LARGE = 10**9
CHANNELS, SIDE = 320, 8  # those of the first level of Stable Diffusion's UNet, and a part of its picture
ROUNDS = 6  # the first is to warm up
HOPELESS = 3  # times as slow after two rounds: the rest is skipped


def choice(bytes_on_disk: int) -> torch.dtype:
    """Return the command line's default dtype on a CPU: bfloat16 if it is faster for a model of that size."""
    return dtype_of(gain()) if bytes_on_disk >= LARGE else torch.float32


def dtype_of(gain: float) -> torch.dtype:
    """Return the dtype of large models on a processor whose bfloat16 is ``gain`` times as fast as its float32."""
    return torch.bfloat16 if gain >= WORTH else torch.float32


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Return the size of a file, or of all files in a folder, in bytes."""
    path = Path(path)
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def gain(anew: bool = False) -> float:
    """Return the speed of bfloat16 relative to float32 on this machine, from the cache or (``anew``: always) measured
    now."""
    key = machine.description()
    known = None if anew else NOTES.all().get(key)
    if known is None:
        found = measured()
        known = NOTES.keep(key, found, anew)
        if known is None:  # nowhere to keep it
            return found
    return known


def read(found: object) -> float:
    """Return a gain from parsed JSON. Raises ValueError or TypeError for anything else."""
    if not isinstance(found, (int, float)) or not 0 < found < math.inf:
        raise ValueError(f"{found!r} is not a gain")
    return float(found)


NOTES = machine.Notes("bfloat16.json", read)


def measured() -> float:
    """Return the smaller gain of the two, since both must be faster. It takes about a tenth of a second."""
    found = math.inf
    for make in (convolution, product):
        found = min(found, speedup(make(torch.float32), make(torch.bfloat16)))
        if found < 1:
            break
    return found


def convolution(dtype: torch.dtype) -> Callable[[], Any]:
    """Set up a convolution of a ResBlock, with a small picture for each thread."""
    x, weight = _ones(torch.get_num_threads(), CHANNELS, SIDE, SIDE), _ones(CHANNELS, CHANNELS, 3, 3)
    return partial(F.conv2d, x.to(dtype), weight.to(dtype), padding=1)


def product(dtype: torch.dtype) -> Callable[[], Any]:
    """Set up the matrix product into a feed-forward network."""
    x, weight = _ones(torch.get_num_threads() * SIDE * SIDE, CHANNELS), _ones(8 * CHANNELS, CHANNELS)
    return partial(F.linear, x.to(dtype), weight.to(dtype))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cpu")


@torch.no_grad()
def speedup(plain: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Return the speed of ``other`` relative to ``plain``.

    They run in turn and the shortest time of each counts, since other load can only make a run longer.
    """
    best = [math.inf, math.inf]
    for n in range(ROUNDS):
        for i, work in enumerate((plain, other)):
            begun = time.perf_counter()
            work()
            best[i] = min(best[i], max(time.perf_counter() - begun, 1e-9))
        if n == 1 and best[1] > HOPELESS * best[0]:
            break
    return best[0] / best[1]
