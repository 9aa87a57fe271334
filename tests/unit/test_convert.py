"""Conversion of whole checkpoints, without the reference at hand: layouts, options, the account, the command."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights_convert
from minidiff import CheckpointError, ConfigError, NoiseSchedule, load
from minidiff.config import SD15, SD21, SDXL, Level, ModelConfig, ScheduleConfig, UNetConfig, from_json
from minidiff.pipeline import Pipeline, StableDiffusion, Unconditional
from minidiff.storage import checkpoint
from minidiff.storage.files import TensorFile, lazy
from tests.support import convert_sources as sources
from tests.support.tiny import DDPM, SD, tiny_ddpm, tiny_sd
from weights_convert import keys_diffusers, keys_original, shapes_original
from weights_convert.component import meta_model
from weights_convert.configs_diffusers import Options, unet
from weights_convert.engine import CONV1X1, SAME, expand, restore
from weights_convert.folder import rewrite
from weights_convert.module_names import module_names
from weights_convert.openclip import TRANSPOSED

ROOT = Path(__file__).resolve().parents[2]
PNDM = {"name": "pndm", "set_alpha_to_one": False, "steps_offset": 1, "runge_kutta": False}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    save_file(sources.original_tensors(), tmp_path / "original.safetensors")
    return tmp_path / "original.safetensors"


def assert_same_weights(ours: Pipeline, wanted: Pipeline) -> None:
    assert ours.parts.keys() == wanted.parts.keys()
    for name, part in wanted.parts.items():
        got = ours.parts[name].state_dict()
        assert got.keys() == part.state_dict().keys()
        for key, tensor in part.state_dict().items():
            assert torch.equal(got[key], tensor), f"{name}.{key}"


def comparable(config: ModelConfig) -> ModelConfig:
    return replace(config, family="", sampler={})


# ---- key maps


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "tests" / "fixtures").glob("keys_*.txt")))
def test_listings_show_the_maps(name: str) -> None:
    """What a reviewer reads is what the code does; `python scripts/make_key_listings.py` writes them anew."""
    listings = runpy.run_path(str(ROOT / "scripts" / "make_key_listings.py"))["listings"]()
    assert (ROOT / "tests" / "fixtures" / name).read_text(encoding="utf-8") == listings[name]
    assert set(listings) == {p.name for p in (ROOT / "tests" / "fixtures").glob("keys_*.txt")}


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "tests" / "fixtures").glob("keys_*.txt")))
def test_listings_are_bijections(name: str) -> None:
    lines = (ROOT / "tests" / "fixtures" / name).read_text(encoding="utf-8").splitlines()
    theirs, ours = zip(*(line.removesuffix("  (conv1x1)").split(" -> ") for line in lines), strict=True)
    assert len(set(theirs)) == len(set(ours)) == len(lines) > 100


def test_every_parameter_has_a_source_in_the_original_layout() -> None:
    model = meta_model(SD15)
    pairs = expand(keys_original.unet(SD15), model)
    assert {p.ours for p in pairs} == set(model.state_dict())
    # The averages' keys have no dots; still no two of them may fall together.
    assert len({keys_original.ema_key(p.theirs) for p in pairs}) == len(pairs)
    assert keys_original.ema_key("model.diffusion_model.out.0.bias") == "model_ema.diffusion_modelout0bias"


@pytest.mark.parametrize(("config", "head"), [(SD15, None), (SD21, 64), (SDXL, 64)], ids=["SD15", "SD21", "SDXL"])
def test_the_shapes_of_an_original_file_tell_its_unet(config: UNetConfig, head: int | None) -> None:
    model = meta_model(config)
    state = {name: lazy(t) for name, t in model.state_dict().items()}
    tensors = restore(expand(keys_original.unet(config), model), state)
    told = shapes_original.unet(tensors, "a file", head)
    rest = {"sample_size": config.sample_size, "upcast_attention": config.upcast_attention}  # no shape depends on them
    assert from_json(UNetConfig, json.dumps(told | rest)) == config


def test_every_layer_has_a_name_in_the_reference() -> None:
    sd = tiny_sd()
    names = module_names(sd.config)
    assert names.keys() == sd.parts.keys()
    for name, part in sd.parts.items():
        layers = {key for key, layer in part.named_modules() if list(layer.parameters(recurse=False))}
        assert layers <= names[name].keys()
    assert names["unet"]["conv_in"] == "conv_in"
    assert names["vae"]["encoder.mid.res2.norm1"] == "encoder.mid_block.resnets.1.norm1"


@pytest.mark.parametrize(
    ("form", "shape"), [(form, shape) for form in (SAME, CONV1X1) for shape in ((6, 6), (6,))] + [(TRANSPOSED, (6, 4))]
)
def test_forms_are_inverse(form: Any, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    stored = form.write(tensor)
    assert tuple(stored.shape) == form.stored(shape)
    assert torch.equal(form.read(stored), tensor)


# ---- layouts


def test_diffusers_folder(good: Path, tmp_path: Path) -> None:
    report = weights_convert.convert(good, tmp_path / "out.safetensors")
    sd = load(tmp_path / "out.safetensors", device="cpu")
    assert isinstance(sd, StableDiffusion)
    assert_same_weights(sd, tiny_sd())
    assert comparable(sd.config) == comparable(SD)
    assert {k: sd.config.sampler[k] for k in PNDM} == PNDM
    assert (report.layout, report.family, report.dropped) == ("diffusers", "sd1", [])
    assert report.mapped == {n: len(p.state_dict()) for n, p in tiny_sd().parts.items()}
    assert report.hash == sd.hash
    assert "because model_index.json names StableDiffusionPipeline" in str(report)
    assert f"written   {tmp_path / 'out.safetensors'}\nhash      {sd.hash}" in str(report)
    assert not {"written", "hash"} & {
        line.split(" ")[0] for line in str(weights_convert.open_source(good).report).split("\n")
    }


def test_original_single_file(original: Path, tmp_path: Path) -> None:
    report = weights_convert.convert(original, tmp_path / "out.safetensors", config=sources.OVERRIDE)
    sd = load(tmp_path / "out.safetensors", device="cpu")
    assert_same_weights(sd, tiny_sd())
    assert comparable(sd.config) == comparable(SD)
    assert {k: sd.config.sampler[k] for k in PNDM} == PNDM
    assert (report.layout, report.family) == ("original", "sd1")
    assert {name: n for name, n, _ in report.dropped} == {"noise schedule": 3, "position ids": 1}
    assert "follow the family's rule" in str(report)
    assert "OpenCLIP" not in str(report)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_ckpt(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    tensors = sources.original_tensors()
    found = {"state_dict": tensors, "global_step": 470000, "epoch": 3} if wrapped else tensors
    torch.save(found, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=zipped)
    report = weights_convert.convert(tmp_path / "sd.ckpt", tmp_path / "out.safetensors", config=sources.OVERRIDE)
    assert_same_weights(load(tmp_path / "out.safetensors", device="cpu"), tiny_sd())
    assert [d for d in report.dropped if d[0] == "training state"] == (
        [("training state", 2, "no tensors: global_step, epoch")] if wrapped else []
    )


def test_original_without_text_model_prefix(tmp_path: Path) -> None:
    tensors = {k.replace("transformer.text_model.", "transformer."): t for k, t in sources.original_tensors().items()}
    save_file(tensors, tmp_path / "sd.safetensors")
    sd = weights_convert.load(tmp_path / "sd.safetensors", device="cpu", config=sources.OVERRIDE)
    assert_same_weights(sd, tiny_sd())


def test_bare_ddpm_folder(tmp_path: Path) -> None:
    folder = sources.write_ddpm(tmp_path / "ddpm")
    heads = {"unet": {"levels": [{}, {"heads": 3}]}}  # the reference has one size of head for all levels; this does not
    report = weights_convert.convert(folder, tmp_path / "out.safetensors", config=heads)
    model = load(tmp_path / "out.safetensors", device="cpu")
    assert isinstance(model, Unconditional)
    assert_same_weights(model, tiny_ddpm())
    assert comparable(model.config) == comparable(DDPM)
    assert "no scheduler_config.json" in str(report)


def test_a_pipeline_of_ddim_samples_by_ddim_whatever_its_scheduler_was(tmp_path: Path) -> None:
    """As diffusers' DDIMPipeline does with the scheduler that it is given."""
    folder = sources.write_ddpm(tmp_path / "ddpm")
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_end": 0.03}))
    found = {}
    for pipeline in ("DDPMPipeline", "DDIMPipeline"):
        index = {"_class_name": pipeline, "unet": ["diffusers", "UNet2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        found[pipeline] = weights_convert.open_source(folder).config
    assert {name: c.sampler["name"] for name, c in found.items()} == {"DDPMPipeline": "ddpm", "DDIMPipeline": "ddim"}
    assert all(c.schedule.beta_end == 0.03 for c in found.values())


def test_sharded(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {k: names[i % 2] for i, k in enumerate(tensors)}
    for name in names:
        save_file({k: t for k, t in tensors.items() if where[k] == name}, folder / "unet" / name)
    sources.write_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": where})
    assert_same_weights(weights_convert.load(folder, device="cpu"), tiny_sd())


def test_load_is_convert_and_load(good: Path, tmp_path: Path) -> None:
    weights_convert.convert(good, tmp_path / "out.safetensors")
    direct, written = weights_convert.load(good, device="cpu"), load(tmp_path / "out.safetensors", device="cpu")
    assert direct.config == written.config
    assert_same_weights(direct, written)


def test_minidiff_file_to_another_dtype(good: Path, tmp_path: Path) -> None:
    weights_convert.convert(good, tmp_path / "a.safetensors")
    report = weights_convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="bfloat16")
    assert (report.layout, report.family) == ("minidiff", "sd1")
    assert {t.dtype for t in TensorFile(tmp_path / "b.safetensors").lazy.values()} == {torch.bfloat16}


# ---- options


def test_dtypes_are_kept_unless_asked(folder: Path, tmp_path: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: t.half() for k, t in load_file(file).items()}, file)
    weights_convert.convert(folder, tmp_path / "kept.safetensors")
    kept = TensorFile(tmp_path / "kept.safetensors").lazy
    assert {k.split(".")[0]: t.dtype for k, t in kept.items()} == {
        "unet": torch.float32,
        "vae": torch.float16,
        "text_encoder": torch.float32,
    }
    report = weights_convert.convert(folder, tmp_path / "half.safetensors", dtype=torch.float16)
    half = TensorFile(tmp_path / "half.safetensors").lazy
    assert {t.dtype for t in half.values()} == {torch.float16}
    key = "unet.conv_in.weight"
    assert torch.equal(half[key].load(), kept[key].load().half())
    assert "converted to float16" in str(report)


def ema_file(path: Path) -> dict[str, Tensor]:
    tensors = sources.original_tensors()
    averaged = {keys_original.ema_key(k): t + 1 for k, t in tensors.items() if k.startswith(keys_original.UNET)}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    save_file(tensors | averaged | counters, path)
    return tensors


def test_ema_weights_are_picked_when_asked(tmp_path: Path) -> None:
    ema_file(tmp_path / "sd.safetensors")
    plain = weights_convert.open_source(tmp_path / "sd.safetensors", config=sources.OVERRIDE)
    averaged = weights_convert.open_source(tmp_path / "sd.safetensors", ema=True, config=sources.OVERRIDE)
    wanted = tiny_sd().unet.state_dict()
    for key, tensor in wanted.items():
        assert torch.equal(plain.tensors[f"unet.{key}"].load(), tensor)
        assert torch.equal(averaged.tensors[f"unet.{key}"].load(), tensor + 1)
    assert "EMA weights are there too" in str(plain.report)
    assert "the EMA weights, as requested" in str(averaged.report)
    counts = {name: n for name, n, _ in averaged.report.dropped}
    assert (counts["last training step"], counts["EMA settings"]) == (len(wanted), 2)
    assert {name: n for name, n, _ in plain.report.dropped}["EMA weights"] == len(wanted) + 2


def test_config_as_a_file(original: Path, tmp_path: Path) -> None:
    override = sources.OVERRIDE | {"schedule": {"prediction": "v_prediction"}}
    sources.write_json(tmp_path / "fix.json", override)
    found = weights_convert.open_source(original, config=tmp_path / "fix.json").config
    assert found.schedule == replace(SD.schedule, prediction="v_prediction")


def test_config_corrects_a_folder_too(good: Path) -> None:
    found = weights_convert.open_source(good, config={"unet": {"mid": {"heads": 1}}, "sampler": {"name": "ddim"}})
    assert found.config.unet.mid.heads == 1
    assert found.config.unet.levels == SD.unet.levels
    assert found.config.sampler == {"name": "ddim"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"unets": {}}, "unknown field 'unets'"),
        ({"unet": {"head": 3}}, "unknown field 'head'"),
        ({"unet": {"groups": 7}}, "groups=7"),
        (sources.OVERRIDE | {"vae": None}, "a model with a text encoder needs a VAE"),
        (sources.OVERRIDE | {"text_encoder": None, "tokenizer": None}, "text_encoder, and one of them is null"),
        ("missing.json", r"missing\.json"),
    ],
)
def test_config_that_does_not_fit(original: Path, config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        weights_convert.open_source(original, config=config)


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        ({"_class_name": "PNDMScheduler", "steps_offset": 1}, {}),
        ({"_class_name": "PNDMScheduler"}, {"steps_offset": 1}),
        ({"_class_name": "DDIMScheduler", "steps_offset": 1}, {"clip_sample": False}),
        (
            {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True},
            {"steps_offset": 1, "clip_sample": False},
        ),
        ({"_class_name": "EulerDiscreteScheduler", "steps_offset": 1, "clip_sample": False}, {}),
    ],
)
def test_outdated_schedulers_are_rewritten(found: dict[str, Any], changes: dict[str, Any]) -> None:
    assert rewrite(found) == changes


def test_a_rewritten_scheduler_is_told(folder: Path) -> None:
    old = {k: v for k, v in sources.SCHEDULER_JSON.items() if k != "steps_offset"}
    sources.write_json(folder / "scheduler" / "scheduler_config.json", old)
    found = weights_convert.open_source(folder)
    assert found.config.sampler["steps_offset"] == 1
    assert "steps_offset was absent, set to 1" in str(found.report)


def test_content_filter_is_dropped_by_name(folder: Path) -> None:
    index = sources.INDEX | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    }
    sources.write_json(folder / "model_index.json", index)
    dropped = weights_convert.open_source(folder).report.dropped
    assert [name for name, _, _ in dropped] == ["safety_checker", "feature_extractor"]


def test_a_junk_option_is_mentioned(folder: Path) -> None:
    sources.write_json(folder / "unet" / "config.json", sources.UNET_JSON | {"sparkle": 3})
    assert "sparkle is not an option of UNet2DConditionModel" in str(weights_convert.open_source(folder).report)


def test_opening_reads_no_tensor(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: TensorFile, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFile, "_load", read)
    weights_convert.open_source(good)


def test_detect(good: Path, original: Path, tmp_path: Path) -> None:
    weights_convert.convert(good, tmp_path / "out.safetensors")
    paths = {
        good: ("diffusers", "sd1"),
        original: ("original", "sd1"),
        tmp_path / "out.safetensors": ("minidiff", "minidiff"),
    }
    for path, (layout, family) in paths.items():
        found = weights_convert.detect(path)
        assert (found.layout, found.family) == (layout, family)
        assert "because" in str(found)


SIZES, FINE, COARSE = "label_emb.0.0.weight", "input_blocks.1.1.proj_in.weight", "input_blocks.2.1.proj_in.weight"


@pytest.mark.parametrize(
    ("family", "channels", "keys"),
    [
        ("sd1", 4, {"cond_stage_model.transformer.a": 1}),
        ("sd1-inpainting", 9, {"cond_stage_model.transformer.a": 1}),
        ("sd1 with 8 channels", 8, {"cond_stage_model.transformer.a": 1}),
        ("sd2", 4, {"cond_stage_model.model.a": 1}),
        ("sd2", 4, {"conditioner.embedders.0.model.a": 1}),  # SD-Turbo
        ("sdxl-refiner", 4, {"conditioner.embedders.0.model.a": 1, SIZES: 2}),
        ("sdxl", 4, {"conditioner.embedders.0.transformer.a": 1, "conditioner.embedders.1.model.a": 1, SIZES: 2}),
        ("sd1", 4, {FINE: 4}),
        ("sd2", 4, {FINE: 2}),
        ("sdxl", 4, {FINE: 2, COARSE: 2, SIZES: 2}),
        ("sdxl-refiner", 4, {FINE: 2, "input_blocks.2.0.op.weight": 4, SIZES: 2}),
    ],
)
def test_the_family_of_a_single_file_is_told_from_its_keys(
    family: str, channels: int, keys: dict[str, int], tmp_path: Path
) -> None:
    """Its text encoders, by name, or without any what its UNet reads; ``keys``: name -> rank."""
    tensors = {"input_blocks.0.0.weight": torch.zeros(1, channels, 1, 1)}
    tensors |= {name: torch.zeros([1] * rank) for name, rank in keys.items()}
    own = ("input_blocks", "label_emb")
    tensors = {f"model.diffusion_model.{k}" if k.startswith(own) else k: t for k, t in tensors.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    found = weights_convert.detect(tmp_path / "one.safetensors")
    assert (found.layout, found.family) == ("original", family)


# ---- the command


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weights_convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_command(good: Path, tmp_path: Path) -> None:
    done = run(good, tmp_path / "out.safetensors", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "family    sd1" in done.stdout
    assert checkpoint.open_checkpoint(tmp_path / "out.safetensors").config.unet == SD.unet


def test_command_ends_a_mistake_in_one_line(tmp_path: Path) -> None:
    failed = run(tmp_path / "nothing", tmp_path / "out.safetensors")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert "no such file or folder" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_middle_of_an_unconditional_unet_is_as_wide_as_the_last_level() -> None:
    three = {
        "block_out_channels": [16, 24, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
    }
    found = unet(Options(sources.DDPM_JSON | three, "config.json"))
    assert [level.channels for level in found.levels] == [16, 24, 32]
    assert found.levels[1] == Level(channels=24, attention="self", heads=3)
    assert found.mid == Level(channels=32, attention="self", heads=4)
    without = unet(Options(sources.DDPM_JSON | three | {"add_attention": False}, "config.json"))
    assert without.mid == Level(channels=32)
    assert without.levels == found.levels
    unsaid = {key: value for key, value in sources.DDPM_JSON.items() if key != "add_attention"}
    assert unet(Options(unsaid | three, "config.json")) == found


def test_old_and_new_names_of_ddpm_attention() -> None:
    model = meta_model(DDPM.unet)
    new = {p.theirs for p in expand(keys_diffusers.unet(DDPM.unet), model)}
    old = {p.theirs for p in expand(keys_diffusers.unet(DDPM.unet, old_names=True), model)}
    assert "mid_block.attentions.0.to_out.0.weight" in new - old
    assert "mid_block.attentions.0.proj_attn.weight" in old - new


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_noise_table_in_the_file_must_be_the_schedules(tmp_path: Path, dtype: torch.dtype) -> None:
    def table(**options: Any) -> Tensor:
        return NoiseSchedule.from_config(ScheduleConfig(**options)).alphas_cumprod.to(dtype)

    tensors = sources.original_tensors()
    save_file(tensors | {"alphas_cumprod": table()}, tmp_path / "plain.safetensors")
    weights_convert.open_source(tmp_path / "plain.safetensors", config=sources.OVERRIDE)
    save_file(tensors | {"alphas_cumprod": table(zero_snr=True)}, tmp_path / "zero.safetensors")
    with pytest.raises(CheckpointError, match=r"zero\.safetensors: its noise table .* differs .*zero_snr"):
        weights_convert.open_source(tmp_path / "zero.safetensors", config=sources.OVERRIDE)
    right = {**sources.OVERRIDE, "schedule": {"zero_snr": True}}
    assert weights_convert.open_source(tmp_path / "zero.safetensors", config=right).config.schedule.zero_snr
    save_file(tensors | {"alphas_cumprod": table()[:500].clone()}, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="noise table"):
        weights_convert.open_source(tmp_path / "short.safetensors", config=sources.OVERRIDE)
