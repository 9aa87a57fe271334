"""Conversion of damaged and unsupported checkpoints: the right class of error, one clear line, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights_convert
from minidiff import CheckpointError, ConfigError, MinidiffError, UnsupportedError
from tests.support import convert_sources as sources


def fails(src: Path, error: type[MinidiffError], *words: str, **options: Any) -> None:
    """Converting ``src`` raises ``error``, in one line with all ``words``, and writes nothing."""
    out = src.parent / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(error) as caught:
        weights_convert.convert(src, out / "model.safetensors", **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert list(out.iterdir()) == []


def change_json(path: Path, **options: Any) -> None:
    sources.write_json(path, json.loads(path.read_text(encoding="utf-8")) | options)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"

# ---- files


def test_missing_file(tmp_path: Path) -> None:
    fails(tmp_path / "nothing.safetensors", CheckpointError, "nothing.safetensors", "no such file or folder")


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").touch()
    fails(tmp_path / "holiday", CheckpointError, "beach.jpg", "no model_index.json")


def test_single_component(folder: Path) -> None:
    fails(folder / "vae", CheckpointError, "single component", "AutoencoderKL")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    fails(folder, CheckpointError, str(folder))


def test_missing_weights(folder: Path) -> None:
    (folder / UNET_FILE).unlink()
    fails(folder, CheckpointError, "no weights", "diffusion_pytorch_model.safetensors")


def test_missing_shard(folder: Path) -> None:
    (folder / UNET_FILE).unlink()
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    sources.write_json(folder / f"{UNET_FILE}.index.json", {"weight_map": {"conv_in.weight": shard}})
    fails(folder, CheckpointError, shard, "no such file")


@pytest.mark.parametrize("place", ["../../elsewhere.safetensors", "/etc/passwd"])
def test_shard_in_another_folder(folder: Path, place: str) -> None:
    (folder / UNET_FILE).unlink()
    sources.write_json(folder / f"{UNET_FILE}.index.json", {"weight_map": {"conv_in.weight": place}})
    fails(folder, CheckpointError, "another folder")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b"", b"[" * 100_000], ids=range(5))
def test_damaged_json(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    fails(folder, CheckpointError, name)


def test_truncated_safetensors(folder: Path) -> None:
    data = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(data[: len(data) // 2])
    fails(folder, CheckpointError, "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[10],"data_offsets":[0,4000000]}}',
        b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,40]}}',
        b'{"a":{"dtype":"F99","shape":[10],"data_offsets":[0,40]}}',
        b"not json",
    ],
    ids=["offsets", "shape", "dtype", "json"],
)
def test_header_that_lies(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "lies.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40))
    fails(path, CheckpointError, "lies.safetensors")


def test_header_of_absurd_length(tmp_path: Path) -> None:
    (tmp_path / "long.safetensors").write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    fails(tmp_path / "long.safetensors", CheckpointError, "long.safetensors")


# ---- families


def test_unknown_family(tmp_path: Path) -> None:
    save_file({"language_model.layers.0.weight": torch.zeros(2)}, tmp_path / "llm.safetensors")
    fails(tmp_path / "llm.safetensors", CheckpointError, "unknown family", "language_model.layers.0.weight")


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"]
)
def test_flow_model_as_a_single_file(tmp_path: Path, key: str) -> None:
    save_file({key: torch.zeros(2)}, tmp_path / "flow.safetensors")
    fails(tmp_path / "flow.safetensors", UnsupportedError, "flow model")


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "SomethingNewPipeline"])
def test_flow_model_as_a_folder(folder: Path, name: str) -> None:
    index = {"_class_name": name, "transformer": ["diffusers", "FluxTransformer2DModel"]}
    sources.write_json(folder / "model_index.json", index)
    fails(folder, UnsupportedError, "flow model", name)


def test_flow_scheduler(folder: Path) -> None:
    change_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    fails(folder, UnsupportedError, "FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_sdxl_without_its_second_encoder(folder: Path, name: str) -> None:
    change_json(folder / "model_index.json", _class_name=name)
    fails(folder, CheckpointError, "config.json", "no such file")


def test_other_pipelines(folder: Path) -> None:
    change_json(folder / "model_index.json", _class_name="AudioLDMPipeline")
    fails(folder, UnsupportedError, "AudioLDMPipeline")


def test_channels_that_the_tensors_do_not_have(folder: Path) -> None:
    change_json(folder / "unet/config.json", in_channels=9)
    fails(folder, CheckpointError, "conv_in.weight", "shape")


def test_a_unet_that_reads_a_second_picture(folder: Path) -> None:
    change_json(folder / "unet/config.json", in_channels=8)
    fails(folder, UnsupportedError, "family sd1 with 8 channels")


@pytest.mark.parametrize(
    "key",
    [
        "conditioner.embedders.1.model.ln_final.weight",
        "conditioner.embedders.0.model.ln_final.weight",
        "cond_stage_model.model.ln_final.weight",
    ],
)
def test_single_files_of_nothing_but_a_clue(tmp_path: Path, key: str) -> None:
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    save_file({key: torch.zeros(2), **unet}, tmp_path / "other.safetensors")
    fails(tmp_path / "other.safetensors", CheckpointError, "missing", prediction="epsilon")


# ---- options that minidiff's models do not have


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("unet", {"class_embed_type": "timestep"}),
        ("unet", {"dual_cross_attention": True}),
        ("unet", {"only_cross_attention": [True, False]}),
        ("unet", {"encoder_hid_dim_type": "text_proj"}),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}),
        ("unet", {"time_embedding_type": "fourier"}),
        ("unet", {"act_fn": "mish"}),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
        ("unet", {"conv_in_kernel": 1}),
        ("unet", {"attention_type": "gated"}),
        ("unet", {"resnet_out_scale_factor": 0.7}),
        ("unet", {"time_embedding_dim": 99}),
        ("unet", {"addition_embed_type": "image"}),
        ("unet", {"cross_attention_dim": [16, 32]}),
        ("unet", {"layers_per_block": [1, 2]}),
        ("unet", {"down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D"]}),
        ("unet", {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}),
        ("unet", {"downsample_padding": 2}),
        ("unet", {"class_embed_type": []}),
        ("unet", {"num_class_embeds": 10}),
        ("unet", {"only_cross_attention": [False, True]}),
        ("unet", {"quantization_config": {"load_in_8bit": True}}),
        ("vae", {"quantization_config": {"load_in_8bit": True}}),
        ("vae", {"latents_std": []}),
        ("vae", {"shift_factor": 0.1}),
        ("vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}),
        ("vae", {"act_fn": "relu"}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]}),
        ("text_encoder", {"hidden_act": "gelu_new"}),
    ],
    ids=str,
)
def test_option_that_is_not_honoured(folder: Path, part: str, options: dict[str, Any]) -> None:
    change_json(folder / part / "config.json", **options)
    fails(folder, UnsupportedError, f"{part}/config.json", "not supported")


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("unet", {"block_out_channels": []}),
        ("unet", {"block_out_channels": "wide"}),
        ("unet", {"block_out_channels": [16, 10**12]}),
        ("unet", {"attention_head_dim": [2, 3, 4]}),
        ("unet", {"attention_head_dim": [5, 3]}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"norm_num_groups": None}),
        ("unet", {"in_channels": "4"}),
        ("unet", {"down_block_types": [["CrossAttnDownBlock2D"], "DownBlock2D"]}),
        ("unet", {"down_block_types": None}),
        ("unet", {"layers_per_block": -1}),
        ("vae", {"block_out_channels": 8}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"scaling_factor": "0.18215"}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"num_attention_heads": 3}),
        ("text_encoder", {"hidden_size": None}),
    ],
    ids=str,
)
def test_config_that_makes_no_sense(folder: Path, part: str, options: dict[str, Any]) -> None:
    change_json(folder / part / "config.json", **options)
    fails(folder, CheckpointError, f"{part}/config.json")


def test_parts_of_different_models(folder: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if "attn2.to_k" in k or "attn2.to_v" in k]:
            tensors[key] = torch.zeros(len(tensors[key]), 20)

    change_json(folder / "unet/config.json", cross_attention_dim=20)
    change_tensors(folder / UNET_FILE, widen)
    fails(folder, CheckpointError, "different models", "context_dim=20", "width=16")


# ---- tensors


def test_missing_tensor(folder: Path) -> None:
    change_tensors(folder / UNET_FILE, lambda t: t.pop("conv_out.bias"))
    fails(folder, CheckpointError, "'conv_out.bias' is missing")


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    names = ["conv_out.weight", "conv_out.bias", "conv_norm_out.weight", "conv_norm_out.bias", "conv_in.bias"]
    change_tensors(folder / UNET_FILE, lambda t: [t.pop(name) for name in names])
    with pytest.raises(CheckpointError, match=r"tensors ('[\w.]+', ){2}'[\w.]+' and 2 more are missing"):
        weights_convert.open_source(folder)


@pytest.mark.parametrize("name", ["conv_out.extra", "down_blocks.1.resnets.0.extra", "made_up.0.weight"])
def test_extra_tensor(folder: Path, name: str) -> None:
    """Also in the last layer of a list, and in a list that the model does not have."""
    change_tensors(folder / UNET_FILE, lambda t: t.update({name: torch.zeros(2)}))
    fails(folder, CheckpointError, f"'{name}' is unknown")


def test_misshapen_tensor(folder: Path) -> None:
    change_tensors(folder / UNET_FILE, lambda t: t.update({"conv_out.bias": torch.zeros(5)}))
    fails(folder, CheckpointError, "'conv_out.bias' has shape [5], [4] was expected")


def test_quantised_tensor(folder: Path) -> None:
    change_tensors(folder / UNET_FILE, lambda t: t.update({"conv_out.bias": torch.zeros(4, dtype=torch.int8)}))
    fails(folder, CheckpointError, "'conv_out.bias'", "torch.int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(folder: Path, value: float) -> None:
    change_tensors(folder / UNET_FILE, lambda t: t["conv_out.bias"].fill_(value))
    fails(folder, CheckpointError, "4 of 4 values of 'unet.conv_out.bias' are NaN or infinite")


def test_value_beyond_the_dtype(folder: Path) -> None:
    change_tensors(folder / UNET_FILE, lambda t: t["conv_out.bias"].fill_(1e5))
    fails(folder, CheckpointError, "'unet.conv_out.bias' reaches 100000", dtype="float16")


def original(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = sources.original_tensors()
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "'model.diffusion_model.out.2.bias' is missing"),
        (lambda t: t.pop("first_stage_model.encoder.conv_in.weight"), "encoder.conv_in.weight' is missing"),
        (lambda t: t.update({"control.weight": torch.zeros(2)}), "'control.weight' is unknown"),
        (lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(9)}), "has shape [9], [4] was expected"),
        (lambda t: t.update({"model.diffusion_model.out.2.weight": torch.zeros(9)}), "4 dimensions expected"),
        (lambda t: t["first_stage_model.quant_conv.bias"].fill_(float("nan")), "'vae.quant.bias' are NaN"),
    ],
    ids=range(6),
)
def test_damaged_original(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    path = original(tmp_path / "sd.safetensors", change)
    fails(path, CheckpointError, words, config=sources.OVERRIDE)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "cond_stage_model.transformer.text_model.encoder."])
def test_original_without_a_part(tmp_path: Path, prefix: str) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if k.startswith(prefix)]:
            del tensors[key]

    fails(original(tmp_path / "sd.safetensors", strip), CheckpointError, "missing", config=sources.OVERRIDE)


def test_relative_that_the_rule_does_not_fit(tmp_path: Path) -> None:
    path = original(tmp_path / "sd.safetensors", lambda t: None)
    fails(path, CheckpointError, "groups=32", "config= says what shapes can't tell")


def test_ema_where_there_is_none(tmp_path: Path, folder: Path) -> None:
    path = original(tmp_path / "sd.safetensors", lambda t: None)
    fails(path, CheckpointError, "no EMA weights", ema=True, config=sources.OVERRIDE)
    fails(folder, CheckpointError, "--ema", ema=True)


# ---- the target


def test_unknown_layout_and_dtype(folder: Path) -> None:
    fails(folder, ConfigError, "to='webui' is none of", to="webui")
    fails(folder, ConfigError, "to='Diffusers' is none of", to="Diffusers")
    fails(folder, ConfigError, "dtype='float7' is none of", dtype="float7")


def test_failure_leaves_an_older_file_alone(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder / UNET_FILE, lambda t: t["conv_out.bias"].fill_(float("nan")))
    (tmp_path / "old.safetensors").write_bytes(b"old")
    with pytest.raises(CheckpointError):
        weights_convert.convert(folder, tmp_path / "old.safetensors")
    assert (tmp_path / "old.safetensors").read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"old.safetensors", "source"}


def test_target_in_a_folder_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        weights_convert.convert(folder, tmp_path / "missing" / "out.safetensors")


def test_source_as_target(tmp_path: Path) -> None:
    path = original(tmp_path / "sd.safetensors", lambda t: None)
    with pytest.raises(ConfigError, match="own source"):
        weights_convert.convert(path, path, config=sources.OVERRIDE)
