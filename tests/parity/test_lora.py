"""Adapters against diffusers with peft: the same file, fused and live, one and several at once, the same latents."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

import weights_convert
from minidiff.adapters import lora
from minidiff.adapters.lora import Adapter, Update
from minidiff.errors import UnsupportedError
from minidiff.pipeline import StableDiffusion
from tests.support.parity.twins import folder_twin, ours, unet_twin
from tests.tolerances import assert_close
from weights_convert import keys_diffusers, read_lora
from weights_convert.peft_settings import Pattern

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv")
EMBEDDINGS = ("conv_in", "conv_out", "time_emb_proj", "linear_1", "linear_2", "upsamplers.0.conv")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, StableDiffusion]:
    """A new one for each test: the reference takes an update off by subtracting it, and is not what it was."""
    theirs = folder_twin(tmp_path / "sd1")
    theirs.set_progress_bar_config(disable=True)
    ours = weights_convert.load(tmp_path / "sd1")
    assert isinstance(ours, StableDiffusion)
    return theirs, ours


def halves(module: nn.Module, ends: tuple[str, ...], seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A random update of rank 3 or 2 for every layer of ``module`` whose name has one of ``ends``."""
    g = torch.Generator().manual_seed(seed)
    for name, layer in module.named_modules():
        if name.endswith(ends) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            out, rank = layer.weight.shape[0], 3 - seed % 2
            down = torch.randn(rank, *layer.weight.shape[1:], generator=g) * 0.1
            yield name, down, torch.randn(out, rank, *[1] * (layer.weight.ndim - 2), generator=g) * 0.1


def diffusers_file(theirs: Any, path: Path, ends: tuple[str, ...], seed: int) -> Path:
    """A file as diffusers writes them with peft."""
    tensors = {}
    for part in ("unet", "text_encoder"):
        for name, down, up in halves(getattr(theirs, part), ends + TEXT, seed):
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    safetensors.torch.save_file(tensors, path)
    return path


def kohya_file(theirs: Any, path: Path, ends: tuple[str, ...], seed: int) -> Path:
    """A file as kohya's scripts write them, with an alpha for each module."""
    tensors = {}
    for prefix, part in (("lora_unet", theirs.unet), ("lora_te_text_model", theirs.text_encoder)):
        for name, down, up in halves(part, ends + TEXT, seed):
            key = f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    safetensors.torch.save_file(tensors, path)
    return path


def latents(pipeline: Any) -> Tensor:
    options: dict[str, Any] = {"guidance_scale": 5.0, "generator": torch.Generator().manual_seed(1)}
    if isinstance(pipeline, StableDiffusion):
        found: Tensor = pipeline.generate("a red fox", steps=3, output="latent", progress=False, **options)
        return found
    return pipeline("a red fox", num_inference_steps=3, output_type="latent", **options).images


@pytest.mark.parametrize("write", [diffusers_file, kohya_file])
@pytest.mark.parametrize("live", [True, False], ids=["live", "fused"])
def test_one_adapter(pair: tuple[Any, StableDiffusion], tmp_path: Path, write: Any, live: bool) -> None:
    theirs, ours = pair
    before = latents(ours)
    path = write(theirs, tmp_path / "a.safetensors", ATTENTION, 0)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    theirs.set_adapters(["a"], [0.8])
    if not live:
        theirs.fuse_lora()
    applied = lora.apply(ours.parts, [(read_lora(path, ours.config), 0.8)], live=live)
    changed = latents(ours)
    assert_close(changed, latents(theirs), where=f"{write.__name__}, live={live}")
    assert not torch.allclose(changed, before, atol=1e-2)
    applied.remove()
    assert_close(latents(ours), before)


@pytest.mark.parametrize("live", [True, False], ids=["live", "fused"])
def test_two_adapters_with_convolutions(pair: tuple[Any, StableDiffusion], tmp_path: Path, live: bool) -> None:
    theirs, ours = pair
    paths = [
        diffusers_file(theirs, tmp_path / "a.safetensors", ATTENTION + CONVOLUTIONS, 2),
        diffusers_file(theirs, tmp_path / "b.safetensors", ATTENTION, 3),
    ]
    for path in paths:
        theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=path.stem)
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    if not live:
        theirs.fuse_lora(adapter_names=["a", "b"])
    found = [read_lora(path, ours.config) for path in paths]
    lora.apply(ours.parts, list(zip(found, (0.7, -0.4), strict=True)), live=live)
    assert_close(latents(ours), latents(theirs), where=f"live={live}")


def processor_file(theirs: Any, path: Path, ends: tuple[str, ...], seed: int) -> Path:
    """A file as diffusers wrote them early in 2023: of the layers inside attention processors only."""
    tensors = {}
    attention = tuple(end for end in ends if end.startswith("to_"))
    for name, down, up in halves(theirs.unet, attention, seed):
        stem, _, last = name.removesuffix(".0").rpartition(".")
        key = f"unet.{stem}.processor.{last}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    for name, down, up in halves(theirs.text_encoder, TEXT[:4], seed):
        stem, _, last = name.removeprefix("text_model.").rpartition(".")
        key = f"text_encoder.text_model.{stem}.to_{last.removesuffix('_proj')}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    safetensors.torch.save_file(tensors, path)
    return path


def linear_layer_file(theirs: Any, path: Path, ends: tuple[str, ...], seed: int) -> Path:
    """A file as diffusers wrote them later in 2023."""
    tensors = {}
    for name, down, up in halves(theirs.unet, ends, seed):
        tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    for name, down, up in halves(theirs.text_encoder, TEXT, seed):
        key = f"text_encoder.text_model.{name.removeprefix('text_model.')}.lora_linear_layer"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize("write", [processor_file, linear_layer_file])
def test_names_of_2023(pair: tuple[Any, StableDiffusion], tmp_path: Path, write: Any) -> None:
    theirs, ours_ = pair
    before = latents(ours_)
    path = write(theirs, tmp_path / "a.safetensors", ATTENTION, 0)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    theirs.fuse_lora()
    lora.apply(ours_.parts, [(read_lora(path, ours_.config), 1.0)])
    assert_close(latents(ours_), latents(theirs), where=write.__name__)
    assert not torch.allclose(latents(ours_), before, atol=1e-2)


@pytest.mark.parametrize("live", [True, False], ids=["live", "fused"])
def test_two_text_encoders_in_kohyas_and_onetrainers_names(tmp_path: Path, live: bool) -> None:
    theirs = folder_twin(tmp_path / "xl", "sdxl")
    theirs.set_progress_bar_config(disable=True)
    kohya, onetrainer = {}, {}
    for part, prefix, other in (
        ("unet", "lora_unet_", "unet."),
        ("text_encoder", "lora_te1_text_model_", "clip_l.text_model."),
        ("text_encoder_2", "lora_te2_text_model_", "clip_g.text_model."),
    ):
        for name, down, up in halves(getattr(theirs, part), (*ATTENTION, *TEXT), len(part)):
            name = name.removeprefix("text_model.")
            for tensors, key in ((kohya, prefix + name.replace(".", "_")), (onetrainer, other + name)):
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors |= {f"{key}.alpha": torch.tensor(2.0)}
    safetensors.torch.save_file(kohya, tmp_path / "a.safetensors")
    safetensors.torch.save_file(onetrainer, tmp_path / "b.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    theirs.set_adapters(["a"], [0.5])
    if not live:
        theirs.fuse_lora()
    reference = latents(theirs)
    for name in ("a.safetensors", "b.safetensors"):
        ours_: Any = weights_convert.load(tmp_path / "xl")
        lora.apply(ours_.parts, [(read_lora(tmp_path / name, ours_.config), 0.5)], live=live)
        assert_close(latents(ours_), reference, where=f"{name}, live={live}")


@pytest.mark.parametrize("live", [True, False], ids=["live", "fused"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_kind_of_layer_and_three_adapters(kind: str, live: bool) -> None:
    """Linear projections read rows that lie apart, from two pictures on: peft multiplies them as one matrix."""
    theirs = unet_twin(kind)
    mine = ours(theirs)
    paths = {m.theirs: f"unet.{m.ours}" for m in keys_diffusers.unet(mine.config)}
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for seed, ends in enumerate((ATTENTION, CONVOLUTIONS + EMBEDDINGS, ("proj_in", "conv1", "to_q"))):
        found["abc"[seed]] = {name: (down, up) for name, down, up in halves(theirs, ends, seed)}
    adapters = []
    for (letter, updates), alpha in zip(found.items(), (3.0, 1.5, 4.0), strict=True):
        rank = len(next(iter(updates.values()))[0])
        theirs.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(updates)), letter)
        for name, (down, up) in updates.items():
            layer: Any = theirs.get_submodule(name)
            layer.lora_A[letter].weight.data, layer.lora_B[letter].weight.data = down.clone(), up.clone()
        adapters.append(Adapter(letter, {paths[name]: Update(*both, alpha) for name, both in updates.items()}))
    strengths = (0.5, 1.0, -1.0)
    theirs.set_adapters(list(found), list(strengths))
    if not live:
        theirs.fuse_lora(adapter_names=list(found))
    lora.apply({"unet": mine}, list(zip(adapters, strengths, strict=True)), live=live)
    g = torch.Generator().manual_seed(0)
    for batch, size in ((1, (8, 8)), (2, (8, 8)), (3, (12, 8)), (2, (10, 14))):
        x = torch.randn(batch, 4, *size, generator=g)
        context = torch.randn(batch, 7, theirs.config.cross_attention_dim, generator=g)
        added = (torch.randn(batch, 24, generator=g), torch.rand(batch, 6, generator=g) * 100)
        told = {"text_embeds": added[0], "time_ids": added[1]} if kind == "sdxl" else None
        with torch.no_grad():
            reference = theirs(x, torch.tensor(500), context, added_cond_kwargs=told).sample
            made = mine(x, torch.tensor(500), context, added=added if kind == "sdxl" else None)
        assert_close(made, reference, where=f"{kind}, live={live}, {batch} of {size}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """On the CPU the product is made in float32 and rounded once, then added."""
    theirs = folder_twin(tmp_path / "sd1", dtype=dtype)
    mine: Any = weights_convert.load(tmp_path / "sd1", dtype=dtype)
    path = kohya_file(theirs, tmp_path / "a.safetensors", ATTENTION + CONVOLUTIONS, 0)
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    theirs.set_adapters(["a"], [0.8])
    theirs.fuse_lora()
    adapter = read_lora(path, mine.config)
    lora.apply(mine.parts, [(adapter, 0.8)])
    paths = {f"unet.{m.ours}": m.theirs for m in keys_diffusers.unet(mine.config.unet)}
    for name in (name for name in adapter.updates if name in paths):
        reference = theirs.unet.get_submodule(paths[name]).base_layer.weight
        assert_close(lora.find(mine.parts, name).get_parameter("weight"), reference, where=name)


def test_a_folder_of_pefts_with_patterns(tmp_path: Path) -> None:
    """Names, expressions and anchors for rank and alpha, rank-stabilised or not: the outputs of peft's own model."""
    for stabilised in (False, True):
        theirs = unet_twin("sd1")
        mine = ours(theirs)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_k", "conv1", "proj_in"],
            rank_pattern={"^down_blocks.*.to_q": 2, "mid_block.*|conv1": 3},
            alpha_pattern={"attn1.to_k$": 1, "^to_q|up_blocks.1.*conv1": 9, "proj.in": 2.5},
            use_rslora=stabilised,
            init_lora_weights=False,
        )
        model = get_peft_model(theirs, config)
        model.save_pretrained(str(tmp_path / "adapter"))
        full: Any = weights_convert.load(_pipeline_folder(tmp_path, theirs))
        adapter = read_lora(tmp_path / "adapter", full.config)
        assert {len(u.down) for u in adapter.updates.values()} == {2, 3, 4}
        lora.apply({"unet": mine}, [(adapter, 1.0)], live=True)
        x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, theirs.config.cross_attention_dim)
        with torch.no_grad():
            reference = model(x, torch.tensor(500), context).sample
            assert_close(mine(x, torch.tensor(500), context), reference, where=f"stabilised={stabilised}")


def _pipeline_folder(tmp_path: Path, unet: Any) -> Path:
    """Any folder whose model has a UNet of this config: for the names of its layers."""
    if not (tmp_path / "sd1").exists():
        folder_twin(tmp_path / "sd1")
    return tmp_path / "sd1"


def test_patterns_match_as_pefts_do() -> None:
    """Thousands of random expressions of what is read, against peft's own function."""
    rng = random.Random(0)
    names = [
        f"{block}.attentions.{i}.transformer_blocks.0.{layer}"
        for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1")
        for i in (0, 1)
        for layer in ("attn1.to_q", "attn2.to_q", "attn1.to_k", "ff.net.0.proj", "attn1.to_out.0")
    ] + ["conv_in", "to_q"]
    pieces = [*"abdot_.01", ".*", ".*", "to_q", "attn1", "attn1.to_q", "down_blocks", "0.attn", "net.0", "\\.", "up"]
    matched = 0
    for _ in range(4000):
        alternatives = [
            rng.choice(["", "", "^"]) + "".join(rng.choices(pieces, k=rng.randint(0, 4))) + rng.choice(["", "", "$"])
            for _ in range(rng.choice([1, 1, 2, 3]))
        ]
        expression = "|".join(alternatives)
        pattern = Pattern(expression, "test")
        for name in rng.sample(names, 5):
            wanted = get_pattern_key([expression], name) == expression
            matched += wanted
            assert pattern.ends(name) == wanted, f"{expression!r} on {name!r}"
    assert matched > 1000
    for beyond in ("a+", "a*", "a?", "(a)", "[ab]", "a{2}", r"\d", r"a\b", ".*?", "a^b", "a$b", "a\\"):
        with pytest.raises(UnsupportedError, match="is an expression that minidiff does not read"):
            Pattern(beyond, "test")


def test_settings_in_the_header_of_a_file(pair: tuple[Any, StableDiffusion], tmp_path: Path) -> None:
    """Written by diffusers with an expression in alpha_pattern, read by both."""
    theirs, mine = pair
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["to_q", "to_v"],
        alpha_pattern={"down_blocks.*.to_q": 2, "^mid_block.*": 9, "up_blocks.0": 1},
        init_lora_weights=False,
    )
    theirs.unet.add_adapter(config)
    tensors = {
        f"unet.{name.replace('.default', '')}": p.detach().clone() * 5
        for name, p in theirs.unet.named_parameters()
        if "lora_" in name
    }
    settings = {
        f"unet.{k}": sorted(v) if isinstance(v, set) else v
        for k, v in theirs.unet.peft_config["default"].to_dict().items()
    }
    theirs.unet.delete_adapters("default")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    theirs.load_lora_weights(tmp_path, adapter_name="a")
    theirs.fuse_lora()
    adapter = read_lora(tmp_path, mine.config)
    assert {u.alpha for u in adapter.updates.values()} == {2.0, 4.0, 9.0}
    lora.apply(mine.parts, [(adapter, 1.0)])
    assert_close(latents(mine), latents(theirs))
