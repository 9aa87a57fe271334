"""OpenCLIP's text encoder in original single files: Stable Diffusion 2's, and the second one of SDXL.

It is the same transformer as CLIP's, stored differently: queries, keys and values are one matrix (``in_proj_weight``),
and the projection of the pooled output is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minidiff.config import CLIPTextConfig
from minidiff.errors import UnsupportedError
from minidiff.storage.files import Lazy
from weights_convert.engine import SAME, Drop, Form, Pair
from weights_convert.shapes_original import CLIP_HEAD, Shapes

TRANSPOSED = Form("transposed", lambda t: t.T.contiguous(), lambda t: t.T.contiguous(), lambda s: s[::-1])
LAYER = (
    ("ln_1", "norm1"),
    ("attn.out_proj", "attn.out"),
    ("ln_2", "norm2"),
    ("mlp.c_fc", "fc1"),
    ("mlp.c_proj", "fc2"),
)


def _alone(_: Tensor) -> Tensor:
    raise UnsupportedError("a third of a fused matrix is not written back alone")


# Queries, keys and values: the rows of one matrix, a third each.
THIRDS = tuple(
    Form(
        f"rows of {name} in one matrix",
        lambda t, k=k: t.chunk(3)[k].contiguous(),  # type: ignore[misc]
        _alone,
        lambda s: (3 * s[0], *s[1:]),
    )
    for k, name in enumerate("qkv")
)


def drops(root: str, layers: int) -> tuple[Drop, ...]:
    """Return the keys of an encoder under ``root`` ("": at the top) that are not mapped if ``layers`` are used."""
    prefix = re.escape(_prefix(root))
    return (
        Drop(
            "unused last layer",
            rf"{prefix}transformer\.resblocks\.{layers}\..*",
            "Stable Diffusion 2 reads the layer before it",
        ),
        Drop("attention mask", rf"{prefix}attn_mask", "the causal mask, a constant"),
    )


def _prefix(root: str) -> str:
    return f"{root}." if root else ""


def pairs(config: CLIPTextConfig, root: str, part: str) -> list[Pair]:
    """Pair every tensor of the encoder under ``root`` with ``part`` of a model; either may be "", for the top level."""
    there, here = _prefix(root), _prefix(part)
    found = [
        Pair(f"{there}token_embedding.weight", f"{here}token.weight"),
        Pair(f"{there}positional_embedding", f"{here}position.weight"),
        *(Pair(f"{there}ln_final.{leaf}", f"{here}norm.{leaf}") for leaf in ("weight", "bias")),
    ]
    for i in range(config.layers):
        theirs, ours = f"{there}transformer.resblocks.{i}", f"{here}layers.{i}"
        for leaf in ("weight", "bias"):
            found += [
                Pair(f"{theirs}.attn.in_proj_{leaf}", f"{ours}.attn.{x}.{leaf}", THIRDS[k]) for k, x in enumerate("qkv")
            ]
            found += [Pair(f"{theirs}.{a}.{leaf}", f"{ours}.{b}.{leaf}", SAME) for a, b in LAYER]
    if config.projection is not None:
        found.append(Pair(f"{there}text_projection", f"{here}projection.weight", TRANSPOSED))
    return found


def shapes(tensors: Mapping[str, Lazy], root: str, where: str, *, pooled: bool) -> dict[str, Any]:
    """Return the fields of a CLIPTextConfig; ``pooled``: with the projection and all layers, else the layers of SD2.

    SD2 reads the output of OpenCLIP's last but one layer. Some files lack the last one (diffusers' converter and
    minidiff leave it out), which only the count tells: OpenCLIP's encoders have an even number of layers (12, 24, 32),
    so an odd number means that the last one is missing.
    """
    s = Shapes(tensors, root, where)
    vocab, width = s.of("token_embedding.weight", 2)
    layers = s.count(lambda i: f"transformer.resblocks.{i}.mlp.c_fc.weight")
    return {
        "width": width,
        "layers": layers if pooled or layers % 2 else layers - 1,
        "heads": max(1, width // CLIP_HEAD),
        "mlp": s.of("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "activation": "gelu",
        "projection": s.of("text_projection", 2)[1] if pooled else None,
        "vocab": vocab,
        "positions": s.of("positional_embedding", 2)[0],
    }
