"""The UNet on the two halves of a batch, one after the other, which trades time for memory.

With guidance the UNet makes two predictions per picture, without the prompt and with it, in one batch. Activations grow
with the batch, and its rows are independent, so it can be split; the bits are then those of the smaller batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import MethodSwitch
from minidiff.models.control import ControlNet
from minidiff.models.replacement import Replacement
from minidiff.models.unet import UNet


class SplitUNet(Replacement):
    """Replacement for the ``forward`` of a UNet or ControlNet: an even batch in two halves. On a card, only after it
    did not fit."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.whole_fits = True
        super().__init__(layer, name)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) % 2 == 1:
            return self.inner(x, *args, **kwargs)
        if x.is_cuda and self.whole_fits:
            try:
                return self.inner(x, *args, **kwargs)
            except torch.OutOfMemoryError:
                self.whole_fits = False
        half = len(x) // 2
        each = [cut((x, args, kwargs), rows, len(x)) for rows in (slice(None, half), slice(half, None))]
        return joined(*(self.inner(part, *more, **named) for part, more, named in each))


class Halves(MethodSwitch):
    """Switch of a UNet or ControlNet that computes first without the prompt and then with it, instead of both in one
    batch."""

    replacement = SplitUNet

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, (UNet, ControlNet))


def joined(first: Any, second: Any) -> Any:
    """Concatenate the tensors of two results, a tensor each or the residuals of a ControlNet."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return type(first)(joined(a, b) for a, b in zip(first, second, strict=True))


def cut(value: Any, rows: slice | Tensor, batch: int) -> Any:
    """Take ``rows`` of every tensor in ``value`` with a row for each of ``batch`` pictures; keep everything else."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 0 and len(value) == batch else value
    if isinstance(value, dict):
        return {key: cut(item, rows, batch) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(cut(item, rows, batch) for item in value)
    return value
