"""Widths and depths of an original single file, read from its tensors' shapes.

A single file comes without a config. Its shapes tell everything but a few numbers: how many heads an attention has, how
many groups a norm, which activation the text encoder uses, at which size it was trained. Those follow the family's rule
(here the defaults of SD1), and whoever knows better overrides them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minidiff.config import CLIPTextConfig, Level, UNetConfig, VAEConfig
from minidiff.errors import CheckpointError
from minidiff.files import Lazy
from weights_convert.keys_original import CLIP, UNET, VAE

SD1_HEADS = 8
CLIP_HEAD = 64  # channels of one head, in every CLIP text encoder


class Shapes:
    """The shapes below a prefix."""

    def __init__(self, tensors: Mapping[str, Lazy], prefix: str, where: str) -> None:
        self.tensors, self.prefix, self.where = tensors, prefix, where

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return f"{self.prefix}.{name}" in self.tensors

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """Its shape. Raises :class:`CheckpointError` if it is missing or has another number of dimensions."""
        key = f"{self.prefix}.{name}"
        if key not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor {key!r} is missing; its shape tells the model's size")
        shape = self.tensors[key].shape
        if len(shape) != ndim:
            raise CheckpointError(f"{self.where}: tensor {key!r} has shape {list(shape)}, {ndim} dimensions expected")
        return shape

    def count(self, name: Callable[[int], str]) -> int:
        """How many of ``name(0)``, ``name(1)``, ... there are."""
        n = 0
        while self.has(name(n)):
            n += 1
        return n


def unet(tensors: Mapping[str, Lazy], where: str) -> UNetConfig:
    """The UNet's config, with SD1's eight heads at every level."""
    s = Shapes(tensors, UNET, where)
    in_channels = s.of("input_blocks.0.0.weight", 4)[1]
    levels: list[list[Level]] = [[]]
    context_dim, linear = None, False
    for n in range(1, s.count(lambda n: f"input_blocks.{n}.0.{_first(s, n)}")):
        if s.has(f"input_blocks.{n}.0.op.weight"):
            levels.append([])
            continue
        levels[-1].append(_level(s, f"input_blocks.{n}", s.of(f"input_blocks.{n}.0.out_layers.3.weight", 4)[0]))
        block = f"input_blocks.{n}.1"
        if s.has(f"{block}.transformer_blocks.0.attn2.to_k.weight"):
            context_dim = s.of(f"{block}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = len(tensors[f"{UNET}.{block}.proj_in.weight"].shape) == 2
    if not all(levels):
        raise CheckpointError(f"{where}: {UNET}.input_blocks has a level without ResBlocks; blocks are missing")
    return UNetConfig(
        levels=tuple(level[0] for level in levels),
        mid=_level(s, "middle_block", levels[-1][-1].channels),
        in_channels=in_channels,
        out_channels=s.of("out.2.weight", 4)[0],
        layers=len(levels[0]),
        context_dim=context_dim,
        linear_proj=linear,
        added_dim=s.of("label_emb.0.0.weight", 2)[1] if s.has("label_emb.0.0.weight") else None,
    )


def _first(s: Shapes, n: int) -> str:
    """The tensor that tells that block ``n`` exists: the first one, a step down, or a ResBlock."""
    if n == 0:
        return "weight"
    return "op.weight" if s.has(f"input_blocks.{n}.0.op.weight") else "in_layers.2.weight"


def _level(s: Shapes, block: str, channels: int) -> Level:
    depth = s.count(lambda k: f"{block}.1.transformer_blocks.{k}.attn1.to_q.weight")
    if not depth:
        return Level(channels=channels)
    return Level(channels=channels, attention="text", depth=depth, heads=SD1_HEADS)


def vae(tensors: Mapping[str, Lazy], where: str) -> VAEConfig:
    """The autoencoder's config."""
    s = Shapes(tensors, VAE, where)
    levels = s.count(lambda i: f"encoder.down.{i}.block.0.conv1.weight")
    latent = s.of("decoder.conv_in.weight", 4)[1]
    return VAEConfig(
        channels=tuple(s.of(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)),
        image_channels=s.of("encoder.conv_in.weight", 4)[1],
        latent_channels=latent,
        layers=s.count(lambda j: f"encoder.down.0.block.{j}.conv1.weight"),
        mid_attention=s.has("encoder.mid.attn_1.q.weight"),
        quant_convs=s.has("quant_conv.weight"),
    )


def clip(tensors: Mapping[str, Lazy], where: str, prefix: str) -> CLIPTextConfig:
    """SD1's text encoder, whose names begin with ``prefix`` ("text_model." or nothing)."""
    s = Shapes(tensors, CLIP, where)
    vocab, width = s.of(f"{prefix}embeddings.token_embedding.weight", 2)
    return CLIPTextConfig(
        width=width,
        layers=s.count(lambda i: f"{prefix}encoder.layers.{i}.mlp.fc1.weight"),
        heads=max(1, width // CLIP_HEAD),
        mlp=s.of(f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
        vocab=vocab,
        positions=s.of(f"{prefix}embeddings.position_embedding.weight", 2)[0],
        end_token=min(49407, vocab - 1),
    )
