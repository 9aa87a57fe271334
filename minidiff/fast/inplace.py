"""The blocks of the UNet and the VAE once more, writing over what nobody reads again.

Plain blocks make a new tensor with every operation, as training needs. A tensor of some megabytes comes from the
operating system as untouched pages, and touching them for the first time costs about as much as the operation. These
forwards compute the same bits, term for term, in the memory that the step before has just left in the cache.
Gradients can't flow through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast.switch import Switch
from minidiff.models.attention import TransformerBlock
from minidiff.models.blocks import ResBlock


class InPlaceBlocks(Switch):
    """ResBlocks and transformer blocks that reuse memory. The same bits."""

    def applies(self, layer: nn.Module) -> bool:
        return type(layer) in FORWARDS

    def put_on(self, layer: nn.Module) -> None:
        forward = FORWARDS[type(layer)]
        layer.forward = forward.__get__(layer)

    def take_off(self, layer: nn.Module) -> None:
        del layer.__dict__["forward"]


def res_block(self: ResBlock, x: Tensor, temb: Tensor | None = None) -> Tensor:
    """:meth:`ResBlock.forward`."""
    h = self.conv1(F.silu(self.norm1(x), inplace=True))
    if self.time is not None and temb is not None:
        h = h.add_(self.time(F.silu(temb))[:, :, None, None])
    h = self.conv2(F.silu(self.norm2(h), inplace=True))
    carried: Tensor = self.skip(x)
    # A sum lies in memory as its first operand does, and by that the next convolution picks its kernel, and its bits.
    out: Tensor = h.add_(carried) if h.stride() == carried.stride() else carried + h
    return out


def transformer_block(self: TransformerBlock, x: Tensor, context: Tensor) -> Tensor:
    """:meth:`TransformerBlock.forward`."""
    x = self.attn1(self.norm1(x)).add_(x)
    x = self.attn2(self.norm2(x), context).add_(x)
    out: Tensor = self.ff(self.norm3(x)).add_(x)
    return out


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    ResBlock: res_block,
    TransformerBlock: transformer_block,
}
