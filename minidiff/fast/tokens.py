"""Transformers that work on pictures in channels-last layout, without copies.

A picture lies in memory channel by channel, and a transformer reads it pixel by pixel: the plain one copies it on the
way in and on the way out. Here the picture is laid out pixel by pixel once, with its channels innermost, which a
transformer's tokens are just another name for. Norms and convolutions pass that layout on, and the library behind the
convolutions prefers it: it need not rearrange a picture before and after each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.switch import Instead
from minidiff.models.attention import SpatialTransformer, to_tokens


def in_place(self: SpatialTransformer, x: Tensor, context: Tensor) -> Tensor:
    """:meth:`SpatialTransformer.forward`; what it gives back has its channels innermost."""
    x = x.contiguous(memory_format=torch.channels_last)
    h = self.norm(x)
    h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
    for block in self.blocks:
        h = block(h, context)
    h = as_picture(self.proj_out(h), x) if self.linear else self.proj_out(as_picture(h, x))
    return h + x


def as_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), the same memory, where ``to_picture`` copies."""
    return tokens.transpose(1, 2).reshape(like.shape)


class TokensInPlace(Instead):
    """Every transformer in a picture, where the processor gains by it. CPU only."""

    device = "cpu"
    forward = staticmethod(in_place)

    def applies(self, layer: nn.Module) -> bool:
        if not isinstance(layer, SpatialTransformer):
            return False
        weight = layer.norm.weight
        return weight.device.type == "cpu" and onednn.pays(weight.dtype)
