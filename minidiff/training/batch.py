"""Interface of the data for the training loop: pictures by number, from an endless stream.

A stream that can be asked for any of its numbers needs no state. A run that stopped after n pictures goes on with
number n, and two machines each take half of a batch without communicating.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minidiff.models.vae import DiagonalGaussian


class Batch(NamedTuple):
    """Batch of examples: ``pixels`` (B, 3, H, W) in [-1, 1], ``captions`` if there are any, ``latents`` if cached."""

    pixels: Tensor
    captions: Sequence[str] | None = None
    latents: DiagonalGaussian | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the same batch with its tensors on ``device``."""
        latents = self.latents
        if latents is not None:
            latents = DiagonalGaussian(latents.mean.to(device), latents.logvar.to(device))
        return Batch(self.pixels.to(device), self.captions, latents)


class Data(Protocol):
    """Any object with this method can be trained on. Equal arguments give equal batches."""

    def batch(self, start: int, count: int) -> tuple[Tensor, Sequence[str] | None] | Batch:
        """Return examples ``start`` .. ``start + count - 1`` of the stream: a :class:`Batch`, or (pixels, captions)."""
