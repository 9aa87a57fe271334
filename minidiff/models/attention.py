"""Attention in Stable Diffusion, in three forms (Vaswani et al. 2017; Rombach et al. 2022, section 3.3).

* :class:`Attention`: queries from ``x``, keys and values from ``x`` itself or from the prompt. It is the only way by
  which text influences the picture.
* :class:`SpatialTransformer`: pixels as a sequence of tokens, through self-attention, cross-attention and feed-forward.
* :class:`SpatialSelfAttention`: the older, single-layer form of DDPM and of the VAE's middle block.

All of them compute :func:`attention`. Each module holds it as its ``kernel``, so that a faster equivalent can be set
from outside without changing this file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.config import Level

Kernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

# The norm in front of a transformer has its own eps, whatever the ResBlocks around it use.
TRANSFORMER_NORM_EPS = 1e-6


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v. All (B, heads, length, d); ``causal`` masks every later position."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Linear(nn.Linear):
    """Linear layer that multiplies all rows of (B, L, C) in one product, whatever their layout in memory.

    torch does so only if the weight requires a gradient, as in the reference. Otherwise it multiplies rows that are not
    contiguous (a picture seen as tokens) in one product per entry of the batch, which rounds differently. The
    reference's weights require no gradient while adapters are applied: ``frozen`` has an entry for each adapter.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.frozen: OrderedDict[int, None] = OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the layer's output with ``weight`` in place of its own."""
        if x.ndim != 3 or x.is_contiguous() or self.frozen:
            return F.linear(x, weight, self.bias)
        out = (x.reshape(-1, x.shape[-1]) @ weight.t()).view(*x.shape[:2], -1)
        return out if self.bias is None else out + self.bias


def freeze(part: nn.Module, handles: list[RemovableHandle]) -> None:
    """Let the linear layers of ``part`` compute as with frozen weights, until the handles that it adds are removed."""
    for layer in part.modules():
        if isinstance(layer, Linear):
            handle = RemovableHandle(layer.frozen)
            handles.append(handle)  # before the entry is there: an interruption undoes it
            layer.frozen[handle.id] = None


class Attention(nn.Module):
    """Multi-head attention of ``x`` (B, L, dim) over ``context`` (B, M, context_dim), or over itself without one."""

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, *, bias: bool = False, causal: bool = False
    ) -> None:
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        self.heads = heads
        self.causal = causal
        self.kernel: Kernel = attention
        self.q = Linear(dim, dim, bias=bias)
        self.k = Linear(context_dim, dim, bias=bias)
        self.v = Linear(context_dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``mask``: bool, (B, 1, L, M), True where attention is allowed; it takes the place of ``causal``."""
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "b l (h d) -> b h l d", h=self.heads) for t in (self.q(x), self.k(context), self.v(context))
        )
        mixed = self.kernel(q, k, v, self.causal) if mask is None else F.scaled_dot_product_attention(q, k, v, mask)
        joined: Tensor = self.out(rearrange(mixed, "b h l d -> b l (h d)"))
        return joined


class FeedForward(nn.Module):
    """Gated two-layer network, GEGLU (Shazeer 2020): value * gelu(gate), four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 8 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.gate(x).chunk(2, dim=-1)
        out: Tensor = self.out(value * F.gelu(gate))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each on a normalized copy, added to the input."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of (B, C, H, W): each pixel is a token; the output is added to the input.

    SD1 projects in and out with 1x1 convolutions, SD2 and SDXL with linear layers (``linear``). Both are the same
    matrix, but stored in another shape and summed in another order.
    """

    def __init__(self, level: Level, context_dim: int, groups: int, linear: bool) -> None:
        super().__init__()
        c = level.channels
        self.linear = linear
        self.norm = nn.GroupNorm(groups, c, eps=TRANSFORMER_NORM_EPS)
        self.proj_in: nn.Module = Linear(c, c) if linear else nn.Conv2d(c, c, 1)
        self.blocks = nn.ModuleList(TransformerBlock(c, level.heads, context_dim) for _ in range(level.depth))
        self.proj_out: nn.Module = nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[-2]
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        for block in self.blocks:
            h = block(h, context)
        h = to_picture(self.proj_out(h), height) if self.linear else self.proj_out(to_picture(h, height))
        return h + x


def to_tokens(x: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B, H*W, C)."""
    return rearrange(x, "b c h w -> b (h w) c")


def to_picture(tokens: Tensor, height: int) -> Tensor:
    """Reshape (B, H*W, C) to contiguous (B, C, H, W); the strides decide which kernel the next convolution uses."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height).contiguous()


class SpatialSelfAttention(nn.Module):
    """Attention of every pixel of (B, C, H, W) to all others, added to the input."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.attn = Attention(channels, heads, bias=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Compute the attention. ``context`` is ignored; it is accepted so that a UNet level can hold either kind."""
        h = self.attn(self.norm(x.flatten(2)).transpose(1, 2))
        # A transposed view instead of einops: at batch 1 their strides differ, and with them the kernel of the next
        # convolution and the bits of its result.
        out: Tensor = h.transpose(1, 2).unflatten(2, x.shape[-2:]) + x
        return out
