"""CLIP's text encoder: token ids to the vectors that the UNet attends to (Radford et al. 2021, section 2.4).

A transformer with a causal mask, so the vector at position k knows the words up to k, and the one at the end token
knows the sentence. Which layer a UNet reads differs: SD1 the last (after the final norm), SD2 the last but one (its
checkpoints simply leave the last layer out), SDXL the last but one of two encoders side by side, without a norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.config import CLIPTextConfig
from minidiff.models.attention import Attention


class TextOutput(NamedTuple):
    """``last`` (after the final norm) and ``penultimate`` (before it): (B, L, width); ``pooled``: (B, D')."""

    last: Tensor
    penultimate: Tensor
    pooled: Tensor


class CLIPText(nn.Module):
    """ViT-L, OpenCLIP-H and OpenCLIP-bigG, told apart by their configs."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else nn.Identity()

    def forward(self, ids: Tensor) -> TextOutput:
        """int64 ``ids`` (B, L), L at most ``config.positions`` -> the three outputs that families read."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        penultimate = x
        for layer in self.layers:
            penultimate = x
            x = layer(x)
        last = self.norm(x)
        # The first end token: where a prompt is filled up with end tokens, the later ones are mere padding.
        end = (ids == self.config.end_token).int().argmax(dim=-1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        return TextOutput(last, penultimate, self.projection(pooled))


class Layer(nn.Module):
    """Causal self-attention, then a two-layer network; each on a normed copy and added back."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.gelu = quick_gelu if config.activation == "quick_gelu" else F.gelu
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config.width, config.heads, bias=True, causal=True)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(self.gelu(self.fc1(self.norm2(x))))
        return out


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, x * sigmoid(1.702 x): ViT-L was trained with it and needs it."""
    return x * torch.sigmoid(1.702 * x)
