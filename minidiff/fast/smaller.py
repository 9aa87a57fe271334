"""The same work in smaller batches, which trades time for memory.

Activations grow with the batch. Guidance runs the UNet on two predictions per picture, and the VAE's last levels take a
gigabyte per picture of 512 x 512 in float32. The pictures of a batch are independent, so it can be split; the bits of a
picture are then those of the smaller batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import Wrapping
from minidiff.models.around import Around
from minidiff.models.taesd import TAESD
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.pipeline.denoise import check_cancelled


class OneByOne(Around):
    """The ``decode`` of a VAE."""

    def __call__(self, z: Tensor) -> Tensor:
        return torch.cat([self.one(z) for z in z.chunk(len(z))])

    def one(self, z: Tensor) -> Tensor:
        check_cancelled()
        return self.inner(z)  # type: ignore[no-any-return]


class VaeSlices(Wrapping):
    """Switch of a VAE that decodes one picture at a time, each with the bits that it has alone."""

    around = OneByOne
    method = "decode"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, (VAE, TAESD))


class Halves(Around):
    """Replacement for the ``forward`` of a UNet: an even batch in two halves. On a card, only after it did not fit."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.whole_fits = True
        super().__init__(layer, name)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) % 2 == 1:
            return self.inner(x, *args, **kwargs)  # type: ignore[no-any-return]
        if x.is_cuda and self.whole_fits:
            try:
                return self.inner(x, *args, **kwargs)  # type: ignore[no-any-return]
            except torch.OutOfMemoryError:
                self.whole_fits = False
        half = len(x) // 2
        each = [cut((x, args, kwargs), rows, len(x)) for rows in (slice(None, half), slice(half, None))]
        return torch.cat([self.inner(part, *more, **named) for part, more, named in each])


class GuidanceHalves(Wrapping):
    """Switch of a UNet that predicts first without the prompt and then with it, instead of both in one batch."""

    around = Halves

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)


def cut(value: Any, rows: slice, batch: int) -> Any:
    """Take ``rows`` of every tensor in ``value`` with a row for each of ``batch`` pictures; keep everything else."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 0 and len(value) == batch else value
    if isinstance(value, dict):
        return {key: cut(item, rows, batch) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(cut(item, rows, batch) for item in value)
    return value
