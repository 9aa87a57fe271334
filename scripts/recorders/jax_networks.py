"""The networks of Stable Diffusion 1 in JAX: CLIP's text encoder, the UNet, and the VAE's decoder.

Each is a function of a :class:`Part` (weights by diffusers' names, config.json) and of arrays: pictures (B, H, W, C),
tokens (B, L, C). Each layer shows what it computes, and goes on with what it is handed for that. ``jax_sd1.py`` runs
them.

Ports go wrong in the same few places, where a mistake raises no error. Those are :class:`Choices` here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Choices:
    """The choices in which ports go wrong. The defaults are right for Stable Diffusion 1."""

    pad_with_end: bool = True  # fill a prompt up with the end token; Stable Diffusion 2 has token 0
    quick_gelu: bool = True  # in CLIP ViT-L; the text encoders of OpenCLIP have the exact gelu
    causal_text: bool = True  # a token of the prompt sees those before it
    text_layer: int = -1  # which layer is normed and taken; Stable Diffusion 2 takes the last but one
    negative_first: bool = True  # in the batch of guidance, whose first half counts as unconditional
    cosine_first: bool = True  # in the embedding of the timestep; ddpm models have the sine first
    frequency_shift: int = 0  # frequencies fall to 10000 ** (1 / half - 1); with a shift of 1, as in ddpm, to 1 / 10000
    transformer_eps: float = 1e-6  # of the group norm before a transformer; ResBlocks have 1e-5
    counts_heads: bool = True  # "attention_head_dim" in the UNet's config is a number of heads
    scaled_scores: bool = True  # by the root of a head's width
    gelu_by_tanh: bool = False  # which jax.nn.gelu does unless told otherwise
    scaled_linear: bool = True  # the roots of the betas are evenly spaced; CompVis calls this "linear"
    steps_offset: int = 1  # timesteps end at 1, not at 0
    unscaled_latents: bool = True  # divided by the scaling factor before they are decoded


RIGHT = Choices()


@dataclass(frozen=True)
class Part:
    """One of the networks. ``show`` takes a layer's name and its value, and returns the value to go on with."""

    weights: Mapping[str, Array]
    config: Mapping[str, Any]
    choices: Choices
    show: Callable[[str, Array], Array]

    def layer(self, name: str, compute: Callable[..., Array], x: Array) -> Array:
        """Return ``compute`` of x with the layer's weight and bias (None if it has none), and show both ends."""
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return self.show(name, compute(self.show(f"{name}:in", x), weight, bias))

    def each(self, modules: str) -> Iterator[str]:
        """Return the names of the modules in a list, as many as there are weights for."""
        names = (f"{modules}.{i}" for i in itertools.count())
        return itertools.takewhile(lambda name: any(key.startswith(name + ".") for key in self.weights), names)


# Layers


def linear(m: Part, name: str, x: Array) -> Array:
    """Return x W^T + b; some have no b."""
    return m.layer(name, product, x)


def convolution(m: Part, name: str, x: Array, stride: int = 1) -> Array:
    """Return a convolution of 3x3 or 1x1 that keeps the picture's size, or halves it."""
    return m.layer(name, functools.partial(convolved, stride=stride), x)


def layer_norm(m: Part, name: str, x: Array) -> Array:
    """Return x normed over its channels."""
    return m.layer(name, functools.partial(normed, groups=None, eps=1e-5), x)


def group_norm(m: Part, name: str, x: Array, eps: float) -> Array:
    """Return x (B, H, W, C) normed over the positions and the channels of each group."""
    return m.layer(name, functools.partial(normed, groups=m.config["norm_num_groups"], eps=eps), x)


@jax.jit
def product(x: Array, weight: Array, bias: Array | None) -> Array:
    """Return the arithmetic of a linear layer."""
    y = x @ weight.T
    return y if bias is None else y + bias


@functools.partial(jax.jit, static_argnames="stride")
def convolved(x: Array, weight: Array, bias: Array, stride: int) -> Array:
    """Return the arithmetic of a convolution."""
    around, kinds = [(weight.shape[2] // 2,) * 2] * 2, ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x, weight, (stride, stride), around, dimension_numbers=kinds) + bias


@functools.partial(jax.jit, static_argnames=("groups", "eps"))
def normed(x: Array, weight: Array, bias: Array, groups: int | None, eps: float) -> Array:
    """Return the arithmetic of a norm: mean 0 and variance 1 over the channels of a token, or over groups of them."""
    parts = x if groups is None else x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    over = -1 if groups is None else (1, 3)
    parts = (parts - parts.mean(over, keepdims=True)) / jnp.sqrt(parts.var(over, keepdims=True) + eps)
    return parts.reshape(x.shape) * weight + bias


def attention(
    m: Part, at: str, x: Array, seen: Array, heads: int, *, causal: bool = False, scaled: bool = True
) -> Array:
    """Return attention of tokens x (B, L, C) to tokens ``seen`` (B, M, D), with its four projections."""
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    if f"{at}.to_q.weight" in m.weights:
        names = ["to_q", "to_k", "to_v", "to_out.0"]
    q, k, v = (
        linear(m, f"{at}.{name}", tokens).reshape(*tokens.shape[:2], heads, -1)
        for name, tokens in zip(names, (x, seen, seen), strict=False)
    )
    y = attend(q, k, v, causal=causal, scaled=scaled)
    return linear(m, f"{at}.{names[3]}", y.reshape(*x.shape[:2], -1))


@functools.partial(jax.jit, static_argnames=("causal", "scaled"))
def attend(q: Array, k: Array, v: Array, *, causal: bool, scaled: bool) -> Array:
    """Return what queries (B, L, heads, C) find in values (B, M, heads, C) under their keys."""
    scores = jnp.einsum("blhc,bmhc->bhlm", q, k) * (q.shape[-1] ** -0.5 if scaled else 1.0)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhlm,bmhc->blhc", jax.nn.softmax(scores), v)


# Text encoder


def text_encoder(m: Part, ids: np.ndarray[Any, Any]) -> Array:
    """Return the encoded prompt (B, 77, D) of CLIP's text transformer."""
    x = m.show("embeddings.token_embedding", m.weights["embeddings.token_embedding.weight"][ids])
    x = m.show("encoder.layers.0:in", x + m.weights["embeddings.position_embedding.weight"])
    layers = []
    for at in m.each("encoder.layers"):
        y = layer_norm(m, f"{at}.layer_norm1", x)
        heads, causal = m.config["num_attention_heads"], m.choices.causal_text
        x = x + m.show(f"{at}.self_attn", attention(m, f"{at}.self_attn", y, y, heads, causal=causal))
        y = linear(m, f"{at}.mlp.fc1", layer_norm(m, f"{at}.layer_norm2", x))
        y = y * jax.nn.sigmoid(1.702 * y) if m.choices.quick_gelu else jax.nn.gelu(y, approximate=False)
        x = m.show(at, x + linear(m, f"{at}.mlp.fc2", y))
        layers.append(x)
    return layer_norm(m, "final_layer_norm", layers[m.choices.text_layer])


# UNet


def unet(m: Part, x: Array, t: Array, context: Array) -> Array:
    """Return the noise (B, H, W, 4) in latents x at timestep t, under ``context`` (B, 77, D)."""
    time = m.show("time_embedding:in", sinusoids(m, jnp.broadcast_to(t, len(x))))
    time = linear(m, "time_embedding.linear_2", jax.nn.silu(linear(m, "time_embedding.linear_1", time)))
    time = m.show("time_embedding", time)
    x = convolution(m, "conv_in", x)
    skips = [x]
    for block in m.each("down_blocks"):
        for res in m.each(f"{block}.resnets"):
            x = transformed(m, res, resblock(m, res, x, time), context)
            skips.append(x)
        if f"{block}.downsamplers.0.conv.weight" in m.weights:
            x = m.show(f"{block}.downsamplers.0", convolution(m, f"{block}.downsamplers.0.conv", x, stride=2))
            skips.append(x)
        x = m.show(block, x)
    x = transformed(m, "mid_block.resnets.0", resblock(m, "mid_block.resnets.0", x, time), context)
    x = m.show("mid_block", resblock(m, "mid_block.resnets.1", x, time))
    for block in m.each("up_blocks"):
        for res in m.each(f"{block}.resnets"):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = transformed(m, res, resblock(m, res, x, time), context)
        x = m.show(block, upsampled(m, f"{block}.upsamplers.0", x))
    return convolution(m, "conv_out", jax.nn.silu(group_norm(m, "conv_norm_out", x, 1e-5)))


def sinusoids(m: Part, t: Array) -> Array:
    """Return the embedding (B, C) of timesteps (B,): C / 2 frequencies, which fall from 1."""
    half = m.config["block_out_channels"][0] // 2
    frequencies = jnp.exp(-np.log(10000) * jnp.arange(half) / (half - m.choices.frequency_shift))
    angles = t[:, None] * frequencies
    both = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(both if m.choices.cosine_first else both[::-1], axis=-1)


def resblock(m: Part, at: str, x: Array, time: Array | None = None, eps: float = 1e-5) -> Array:
    """Return a ResBlock's output; those of the VAE have no ``time``, and an eps of 1e-6."""
    y = convolution(m, f"{at}.conv1", jax.nn.silu(group_norm(m, f"{at}.norm1", m.show(f"{at}:in", x), eps)))
    if time is not None:
        y = y + linear(m, f"{at}.time_emb_proj", jax.nn.silu(time))[:, None, None]
    y = convolution(m, f"{at}.conv2", jax.nn.silu(group_norm(m, f"{at}.norm2", y, eps)))
    if f"{at}.conv_shortcut.weight" in m.weights:
        x = convolution(m, f"{at}.conv_shortcut", x)
    return m.show(at, x + y)


def transformed(m: Part, res: str, x: Array, context: Array) -> Array:
    """Return x after the transformer that belongs to a ResBlock, if there is one."""
    at = res.replace("resnets", "attentions")
    if f"{at}.norm.weight" not in m.weights:
        return x
    y = convolution(m, f"{at}.proj_in", group_norm(m, f"{at}.norm", x, m.choices.transformer_eps))
    tokens = y.reshape(len(x), -1, y.shape[-1])
    for block in m.each(f"{at}.transformer_blocks"):
        tokens = transformer_block(m, block, tokens, context)
    return m.show(at, x + convolution(m, f"{at}.proj_out", tokens.reshape(y.shape)))


def transformer_block(m: Part, at: str, x: Array, context: Array) -> Array:
    """Return tokens x (B, L, C) after attention to themselves and to the prompt, and a gated layer."""
    told, scaled = m.config["attention_head_dim"], m.choices.scaled_scores
    heads = told if m.choices.counts_heads else x.shape[-1] // told
    y = layer_norm(m, f"{at}.norm1", m.show(f"{at}:in", x))
    x = x + m.show(f"{at}.attn1", attention(m, f"{at}.attn1", y, y, heads, scaled=scaled))
    y = layer_norm(m, f"{at}.norm2", x)
    x = x + m.show(f"{at}.attn2", attention(m, f"{at}.attn2", y, context, heads, scaled=scaled))
    y, gate = jnp.split(linear(m, f"{at}.ff.net.0.proj", layer_norm(m, f"{at}.norm3", x)), 2, axis=-1)
    y = linear(m, f"{at}.ff.net.2", y * jax.nn.gelu(gate, approximate=m.choices.gelu_by_tanh))
    return m.show(at, x + m.show(f"{at}.ff", y))


def upsampled(m: Part, at: str, x: Array) -> Array:
    """Return x at twice its size, if there are weights for that."""
    if f"{at}.conv.weight" not in m.weights:
        return x
    return m.show(at, convolution(m, f"{at}.conv", x.repeat(2, axis=1).repeat(2, axis=2)))


# VAE decoder


def vae_decoder(m: Part, z: Array) -> Array:
    """Return the picture (B, H, W, 3) in [-1, 1] of latents z."""
    x = convolution(m, "decoder.conv_in", convolution(m, "post_quant_conv", z))
    x = resblock(m, "decoder.mid_block.resnets.0", x, eps=1e-6)
    at = "decoder.mid_block.attentions.0"
    y = group_norm(m, f"{at}.group_norm", x, 1e-6).reshape(len(x), -1, x.shape[-1])
    x = m.show(at, x + attention(m, at, y, y, heads=1).reshape(x.shape))
    x = m.show("decoder.mid_block", resblock(m, "decoder.mid_block.resnets.1", x, eps=1e-6))
    for block in m.each("decoder.up_blocks"):
        for res in m.each(f"{block}.resnets"):
            x = resblock(m, res, x, eps=1e-6)
        x = m.show(block, upsampled(m, f"{block}.upsamplers.0", x))
    y = jax.nn.silu(group_norm(m, "decoder.conv_norm_out", x, 1e-6))
    return m.show("decoder", convolution(m, "decoder.conv_out", y))
