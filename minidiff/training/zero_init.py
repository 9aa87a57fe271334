"""Initialization for training: a network that does as little as possible.

The last layer of every residual branch is set to 0, so that each block begins as the identity and a deep network begins
as a shallow one (as in Ho et al. 2020, and Goyal et al. 2017 for ResNets). Otherwise the random branches of a new
network drown the signal, and the first thousand steps are spent on suppressing them.
"""

from __future__ import annotations

import torch
from torch import nn

from minidiff.models.attention import SpatialSelfAttention, SpatialTransformer, TransformerBlock
from minidiff.models.blocks import ResBlock
from minidiff.models.clip import Layer


@torch.no_grad()
def zero_residual_branches(part: nn.Module) -> None:
    """Set the last layer of each residual branch of a UNet, VAE or text encoder to zero, in place."""
    for module in part.modules():
        for last in last_layers(module):
            for p in last.parameters():
                p.zero_()


def last_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of ``module`` at the end of a residual branch."""
    if isinstance(module, ResBlock):
        return [module.conv2]
    if isinstance(module, SpatialTransformer):
        return [module.proj_out]
    if isinstance(module, TransformerBlock):
        return [module.attn1.out, module.attn2.out, module.ff.out]
    if isinstance(module, SpatialSelfAttention):
        return [module.attn.out]
    return [module.attn.out, module.fc2] if isinstance(module, Layer) else []
