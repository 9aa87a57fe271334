"""Adapters against diffusers with peft: the same file, fused and live, one and two at once, the same latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import weights_convert
from minidiff import lora
from minidiff.pipeline import StableDiffusion
from tests.parity.twins import folder_twin
from tests.tolerances import assert_close
from weights_convert import read_lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv")
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


def latents(pipeline: Any, **options: Any) -> Tensor:
    if isinstance(pipeline, StableDiffusion):
        g = torch.Generator().manual_seed(1)
        found: Tensor = pipeline.generate("a red fox", steps=3, generator=g, output="latent", progress=False)
        return found
    return pipeline(
        "a red fox", num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images


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
