"""ControlNets and T2I-Adapters against the reference, network by network, and their layouts by way of the converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
import weights_convert
from minidiff import ControlModel
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from tests.support.parity import twins
from tests.support.parity.controls import controlnet_twin, original, original_t2i, t2i_twin
from tests.tolerances import assert_close

SMALL = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}  # as SDXL's smallest ControlNet


def inputs(reference: Any, batch: int, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same call of either side."""
    g = torch.Generator().manual_seed(batch)
    c = reference.config
    x = torch.randn(batch, c.in_channels, *size, generator=g)
    context = torch.randn(batch, 77, c.cross_attention_dim, generator=g)
    ours: dict[str, Any] = {"x": x, "t": torch.tensor(7), "context": context}
    theirs = {"sample": x, "timestep": torch.tensor(7), "encoder_hidden_states": context}
    if getattr(c, "addition_embed_type", None):
        pooled, ids = torch.randn(batch, 24, generator=g), torch.randn(batch, 6, generator=g)
        ours["added"] = pooled, ids
        theirs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return ours, theirs


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd1", {}),
        ("sd2", {"controlnet_conditioning_channel_order": "bgr"}),
        ("sdxl", {}),
        ("sdxl", SMALL),
        ("sd1", {"conditioning_channels": 1, "layers_per_block": 1}),
    ],
    ids=["sd1", "sd2 bgr", "sdxl", "sdxl small", "grey"],
)
@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (3, (7, 10))], ids=str)
@torch.no_grad()
def test_residuals(kind: str, options: dict[str, Any], batch: int, size: tuple[int, int]) -> None:
    reference = controlnet_twin(kind, **options)
    net = twins.ours(reference)
    ours, theirs = inputs(reference, batch, size)
    picture = torch.rand(batch, net.config.image_channels, 4 * size[0], 4 * size[1])
    want, want_mid = reference(**theirs, controlnet_cond=picture, return_dict=False)
    found, mid = net(**ours, hint=net.hint(picture))
    assert len(found) == len(want)
    for a, b in zip([*found, mid], [*want, want_mid], strict=True):
        assert_close(a, b)
    assert mid.std() > 0.05


@pytest.mark.parametrize("kind", ["full", "light", "xl"])
@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (2, (10, 12))], ids=str)
@torch.no_grad()
def test_features_of_an_adapter_in_a_unet(kind: str, batch: int, size: tuple[int, int]) -> None:
    widths = {"block_out_channels": (32, 48, 48)} if kind == "light" else {}  # whose last two are of one width
    reference, unet = t2i_twin(kind), twins.unet_twin("sdxl" if kind == "xl" else "sd1", **widths)
    adapter, net = twins.ours(reference), twins.ours(unet)
    picture = torch.rand(batch, 3, 4 * size[0], 4 * size[1])
    want, found = reference(picture), adapter(picture)
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert_close(a, b)
        assert a.std() > 0.05
    ours, theirs = inputs(unet, batch, size)
    plain = net(**ours)
    steered = net(**ours, features=found)
    assert_close(steered, unet(**theirs, down_intrablock_additional_residuals=[f.clone() for f in want]).sample)
    for k in range(len(found)):
        changed = [f + (i == k) for i, f in enumerate(found)]
        assert not torch.equal(net(**ours, features=changed), steered), f"feature {k} counts"
    assert not torch.equal(plain, steered)


def weights(path: Path, **options: Any) -> dict[str, Tensor]:
    found = weights_convert.load(path, "cpu", **options)
    assert isinstance(found, ControlModel)
    return dict(found.net.state_dict())


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(found[key], tensor), key


def told(kind: str) -> dict[str, Any]:
    """What shapes cannot tell of the twins, whose groups and heads are not those of the public models."""
    heads = {"sd1": (4, 4, 4), "sd2": (2, 4, 8), "sdxl": (2, 4, 8)}[kind]
    attends = (kind != "sdxl", True, kind == "sdxl")
    levels = [{"heads": n} if on else {} for n, on in zip(heads, attends, strict=True)]
    added = {"added_sinusoid": 8} if kind == "sdxl" else {}
    return {"control": {"groups": 8, "levels": levels, "mid": {"heads": heads[-1]}, **added}}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_layouts_of_a_controlnet(kind: str, tmp_path: Path) -> None:
    """Folder, bare file, the author's file (with and without prefix, as a pickle, beside a model): one control. And
    back, bit for bit."""
    reference = controlnet_twin(kind)
    reference.save_pretrained(str(tmp_path / "folder"))
    want = dict(twins.ours(reference).state_dict())
    save_file(reference.state_dict(), tmp_path / "bare.safetensors")
    save_file(original(reference), tmp_path / "original.safetensors")
    torch.save(original(reference, ""), tmp_path / "bare.pth")
    torch.save(
        {"state_dict": {**original(reference), "model.diffusion_model.out.2.bias": torch.ones(4)}}, tmp_path / "m.ckpt"
    )
    same(weights(tmp_path / "folder"), want)
    for name in ("bare.safetensors", "original.safetensors", "bare.pth", "m.ckpt"):
        same(weights(tmp_path / name, config=told(kind)), want)
    report = weights_convert.convert(tmp_path / "original.safetensors", tmp_path / "own.safetensors", config=told(kind))
    assert report.family == f"{kind}-controlnet"
    own = minidiff.load(tmp_path / "own.safetensors", "cpu")
    folder = weights_convert.load(tmp_path / "folder", "cpu")
    assert isinstance(own, ControlModel)
    assert own.config == folder.config
    assert own.identity == folder.identity
    for to, name in (("diffusers", "again"), ("original", "again.safetensors")):
        weights_convert.convert(tmp_path / "own.safetensors", tmp_path / name, to=to)
    same(load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors"), dict(reference.state_dict()))
    same(load_file(tmp_path / "again.safetensors"), original(reference))
    theirs = type(reference).from_pretrained(str(tmp_path / "again"))
    assert same_config(theirs.config, reference.config)
    read = convert_controlnet_checkpoint(load_file(tmp_path / "again.safetensors"), reference.config)
    if kind != "sdxl":  # whose second embedding that reader does not know; nor does it a hint of other depth than SD's
        known = {key: t for key, t in reference.state_dict().items() if "cond_embedding" not in key}
        same({key: t for key, t in read.items() if "cond_embedding" not in key}, known)


def same_config(one: Any, other: Any) -> bool:
    """Equal options but for tuples as lists, and numbers of heads that no attention reads."""
    plain = [{k: list(v) if isinstance(v, (list, tuple)) else v for k, v in c.items()} for c in (one, other)]
    odd = {k for k in plain[0].keys() | plain[1].keys() if k[0] != "_" and plain[0].get(k) != plain[1].get(k)}
    return odd <= {"attention_head_dim", "transformer_layers_per_block"}


@pytest.mark.parametrize("kind", ["full", "light", "xl"])
def test_layouts_of_a_t2i_adapter(kind: str, tmp_path: Path) -> None:
    reference = t2i_twin(kind)
    reference.save_pretrained(str(tmp_path / "folder"))
    want = dict(twins.ours(reference).state_dict())
    save_file(reference.state_dict(), tmp_path / "bare.safetensors")
    torch.save(original_t2i(reference), tmp_path / "original.pth")
    same(weights(tmp_path / "folder"), want)
    options = {"config": {"control": {"kind": "xl"}}} if kind == "xl" else {}
    for name in ("bare.safetensors", "original.pth"):
        same(weights(tmp_path / name, **options), want)
    report = weights_convert.convert(tmp_path / "original.pth", tmp_path / "own.safetensors", **options)
    assert report.family == f"{'sdxl' if kind == 'xl' else 'sd1'}-t2i-adapter"
    for to, name in (("diffusers", "again"), ("original", "again.safetensors")):
        weights_convert.convert(tmp_path / "own.safetensors", tmp_path / name, to=to)
    same(load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors"), dict(reference.state_dict()))
    same(load_file(tmp_path / "again.safetensors"), original_t2i(reference))
    theirs = type(reference).from_pretrained(str(tmp_path / "again"))
    assert same_config(theirs.config, reference.config)


def test_what_is_refused(tmp_path: Path) -> None:
    save_file(original(controlnet_twin()), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a controlnet, which steers a model and is none"):
        weights_convert.open_source(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="ema is given, which is for models; this is a controlnet"):
        weights_convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", ema=True)
    tensors = original(controlnet_twin())
    save_file({**tensors, "control_model.task_embedding": torch.ones(3)}, tmp_path / "union.safetensors")
    with pytest.raises(CheckpointError, match=r"'control_model\.task_embedding' is unknown"):
        weights_convert.load(tmp_path / "union.safetensors", config=told("sd1"))
    del tensors["control_model.zero_convs.1.0.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"'control_model\.zero_convs\.1\.0\.bias' is missing"):
        weights_convert.load(tmp_path / "cut.safetensors", config=told("sd1"))
    save_file({"lora_controlnet": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UnsupportedError, match="a Control-LoRA"):
        weights_convert.load(tmp_path / "lora.safetensors")
