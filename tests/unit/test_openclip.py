"""OpenCLIP's text encoder in original single files: names, fused and transposed matrices, what shapes tell."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.config import CLIPTextConfig
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.clip import CLIPText
from minidiff.storage.files import lazy
from weights_convert import openclip
from weights_convert.engine import translate

WIDTH, MLP, WORDS, PLACES = 8, 12, 11, 5


def tensors(layers: int, root: str, width: int = WIDTH, pooled: int | None = None) -> dict[str, Tensor]:
    """An encoder as OpenCLIP saves it; every number of it is another one."""
    there = f"{root}." if root else ""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (WORDS, width),
        "positional_embedding": (PLACES, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for i in range(layers):
        layer: dict[str, tuple[int, ...]] = {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (MLP, width),
            "mlp.c_proj": (width, MLP),
        }
        for name, shape in layer.items():
            joint = "_" if name.endswith("in_proj") else "."
            shapes[f"transformer.resblocks.{i}.{name}{joint}weight"] = shape
            shapes[f"transformer.resblocks.{i}.{name}{joint}bias"] = shape[:1]
    if pooled is not None:
        shapes["text_projection"] = (width, pooled)
    counter = 0
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        found[there + name] = torch.arange(counter, counter + size, dtype=torch.float32).reshape(shape)
        counter += size
    return found


def config(layers: int, projection: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        width=WIDTH, layers=layers, heads=2, mlp=MLP, vocab=WORDS, positions=PLACES, projection=projection
    )


@pytest.mark.parametrize("root", ["", "cond_stage_model.model"])
@pytest.mark.parametrize("part", ["", "text_encoder"])
def test_every_tensor_has_its_place(root: str, part: str) -> None:
    given = tensors(3, root, pooled=4)
    there, here = (f"{name}." if name else "" for name in (root, part))
    given[f"{there}attn_mask"] = torch.zeros(PLACES, PLACES)
    text = config(2, projection=4)
    model = torch.nn.ModuleDict({part: CLIPText(text)}) if part else CLIPText(text)
    found = translate(
        openclip.pairs(text, root, part),
        {name: lazy(t) for name, t in given.items()},
        model,
        where="file",
        drops=openclip.drops(root, 2),
    )
    got = {name.removeprefix(here): t.load() for name, t in found.tensors.items()}
    assert got.keys() == CLIPText(text).state_dict().keys()
    want = {
        "token.weight": "token_embedding.weight",
        "position.weight": "positional_embedding",
        "norm.weight": "ln_final.weight",
        "norm.bias": "ln_final.bias",
        "layers.1.norm1.weight": "transformer.resblocks.1.ln_1.weight",
        "layers.1.norm2.bias": "transformer.resblocks.1.ln_2.bias",
        "layers.0.attn.out.weight": "transformer.resblocks.0.attn.out_proj.weight",
        "layers.1.fc1.weight": "transformer.resblocks.1.mlp.c_fc.weight",
        "layers.1.fc2.bias": "transformer.resblocks.1.mlp.c_proj.bias",
    }
    for ours, theirs in want.items():
        assert torch.equal(got[ours], given[there + theirs]), ours
    for leaf in ("weight", "bias"):
        fused = given[f"{there}transformer.resblocks.1.attn.in_proj_{leaf}"]
        assert torch.equal(torch.cat([got[f"layers.1.attn.{x}.{leaf}"] for x in "qkv"]), fused)
    assert torch.equal(got["projection.weight"], given[f"{there}text_projection"].T)
    assert got["projection.weight"].is_contiguous()
    dropped = {drop.name: sorted(keys) for drop, keys in found.dropped.items()}
    assert dropped["attention mask"] == [f"{there}attn_mask"]
    assert len(dropped["unused last layer"]) == 12
    assert all(name.startswith(f"{there}transformer.resblocks.2.") for name in dropped["unused last layer"])


def test_without_a_projection_there_is_none() -> None:
    assert not any("projection" in pair.ours for pair in openclip.pairs(config(1), "", ""))


def test_only_the_keys_of_this_encoder_are_dropped() -> None:
    last, mask = openclip.drops("a.model", 2)
    assert re.fullmatch(last.pattern, "a.model.transformer.resblocks.2.ln_1.weight")
    for other in ("a.model.transformer.resblocks.20.ln_1.weight", "aXmodel.transformer.resblocks.2.ln_1.weight"):
        assert not re.fullmatch(last.pattern, other)
    assert re.fullmatch(mask.pattern, "a.model.attn_mask")
    assert not re.fullmatch(mask.pattern, "attn_mask")


def test_the_forms_backwards() -> None:
    """A projection is written back; a third of a matrix is not, without the other two."""
    t = torch.arange(6.0).reshape(2, 3)
    there = openclip.TRANSPOSED.read(t)
    assert torch.equal(openclip.TRANSPOSED.write(there), t)
    assert openclip.TRANSPOSED.stored((2, 3)) == (3, 2)
    for third in openclip.THIRDS:
        assert third.stored((2, 3)) == (6, 3)
        assert third.stored((2,)) == (6,)
        with pytest.raises(UnsupportedError, match="not written back alone"):
            third.write(t)


@pytest.mark.parametrize(
    ("there", "pooled", "layers"), [(4, False, 3), (3, False, 3), (4, True, 4), (3, True, 3), (2, False, 1)]
)
def test_what_shapes_tell(there: int, pooled: bool, layers: int) -> None:
    """SD2 reads all layers but OpenCLIP's last, which a file may lack; SDXL reads all."""
    given = tensors(there, "root", pooled=6)
    assert openclip.shapes({k: lazy(t) for k, t in given.items()}, "root", "file", pooled=pooled) == {
        "width": WIDTH,
        "layers": layers,
        "heads": 1,
        "mlp": MLP,
        "activation": "gelu",
        "projection": 6 if pooled else None,
        "vocab": WORDS,
        "positions": PLACES,
    }


def test_a_head_has_64_channels() -> None:
    def found(width: int) -> Any:
        given = {k: lazy(t) for k, t in tensors(1, "", width).items()}
        return openclip.shapes(given, "", "file", pooled=False)["heads"]

    assert [found(width) for width in (63, 64, 127, 128, 192)] == [1, 1, 1, 2, 3]


def test_an_encoder_without_its_words() -> None:
    given = {k: lazy(t) for k, t in tensors(1, "root").items() if "token" not in k}
    with pytest.raises(CheckpointError, match=r"file: .*token_embedding\.weight"):
        openclip.shapes(given, "root", "file", pooled=False)
