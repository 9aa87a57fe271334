"""Convolution weights with their channels innermost in memory, as the tensor cores of a CUDA card read them.

In that layout (NHWC) cuDNN needs no transposition before and after a convolution in half precision. A convolution with
such a weight returns its output in the same layout, and most operations keep it; if a norm or an attention does not,
the next convolution restores it. The values are the same, but cuDNN may sum in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import MethodSwitch
from minidiff.models.replacement import PREPARING, Replacement


class ChannelsLastConvolution(Replacement):
    """Replacement for the ``forward`` of one convolution. The layout changes at the first call, not before, since in
    low-memory mode the weight is not there earlier."""

    def __call__(self, x: Tensor) -> Any:
        if not self.laid_out():
            with PREPARING:
                if not self.laid_out():
                    weight = self.layer.get_parameter("weight")
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return self.inner(x)

    def laid_out(self) -> bool:
        return self.layer.get_parameter("weight").is_contiguous(memory_format=torch.channels_last)


class ChannelsLast(MethodSwitch):
    """Switch that changes the layout of every convolution's weight at its first call. CUDA only."""

    replacement = ChannelsLastConvolution
    device = "cuda"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)  # for these, both layouts are the same

    def take_off(self, layer: nn.Module) -> None:
        super().take_off(layer)
        weight = layer.get_parameter("weight")
        if weight.is_contiguous(memory_format=torch.channels_last):  # it has worked
            weight.data = weight.data.contiguous()
