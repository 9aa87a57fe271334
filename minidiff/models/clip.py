"""CLIP's text encoder: token ids to the vectors that the UNet attends to (Radford et al. 2021, section 2.4).

A transformer with a causal mask, so the vector at position k knows the words up to k, and the one at the end token
knows the sentence. Which layer a UNet reads differs: SD1 the last (after the final norm), SD2 the last but one (its
checkpoints simply leave the last layer out), SDXL the last but one of two encoders side by side, without a norm.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.token = token_table(config)
        self.position = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else nn.Identity()

    def forward(self, ids: Tensor, skip: int = 0) -> TextOutput:
        """int64 ``ids`` (B, L), L at most ``config.positions`` -> the three outputs that families read.

        ``skip``: read ``last`` and ``penultimate`` that many layers earlier ("clip skip"); ``pooled`` stays.
        """
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        states = [x]
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        final = self.norm(x)
        # The first end token: where a prompt is filled up with end tokens, the later ones are mere padding.
        token = self.config.end_token
        end = (ids.int() if token is None else (ids == token).int()).argmax(dim=-1)
        pooled = final[torch.arange(len(ids), device=ids.device), end]
        last = self.norm(states[-1 - skip]) if skip else final
        return TextOutput(last, states[-2 - skip], self.projection(pooled))


class SharedEmbedding(nn.Embedding):
    """A table of the ids in ``kept`` alone, (1 + kept, width): row 0 serves every other id, and begins as zeros.

    A small model that was trained on sixty words carries sixty vectors, and still reads the ids of the public table.
    """

    row_of: Tensor

    def __init__(self, vocab: int, kept: Sequence[int], width: int) -> None:
        self.vocab, self.kept = vocab, tuple(kept)
        super().__init__(1 + len(kept), width)
        # Follows from the config and is no weight; on the CPU even while a model is built without memory.
        self.register_buffer("row_of", rows(vocab, kept), persistent=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights as they are before any training; drawn from ``generator``, or torch's own."""
        nn.init.normal_(self.weight, generator=generator)
        with torch.no_grad():
            self.weight[0] = 0
        if "row_of" in self._buffers:  # memory that was made without contents
            self.row_of.copy_(rows(self.vocab, self.kept))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.row_of[ids])


def rows(vocab: int, kept: Sequence[int]) -> Tensor:
    """int64 (vocab,): which row of a :class:`SharedEmbedding` each id reads."""
    row_of = torch.zeros(vocab, dtype=torch.int64, device="cpu")
    row_of[torch.tensor(kept, dtype=torch.int64, device="cpu")] = torch.arange(1, 1 + len(kept), device="cpu")
    return row_of


def token_table(config: CLIPTextConfig) -> nn.Embedding:
    """id -> vector of ``config.width``: a row for every id, or for those that the config keeps."""
    if config.kept is None:
        return nn.Embedding(config.vocab, config.width)
    return SharedEmbedding(config.vocab, config.kept, config.width)


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
