"""Writer for MLX: a ResBlock and a transformer block of Stable Diffusion, which show what they compute.

    with Writer("mine.safetensors", "mlx", layout="NHWC", dtype="float32") as writer:
        show = shower(writer, "step.0/unet/down.0.res.0.")
        resblock(weights("down_blocks.0.resnets.0."), x, time, show, groups=32)

Pictures are (B, H, W, C), and the recording says so. MLX computes when a value is asked for, so a layer that is shown
is computed there. Needs mlx and ``minidiff/parity/writer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from minidiff.parity.writer import Writer

Show = Callable[[str, mx.array], mx.array]
Weights = Mapping[str, mx.array]  # by their names in diffusers, below the block


def shower(writer: Writer, section: str) -> Show:
    """Return a function that adds a layer's value, and goes on with it. "" is the block itself."""

    def show(layer: str, value: mx.array) -> mx.array:
        writer.add((section + layer).rstrip("."), np.array(value))
        return value

    return show


def linear(w: Weights, name: str, x: mx.array) -> mx.array:
    """Return x W^T + b; some have no b."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def group_norm(w: Weights, name: str, x: mx.array, groups: int) -> mx.array:
    """Return the group norm of ResBlocks, whose eps is 1e-5, over the positions and the channels of each group."""
    y = x.reshape(x.shape[0], -1, groups, x.shape[3] // groups)
    y = (y - y.mean((1, 3), keepdims=True)) * mx.rsqrt(y.var((1, 3), keepdims=True) + 1e-5)
    return y.reshape(x.shape) * w[f"{name}.weight"] + w[f"{name}.bias"]


def resblock(w: Weights, x: mx.array, time: mx.array, show: Show, groups: int) -> mx.array:
    """Compute a ResBlock without change of width. x: (B, H, W, C), time: (B, T)."""

    def convolution(name: str, x: mx.array) -> mx.array:
        return mx.conv2d(x, w[f"{name}.weight"].transpose(0, 2, 3, 1), padding=1) + w[f"{name}.bias"]

    y = show("norm1", group_norm(w, "norm1", x, groups))
    y = show("conv1", convolution("conv1", nn.silu(y)))
    y = y + show("time", linear(w, "time_emb_proj", nn.silu(time)))[:, None, None]
    y = show("norm2", group_norm(w, "norm2", y, groups))
    return show("", x + show("conv2", convolution("conv2", nn.silu(y))))


def transformer_block(w: Weights, x: mx.array, context: mx.array, show: Show, heads: int) -> mx.array:
    """Compute a transformer block. x: (B, L, C), context: (B, 77, D)."""

    def norm(name: str) -> mx.array:
        return show(name, mx.fast.layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5))

    def attention(name: str, x: mx.array, seen: mx.array) -> mx.array:
        q, k, v = (
            show(f"{name}.{part}", linear(w, f"{name}.to_{part}", given))
            .reshape(*given.shape[:2], heads, -1)
            .transpose(0, 2, 1, 3)
            for part, given in (("q", x), ("k", seen), ("v", seen))
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[3] ** -0.5)
        y = y.transpose(0, 2, 1, 3).reshape(x.shape)
        return show(name, show(f"{name}.out", linear(w, f"{name}.to_out.0", y)))

    y = norm("norm1")
    x = x + attention("attn1", y, y)
    x = x + attention("attn2", norm("norm2"), context)
    y, gate = mx.split(show("ff.gate", linear(w, "ff.net.0.proj", norm("norm3"))), 2, axis=-1)
    y = linear(w, "ff.net.2", y * nn.gelu(gate))
    return show("", x + show("ff", show("ff.out", y)))
