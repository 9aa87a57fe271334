"""Transformers that work on pictures in channels-last layout, without copies.

A picture is stored channel by channel, but a transformer reads it pixel by pixel, so the plain one copies it at its
input and output. Here the picture is converted once to the channels-last layout, which is also that of a transformer's
tokens. Norms and convolutions preserve that layout, and the library behind the convolutions prefers it: it need not
rearrange a picture before and after each.

The gain is that of a whole network, whose layouts no longer mix: up to 6 % of a UNet call on three kinds of processor
with AVX512. A short trial of one layer does not show it, so :func:`minidiff.fast.trial.rule` decides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.fast.switch import ForwardSwitch
from minidiff.models.attention import SpatialTransformer, to_tokens


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
    tried = "tokens"  # by the rule alone
    forward = staticmethod(in_place)

    def applies(self, layer: nn.Module) -> bool:
        if not isinstance(layer, SpatialTransformer):
            return False
        weight = layer.norm.weight
        return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
