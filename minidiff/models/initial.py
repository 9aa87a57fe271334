"""Initial weights of a model before training, drawn from a generator."""

from __future__ import annotations

import math

import torch
from torch import nn

from minidiff.models.clip import SharedEmbedding


def first_weights(layer: nn.Module, generator: torch.Generator) -> None:
    """Initialize ``layer`` as ``layer.reset_parameters()`` does, but from ``generator`` instead of the global one."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):  # uniform, with variance 1 / (3 * inputs) (He et al. 2015)
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        if layer.bias is not None:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    elif isinstance(layer, SharedEmbedding):
        layer.reset_parameters(generator)
    elif isinstance(layer, nn.Embedding):
        nn.init.normal_(layer.weight, generator=generator)
    elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    else:
        assert not list(layer.parameters(recurse=False)), f"{type(layer).__name__} has weights of its own"
