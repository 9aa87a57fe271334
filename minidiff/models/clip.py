"""CLIP's text encoder: token ids to the vectors that the UNet attends to (Radford et al. 2021, section 2.4).

It is a transformer with a causal mask: the vector at position k depends on the words up to k, and the one at the end
token on the whole text. Families use different layers: SD1 the last (after the final norm), SD2 the last but one (its
checkpoints leave the last layer out), SDXL the last but one of two concatenated encoders, without a norm.
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
    """CLIP text encoder: ViT-L, OpenCLIP-H or OpenCLIP-bigG, depending on the config."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = token_table(config)
        self.position = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else nn.Identity()

    def forward(self, ids: Tensor, skip: int = 0, seen: Tensor | None = None) -> TextOutput:
        """Encode int64 ``ids`` (B, L), with L at most ``config.positions``, to the three outputs used by the families.

        ``skip``: take ``last`` and ``penultimate`` that many layers earlier ("clip skip"); ``pooled`` is unchanged.
        ``seen``: bool (B, L), False for tokens that no token may attend to; without it every token sees all up to it.
        """
        length = ids.shape[1]
        x = self.token(ids) + self.position.weight[:length]
        mask = None if seen is None else seen[:, None, None] & seen.new_ones(length, length).tril()
        states = [x]
        for layer in self.layers:
            x = layer(x, mask)
            states.append(x)
        final = self.norm(x)
        # The first end token: if a prompt is padded with end tokens, the later ones are padding.
        token = self.config.end_token
        end = (ids.int() if token is None else (ids == token).int()).argmax(dim=-1)
        pooled = final[torch.arange(ids.shape[0], device=ids.device), end]
        last = self.norm(states[-1 - skip]) if skip else final
        return TextOutput(last, states[-2 - skip], self.projection(pooled))


class SharedEmbedding(nn.Embedding):
    """Embedding table for the ids in ``kept``, (1 + kept, width). Row 0 is shared by all other ids, initially zeros.

    A small model trained on sixty words needs only sixty vectors, and still accepts the ids of the public table.
    """

    row_of: Tensor

    def __init__(self, vocab: int, kept: Sequence[int], width: int) -> None:
        self.vocab, self.kept = vocab, tuple(kept)
        super().__init__(1 + len(kept), width)
        # Not a weight, since it follows from the config; on the CPU even while a model is built without memory.
        self.register_buffer("row_of", rows(vocab, kept), persistent=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the weights from ``generator``, or from torch's global one."""
        nn.init.normal_(self.weight, generator=generator)
        with torch.no_grad():
            self.weight[0] = 0
        if "row_of" in self._buffers:  # memory allocated without contents
            self.row_of.copy_(rows(self.vocab, self.kept))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.row_of[ids])


def rows(vocab: int, kept: Sequence[int]) -> Tensor:
    """Return the row of a :class:`SharedEmbedding` for each id, int64 (vocab,)."""
    row_of = torch.zeros(vocab, dtype=torch.int64, device="cpu")
    row_of[torch.tensor(kept, dtype=torch.int64, device="cpu")] = torch.arange(1, 1 + len(kept), device="cpu")
    return row_of


def token_table(config: CLIPTextConfig) -> nn.Embedding:
    """Return the token embedding of size ``config.width``, with a row for every id or for those the config keeps."""
    if config.kept is None:
        return nn.Embedding(config.vocab, config.width)
    return SharedEmbedding(config.vocab, config.kept, config.width)


class Layer(nn.Module):
    """Causal self-attention, then a two-layer network; each on a normalized copy, added to the input."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.gelu = quick_gelu if config.activation == "quick_gelu" else F.gelu
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config.width, config.heads, bias=True, causal=True)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        out: Tensor = x + self.fc2(self.gelu(self.fc1(self.norm2(x))))
        return out


def quick_gelu(x: Tensor) -> Tensor:
    """Compute OpenAI's approximation of GELU, x * sigmoid(1.702 x), with which ViT-L was trained."""
    return x * torch.sigmoid(1.702 * x)
