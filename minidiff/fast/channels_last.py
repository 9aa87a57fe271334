"""Convolution weights with their channels innermost in memory, as the tensor cores of a CUDA card read them.

In that layout (NHWC) cuDNN needs no transposing before and after a convolution in half precision. A convolution whose
weight lies so answers in the same layout, and what follows passes it on; where a norm or an attention lays out its own
answer anew, the next convolution brings the channels in again. The numbers are the same ones, and cuDNN may sum them in
another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import Wrapping
from minidiff.models.around import PREPARING, Around


class Innermost(Around):
    """The ``forward`` of one convolution. At the call, not before: a part that takes turns has no weight to lay out."""

    def __call__(self, x: Tensor) -> Any:
        if not self.laid_out():
            with PREPARING:
                if not self.laid_out():
                    weight = self.layer.get_parameter("weight")
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return self.inner(x)

    def laid_out(self) -> bool:
        return self.layer.get_parameter("weight").is_contiguous(memory_format=torch.channels_last)


class ChannelsLast(Wrapping):
    """Every convolution gets its weight laid out so, at its first call. CUDA only."""

    around = Innermost
    device = "cuda"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)  # of these both layouts are one

    def take_off(self, layer: nn.Module) -> None:
        super().take_off(layer)
        weight = layer.get_parameter("weight")
        if weight.is_contiguous(memory_format=torch.channels_last):  # it has worked
            weight.data = weight.data.contiguous()
