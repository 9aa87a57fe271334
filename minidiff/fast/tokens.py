"""Transformers that work on pictures in channels-last layout, without copies.

A picture is stored channel by channel, but a transformer reads it pixel by pixel, so the plain one copies it at its
input and output. Here the picture is converted once to the channels-last layout, which is also that of a transformer's
tokens. Norms and convolutions preserve that layout, and the library behind the convolutions prefers it: it need not
rearrange a picture before and after each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidiff.config import text
from minidiff.fast import onednn
from minidiff.fast.inplace import res_block
from minidiff.fast.packed import PackedConvolution
from minidiff.fast.switch import OFF, ON, ForwardSwitch
from minidiff.models.attention import SpatialTransformer, to_tokens
from minidiff.models.blocks import ResBlock


def in_place(self: SpatialTransformer, x: Tensor, context: Tensor) -> Tensor:
    """Compute :meth:`SpatialTransformer.forward`, with the output in channels-last layout."""
    x = x.contiguous(memory_format=torch.channels_last)
    h = self.norm(x)
    h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
    for block in self.blocks:
        h = block(h, context)
    h = as_picture(self.proj_out(h), x) if self.linear else self.proj_out(as_picture(h, x))
    return h + x


def as_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """View (B, H*W, C) as (B, C, H, W), without the copy of ``to_picture``."""
    return tokens.transpose(1, 2).reshape(like.shape)


class Tokens(ForwardSwitch):
    """Switch of every transformer over pictures. CPU only; float32 and bfloat16."""

    device = "cpu"
    tried = "tokens"
    forward = staticmethod(in_place)

    def applies(self, layer: nn.Module) -> bool:
        if not isinstance(layer, SpatialTransformer):
            return False
        weight = layer.norm.weight
        return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def ways(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Set up a trial: the beginning of a decoder's level at 64 x 64, where layouts cost most: a transformer without
    blocks, and a ResBlock that reads its picture beside another."""
    with torch.device("cpu"):
        layer = SpatialTransformer(text(320, 8), 768, 32, linear=False)
        layer.blocks = nn.ModuleList()
        layer, after = layer.to(dtype), ResBlock(640, 320, 32, 1e-5).to(dtype)
        x, context = torch.ones(1, 320, 64, 64, dtype=dtype), torch.ones(1, 77, 768, dtype=dtype)
    PackedConvolution(after.conv1)
    PackedConvolution(after.conv2)

    def beside(picture: Tensor) -> Tensor:
        return res_block(after, torch.cat([picture, picture], dim=1))

    found: dict[str, Callable[[], object]] = {OFF: lambda: beside(layer(x, context))}
    if onednn.pays(dtype):
        found[ON] = lambda: beside(in_place(layer, x, context))
    return found
