"""Arithmetic that the methods share: measures of noise, dtypes, and columns of a plan."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Space = Literal["alpha_bar", "sigma", "lambda"]
"""Measure of noise of a method, and scale of its x: ``alpha_bar``, with x of unit variance; ``sigma`` = noise /
signal, with x at the picture's own scale plus noise; ``lambda`` = -log sigma, from sigma, with x of unit variance."""
Put = tuple[Space, Tensor]
"""A level and its measure."""


def lambda_of(sigma: Tensor) -> Tensor:
    """Return lambda = log(signal / noise) at ``sigma`` (n,): half the logarithm of the signal-to-noise ratio."""
    signal, noise = rates(sigma)
    return torch.log(signal) - torch.log(noise)


def rates(level: Tensor, space: Space = "sigma") -> tuple[Tensor, Tensor]:
    """Return (signal, noise) at ``level`` (any shape), with signal**2 + noise**2 = 1: the roots of alpha_bar and
    1 - alpha_bar. In the other spaces, ``level`` is sigma = noise / signal."""
    if space == "alpha_bar":
        return level**0.5, (1 - level) ** 0.5
    signal = 1 / (level**2 + 1) ** 0.5
    return signal, level * signal


def noisy(space: Space, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Add ``noise`` to ``x0`` at ``level``, which broadcasts against both and has their dtype."""
    if space == "sigma":
        return x0 + noise * level
    signal, amount = rates(level, space)
    return signal * x0 + amount * noise


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in float32: in half precision the sum of picture and noise would lose the picture at large sigma."""
    return x.to(torch.float32)


def meet(y: Tensor, x: Tensor) -> Tensor:
    """Convert ``y`` to the wider dtype of both, as their sum would."""
    return y.to(torch.promote_types(y.dtype, x.dtype))


def unit() -> Tensor:
    """Return a 0-dim 1 on the host, whatever torch's current default device and dtype are."""
    return torch.tensor(1.0, dtype=torch.float32, device="cpu")


def earlier(column: Tensor) -> Tensor:
    """Shift ``column`` (n,) by one row: each entry becomes that of the row before. The first one stays."""
    return torch.cat([column[:1], column[:-1]])


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Put ``second`` (n,) or (n - 1,) between the entries of ``first`` (n,): (2n - 1,), in the dtype of ``first``."""
    both = first.repeat_interleave(2)[:-1]
    both[1::2] = second[: len(first) - 1]
    return both
