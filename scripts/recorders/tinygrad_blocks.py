"""Writer for tinygrad: a ResBlock and a transformer block of Stable Diffusion, which show what they compute.

    with Writer("mine.safetensors", "tinygrad", dtype="float32") as writer:
        show = shower(writer, "step.0/unet/down.0.res.0.")
        resblock(weights("down_blocks.0.resnets.0."), x, time, show, groups=32)

tinygrad computes when a value is asked for, so a layer that is shown is computed there, from the layers before it.
Needs tinygrad and ``minidiff/parity/writer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tinygrad import Tensor

from minidiff.parity.writer import Writer

Show = Callable[[str, Tensor], Tensor]
Weights = Mapping[str, Tensor]  # by their names in diffusers, below the block


def shower(writer: Writer, section: str) -> Show:
    """Return a function that adds a layer's value, and goes on with it. "" is the block itself."""

    def show(layer: str, value: Tensor) -> Tensor:
        value = value.realize()
        writer.add((section + layer).rstrip("."), value.numpy())
        return value

    return show


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """Return x W^T + b; some have no b."""
    return x.linear(w[f"{name}.weight"].T, w.get(f"{name}.bias"))


def group_norm(w: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    """Return the group norm of ResBlocks, whose eps is 1e-5."""
    y = x.reshape(x.shape[0], groups, -1).layernorm(eps=1e-5).reshape(x.shape)
    return y * w[f"{name}.weight"].reshape(1, -1, 1, 1) + w[f"{name}.bias"].reshape(1, -1, 1, 1)


def resblock(w: Weights, x: Tensor, time: Tensor, show: Show, groups: int) -> Tensor:
    """Compute a ResBlock without change of width. x: (B, C, H, W), time: (B, T)."""

    def convolution(name: str, x: Tensor) -> Tensor:
        return x.conv2d(w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    y = show("norm1", group_norm(w, "norm1", x, groups))
    y = show("conv1", convolution("conv1", y.silu()))
    y = y + show("time", linear(w, "time_emb_proj", time.silu())).reshape(x.shape[0], -1, 1, 1)
    y = show("norm2", group_norm(w, "norm2", y, groups))
    return show("", x + show("conv2", convolution("conv2", y.silu())))


def transformer_block(w: Weights, x: Tensor, context: Tensor, show: Show, heads: int) -> Tensor:
    """Compute a transformer block. x: (B, L, C), context: (B, 77, D)."""

    def norm(name: str) -> Tensor:
        return show(name, x.layernorm(eps=1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"])

    def attention(name: str, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            show(f"{name}.{part}", linear(w, f"{name}.to_{part}", given))
            .reshape(given.shape[0], given.shape[1], heads, -1)
            .transpose(1, 2)
            for part, given in (("q", x), ("k", seen), ("v", seen))
        )
        scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
        y = (scores.softmax() @ v).transpose(1, 2).reshape(x.shape)
        return show(name, show(f"{name}.out", linear(w, f"{name}.to_out.0", y)))

    y = norm("norm1")
    x = x + attention("attn1", y, y)
    x = x + attention("attn2", norm("norm2"), context)
    y, gate = show("ff.gate", linear(w, "ff.net.0.proj", norm("norm3"))).chunk(2, dim=-1)
    y = y * (gate * 0.5 * (1 + (gate * 0.5**0.5).erf()))  # Tensor.gelu is the approximation by tanh
    return show("", x + show("ff", show("ff.out", linear(w, "ff.net.2", y))))
