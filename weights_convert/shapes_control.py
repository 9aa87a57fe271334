"""Widths and depths of a control in a bare file, from the shapes of its tensors, by either layout's names.

What shapes cannot tell follows the rule of the public models: eight heads where projections are convolutions (SD1),
heads of 64 channels elsewhere; a T2I-Adapter that reads squares of 16 pixels is one for SDXL. Results are config fields
by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minidiff.config import MOST_LEVELS
from minidiff.errors import CheckpointError
from minidiff.storage.files import Lazy
from weights_convert.shapes_original import SD1_HEADS, Shapes

HEAD = 64


class Names(NamedTuple):
    """Names of a ControlNet's tensors: those of its author's code (``original``) or of diffusers."""

    original: bool

    def res(self, i: int, j: int, layers: int) -> str:
        n = 1 + i * (layers + 1) + j
        return f"input_blocks.{n}.0.out_layers.3" if self.original else f"down_blocks.{i}.resnets.{j}.conv2"

    def attn(self, i: int, j: int, layers: int) -> str:
        n = 1 + i * (layers + 1) + j
        return f"input_blocks.{n}.1" if self.original else f"down_blocks.{i}.attentions.{j}"

    def hint(self, k: int) -> str:
        """Return the k-th convolution before the picture, that of the first width being 0."""
        if self.original:
            return f"input_hint_block.{2 * k}"
        return f"controlnet_cond_embedding.{'conv_in' if k == 0 else f'blocks.{k - 1}'}"

    @property
    def mid(self) -> tuple[str, str, str]:
        if self.original:
            return "middle_block.0.out_layers.3", "middle_block.1", "middle_block.2.out_layers.3"
        return "mid_block.resnets.0.conv2", "mid_block.attentions.0", "mid_block.resnets.1.conv2"

    @property
    def conv_in(self) -> str:
        return "input_blocks.0.0" if self.original else "conv_in"

    @property
    def added(self) -> str:
        return "label_emb.0.0" if self.original else "add_embedding.linear_1"


def controlnet(tensors: Mapping[str, Lazy], where: str, root: str, *, original: bool) -> dict[str, Any]:
    """Return the fields of a ControlNetConfig of the tensors under ``root`` ("": the top level)."""
    s, names = Shapes(tensors, root, where), Names(original)
    layers = _layers(s, names)
    linear, context_dim = False, None
    attended = [names.attn(i, j, layers) for i in range(MOST_LEVELS) for j in range(layers)]
    for block in (*attended, names.mid[1]):
        if s.has(f"{block}.transformer_blocks.0.attn2.to_k.weight"):
            context_dim = s.of(f"{block}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = not s.is_convolution(f"{block}.proj_in.weight")

    def level(block: str, channels: int) -> dict[str, Any]:
        depth = s.count(lambda k: f"{block}.transformer_blocks.{k}.attn1.to_q.weight")
        heads = max(1, channels // HEAD) if linear else SD1_HEADS
        return {"channels": channels, **({"attention": "text", "depth": depth, "heads": heads} if depth else {})}

    levels: list[dict[str, Any]] = []
    while s.has(f"{names.res(len(levels), 0, layers)}.weight"):
        i = len(levels)
        levels.append(level(names.attn(i, 0, layers), s.of(f"{names.res(i, 0, layers)}.weight", 4)[0]))
    if not levels:
        raise CheckpointError(f"{where}: has no {names.res(0, 0, layers)}.weight; blocks are missing")
    first, turn, second = names.mid
    widths, k = [s.of(f"{names.hint(0)}.weight", 4)[0]], 2
    while s.has(
        f"{names.hint(k + (1 if original else 0))}.weight"
    ):  # the last of the original's is the one behind them
        widths.append(s.of(f"{names.hint(k)}.weight", 4)[0])
        k += 2
    added = f"{names.added}.weight"
    return {
        "levels": levels,
        "mid": level(turn, levels[-1]["channels"]),
        "mid_layers": sum(s.has(f"{name}.weight") for name in (first, second)),
        "in_channels": s.of(f"{names.conv_in}.weight", 4)[1],
        "layers": layers,
        "context_dim": context_dim,
        "linear_proj": linear,
        "added_dim": s.of(added, 2)[1] if s.has(added) else None,
        "image_channels": s.of(f"{names.hint(0)}.weight", 4)[1],
        "hint_widths": widths,
    }


def _layers(s: Shapes, names: Names) -> int:
    """Return the number of ResBlocks of the first level."""
    if names.original:  # its blocks are numbered through; a downsampling ends the level
        return s.count(lambda j: f"input_blocks.{1 + j}.0.out_layers.3.weight")
    return s.count(lambda j: f"down_blocks.0.resnets.{j}.conv2.weight")


def t2i_adapter(tensors: Mapping[str, Lazy], where: str, *, original: bool) -> dict[str, Any]:
    """Return the fields of a T2IAdapterConfig."""
    s = Shapes(tensors, "" if original else "adapter", where)
    light = s.has("body.0.out_conv.weight")
    if light or not original:
        blocks = "body" if original else "resnets"
        last = "out_conv" if light else f"{blocks}.0.block1"
        channels = [s.of(f"body.{i}.{last}.weight", 4)[0] for i in range(s.count(lambda i: f"body.{i}.{last}.weight"))]
        layers = s.count(lambda j: f"body.0.{blocks}.{j}.block1.weight")
    else:
        count = s.count(lambda k: f"body.{k}.block1.weight")
        wider = [k for k in range(1, count) if s.has(f"body.{k}.in_conv.weight")]  # where a level begins, mostly
        layers = wider[0] if wider else 2
        channels = [s.of(f"body.{k}.block1.weight", 4)[0] for k in range(0, count, layers)]
    read = s.of("body.0.in_conv.weight" if light else "conv_in.weight", 4)[1]
    found = [(c, math.isqrt(read // c)) for c in (3, 1) if read % c == 0 and math.isqrt(read // c) ** 2 * c == read]
    if not found:
        raise CheckpointError(f"{where}: its first convolution reads {read} channels, which are no squares of pixels")
    image_channels, factor = found[0]
    kind = "light" if light else "xl" if factor == 16 else "full"
    return {
        "kind": kind,
        "channels": channels,
        "layers": layers,
        "image_channels": image_channels,
        "factor": factor,
    }
