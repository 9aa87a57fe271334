"""Widths and depths of an original single file, from the shapes of its tensors.

A single file has no config. Its shapes determine everything except the number of attention heads and norm groups, the
activation of the text encoder, and the size of the training pictures. These follow the family's rule (here the defaults
of SD1), and the user can override them. Results are config fields by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minidiff.errors import CheckpointError
from minidiff.storage.files import Lazy
from weights_convert.keys_original import CLIP, GUIDANCE, UNET, VAE

SD1_HEADS = 8
CLIP_HEAD = 64  # channels per head in every CLIP text encoder


class Shapes:
    """Shapes of the tensors under ``root`` ("": the top level)."""

    def __init__(self, tensors: Mapping[str, Lazy], root: str, where: str) -> None:
        self.tensors, self.prefix, self.where = tensors, f"{root}." if root else "", where

    def has(self, name: str) -> bool:
        """Return True if the tensor exists."""
        return f"{self.prefix}{name}" in self.tensors

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return a tensor's shape. Raises :class:`CheckpointError` if it is missing or has another rank."""
        key = f"{self.prefix}{name}"
        if key not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor {key!r} is missing; its shape tells the model's size")
        shape = self.tensors[key].shape
        if len(shape) != ndim:
            raise CheckpointError(f"{self.where}: tensor {key!r} has shape {list(shape)}, {ndim} dimensions expected")
        return shape

    def is_convolution(self, name: str) -> bool:
        """Return True if a matrix is stored as a 1x1 convolution."""
        tensor = self.tensors.get(f"{self.prefix}{name}")
        return tensor is not None and len(tensor.shape) == 4

    def count(self, name: Callable[[int], str]) -> int:
        """Return the number of ``name(0)``, ``name(1)``, ... that exist."""
        n = 0
        while self.has(name(n)):
            n += 1
        return n


def unet(tensors: Mapping[str, Lazy], where: str, head: int | None = None) -> dict[str, Any]:
    """Return the fields of a UNetConfig, with ``head`` channels per head, or SD1's eight heads at every level."""
    s = Shapes(tensors, UNET, where)
    levels: list[list[dict[str, Any]]] = [[]]
    context_dim, linear = None, False
    n = 1
    while s.has(f"input_blocks.{n}.0.op.weight") or s.has(f"input_blocks.{n}.0.out_layers.3.weight"):
        if s.has(f"input_blocks.{n}.0.op.weight"):
            levels.append([])
        else:
            levels[-1].append(
                _level(s, f"input_blocks.{n}", s.of(f"input_blocks.{n}.0.out_layers.3.weight", 4)[0], head)
            )
        if s.has(f"input_blocks.{n}.1.transformer_blocks.0.attn2.to_k.weight"):
            context_dim = s.of(f"input_blocks.{n}.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = not s.is_convolution(f"input_blocks.{n}.1.proj_in.weight")
        n += 1
    if not all(levels):
        raise CheckpointError(f"{where}: {UNET}.input_blocks has a level without ResBlocks; blocks are missing")
    layers = len(levels[0])
    return {
        "levels": [_joined(s, level, (len(levels) - 1 - i) * (layers + 1)) for i, level in enumerate(levels)],
        "mid": _level(s, "middle_block", levels[-1][-1]["channels"], head),
        "mid_layers": sum(s.has(f"middle_block.{k}.out_layers.3.weight") for k in (0, 2)),
        "in_channels": s.of("input_blocks.0.0.weight", 4)[1],
        "out_channels": s.of("out.2.weight", 4)[0],
        "layers": layers,
        "context_dim": context_dim,
        "linear_proj": linear,
        "added_dim": s.of("label_emb.0.0.weight", 2)[1] if s.has("label_emb.0.0.weight") else None,
        "guidance_dim": s.of(f"{GUIDANCE}.weight", 2)[1] if s.has(f"{GUIDANCE}.weight") else None,
    }


def _joined(s: Shapes, blocks: list[dict[str, Any]], first: int) -> dict[str, Any]:
    """Return one level from its blocks on the way down, and those on the way up starting at output block ``first``.

    A level whose transformers have different depths lists them.
    """
    level = blocks[0]
    down = [block.get("depth", 0) for block in blocks]
    up = [_depth(s, f"output_blocks.{first + j}") for j in range(len(blocks) + 1)]
    return level if {*down, *up} == {down[0]} else {**level, "down_depths": down, "up_depths": up}


def _depth(s: Shapes, block: str) -> int:
    return s.count(lambda k: f"{block}.1.transformer_blocks.{k}.attn1.to_q.weight")


def _level(s: Shapes, block: str, channels: int, head: int | None) -> dict[str, Any]:
    depth = _depth(s, block)
    if not depth:
        return {"channels": channels}
    heads = SD1_HEADS if head is None else max(1, channels // head)
    return {"channels": channels, "attention": "text", "depth": depth, "heads": heads}


def vae(tensors: Mapping[str, Lazy], where: str, root: str = VAE) -> dict[str, Any]:
    """Return the fields of a VAEConfig; the names under ``root`` may be those of diffusers as well."""
    s = Shapes(tensors, root, where)
    block, attention = "encoder.down.{}.block.{}.conv1.weight", ["encoder.mid.attn_1.q.weight"]
    if not s.has(block.format(0, 0)):
        block = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
        attention = [f"encoder.mid_block.attentions.0.{name}.weight" for name in ("to_q", "query")]
    levels = s.count(lambda i: block.format(i, 0))
    return {
        "channels": [s.of(block.format(i, 0), 4)[0] for i in range(levels)],
        "image_channels": s.of("encoder.conv_in.weight", 4)[1],
        "latent_channels": s.of("decoder.conv_in.weight", 4)[1],
        "layers": s.count(lambda j: block.format(0, j)),
        "mid_attention": any(s.has(name) for name in attention),
        "quant_convs": s.has("quant_conv.weight"),
    }


def clip(tensors: Mapping[str, Lazy], where: str, prefix: str, root: str = CLIP) -> dict[str, Any]:
    """Return the fields of a CLIPTextConfig; names under ``root`` begin with ``prefix`` ("text_model." or nothing)."""
    s = Shapes(tensors, root, where)
    vocab, width = s.of(f"{prefix}embeddings.token_embedding.weight", 2)
    return {
        "width": width,
        "layers": s.count(lambda i: f"{prefix}encoder.layers.{i}.mlp.fc1.weight"),
        "heads": max(1, width // CLIP_HEAD),
        "mlp": s.of(f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "vocab": vocab,
        "positions": s.of(f"{prefix}embeddings.position_embedding.weight", 2)[0],
    }
