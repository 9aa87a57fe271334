"""Number of large pictures that are computed at once where a batch is split (:mod:`minidiff.fast.groups`).

The rule stands apart from the switch because the estimate of memory follows it, too.
"""

from __future__ import annotations

from minidiff.config import UNetConfig, VAEConfig

LARGEST = 2**24  # bytes of the activations of a group, at the first level of the UNet or at the VAE's last


def rows_at_once(config: UNetConfig, area: int, size: int, together: int) -> int:
    """Return the rows of a group for samples of ``area`` numbers a channel, of ``size`` bytes each: a multiple of
    ``together``, the rows of a picture that stay in one group."""
    return together * max(1, LARGEST // (together * config.levels[0].channels * area * size))


def decoded_at_once(config: VAEConfig, area: int, size: int) -> int:
    """Return the pictures that are decoded together, from latents of ``area`` numbers a channel of ``size`` bytes."""
    return max(1, LARGEST // (config.channels[0] * area * config.factor**2 * size))
