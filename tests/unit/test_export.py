"""Export to the layouts of diffusers and of the original code, and its errors, without the reference installed."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weights_convert
from minidiff import CheckpointError, ConfigError, MinidiffError, UnsupportedError, cli
from minidiff.config import (
    CLIP_L,
    OPENCLIP_BIGG,
    SD15,
    SD21,
    SDXL,
    VAE_SD,
    VAE_SDXL,
    Level,
    ModelConfig,
    ScheduleConfig,
    TokenizerConfig,
    UNetConfig,
    text,
)
from minidiff.models.tokenizer_files import tokenizer_config
from minidiff.models.tokenizer_out import tokenizer_files
from minidiff.pipeline import random_model
from minidiff.storage import checkpoint
from minidiff.storage.files import TensorFile, lazy, write_tensors
from minidiff.storage.writing import PART, atomic_folder
from tests.support import convert_sources as sources
from tests.support.tiny import DDPM, SD, redraw, tiny_sd
from weights_convert.configs_out import config_json
from weights_convert.engine import Form, Pair, restore, translate
from weights_convert.export_folder import shard_size, write_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text-to-image model as a minidiff file."""
    sd = tiny_sd()
    found = weights_convert.open_source(sources.write_folder(tmp_path_factory.mktemp("folder")))
    sd.config = replace(SD, family="sd1", sampler=found.config.sampler)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    sd.save(path)
    return path


def save(config: ModelConfig, path: Path) -> Path:
    """A model of that config with random weights, as a minidiff file."""
    made = random_model(config)
    for part in made.parts.values():
        redraw(part)
    made.save(path)
    return path


# ---- the trip


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_there_and_back_is_the_same_file(model: Path, tmp_path: Path, to: str) -> None:
    """Tensors and config: one model gives one file, byte for byte, whichever way it came."""
    report = weights_convert.convert(model, tmp_path / "out.safetensors", to=to)
    assert report.target == str(tmp_path / "out.safetensors")
    back = weights_convert.convert(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    assert back.layout == to
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


def test_original_to_original_through_both_layouts(tmp_path: Path) -> None:
    """LDM -> minidiff -> diffusers -> minidiff -> LDM: every tensor of the model as it was, and the same names."""
    tensors = sources.original_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    weights_convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", config=sources.OVERRIDE)
    weights_convert.convert(tmp_path / "b.safetensors", tmp_path / "c", to="diffusers")
    weights_convert.convert(tmp_path / "c", tmp_path / "d.safetensors")
    weights_convert.convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", to="original")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    back = load_file(tmp_path / "e.safetensors")
    tables = {"betas", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2"}  # follow from the schedule
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"  # 0, 1, 2, ...
    assert back.keys() == tensors.keys() - tables - {ids}
    for key, tensor in back.items():
        assert torch.equal(tensor, tensors[key]), key


def test_ddpm_makes_the_trip(tmp_path: Path) -> None:
    unet = replace(DDPM.unet, mid=replace(DDPM.unet.mid, heads=3))  # one size of head, as the reference's class has it
    path = save(
        replace(DDPM, family="ddpm", unet=unet, sampler={"name": "ddpm", "like_diffusers": True}), tmp_path / "a"
    )
    weights_convert.convert(path, tmp_path / "out", to="diffusers")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    found, wanted = weights_convert.open_source(tmp_path / "out"), checkpoint.open_checkpoint(path)
    assert (found.config.unet, found.config.schedule) == (wanted.config.unet, wanted.config.schedule)
    for name, tensor in wanted.file.lazy.items():
        assert torch.equal(found.tensors[name].load(), tensor.load()), name


def test_what_a_folder_holds(model: Path, tmp_path: Path) -> None:
    weights_convert.convert(model, tmp_path / "out", to="diffusers")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert [f.replace(os.sep, "/") for f in files] == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text()) == {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == {**sources.INDEX, "_diffusers_version": "0.42.1", "requires_safety_checker": False}
    wanted = {k: v for k, v in sources.UNET_JSON.items() if not k.startswith("_diffusers")}
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text()).items() >= wanted.items()
    assert TensorFile(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").metadata["format"] == "pt"


def test_the_published_configs_are_written_as_they_were_published() -> None:
    """The options that tell the families apart, as the folders on the hub have them."""
    assert config_json(SD15).items() >= {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}.items()
    assert config_json(SD21)["attention_head_dim"] == [5, 10, 20, 20]
    xl = config_json(SDXL)
    assert xl["attention_head_dim"] == [5, 10, 20]
    assert xl["transformer_layers_per_block"] == [1, 2, 10]
    assert xl["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert (xl["addition_embed_type"], xl["projection_class_embeddings_input_dim"]) == ("text_time", 2816)
    assert config_json(VAE_SDXL)["scaling_factor"] == 0.13025
    assert config_json(OPENCLIP_BIGG)["architectures"] == ["CLIPTextModelWithProjection"]


def test_dtype(model: Path, tmp_path: Path) -> None:
    for to, names in (("diffusers", ["out/unet/diffusion_pytorch_model.safetensors"]), ("original", ["out"])):
        root = tmp_path / to
        root.mkdir()
        weights_convert.convert(model, root / "out", to=to, dtype="float16")
        for name in names:
            assert {t.dtype for t in TensorFile(root / name).lazy.values()} == {torch.float16}


def test_a_short_token_table_is_written_out(tmp_path: Path) -> None:
    """Other libraries know no table with rows for some ids only; every id must get the vector that it had."""
    assert SD.text_encoder is not None
    kept = (5, 320, 49406, 49407)
    config = replace(SD, family="sd1", text_encoder=replace(SD.text_encoder, kept=kept))
    path = save(config, tmp_path / "short.safetensors")
    report = weights_convert.convert(path, tmp_path / "out", to="diffusers")
    assert "4 ids have a row of their own" in str(report)
    short = checkpoint.open_checkpoint(path).file.lazy["text_encoder.token.weight"].load()
    full = weights_convert.open_source(tmp_path / "out").tensors["text_encoder.token.weight"].load()
    assert full.shape == (49408, 16)
    rows = torch.zeros(49408, dtype=torch.int64)
    rows[list(kept)] = torch.arange(1, 5)
    assert torch.equal(full, short[rows])
    weights_convert.convert(path, tmp_path / "out.safetensors", to="original")
    back = weights_convert.open_source(tmp_path / "out.safetensors")
    assert torch.equal(back.tensors["text_encoder.token.weight"].load(), full)


def test_a_header_that_lies_about_the_config(model: Path, tmp_path: Path) -> None:
    weights_convert.convert(model, tmp_path / "out.safetensors", to="original")
    good = TensorFile(tmp_path / "out.safetensors")
    broken = {"format": "pt", "minidiff.config": "{"}
    write_tensors(tmp_path / "broken.safetensors", good.lazy, broken)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: the config in its header"):
        weights_convert.open_source(tmp_path / "broken.safetensors")
    other = (
        good.metadata["minidiff.config"]
        .replace('"width":16', '"width":32')
        .replace('"context_dim":16', '"context_dim":32')
    )
    write_tensors(tmp_path / "other.safetensors", good.lazy, {"format": "pt", "minidiff.config": other})
    with pytest.raises(CheckpointError, match="was expected"):
        weights_convert.open_source(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(),
        TokenizerConfig(pad=0),
        TokenizerConfig(length=20),
        TokenizerConfig(
            pad=1,
            vocab=("a", "b", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"),
            merges=(("a", "b</w>"),),
        ),
    ],
    ids=["sd1", "sd2", "short", "own"],
)
def test_tokenizers_make_the_trip(tmp_path: Path, config: TokenizerConfig) -> None:
    for name, content in tokenizer_files(config):
        written = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(written, encoding="utf-8")
    assert tokenizer_config(tmp_path) == config


def test_notes_tell_what_diffusers_will_do_otherwise(tmp_path: Path) -> None:
    path = save(replace(SD, sampler={"name": "ddim", "eta": 0.5, "steps_offset": 0}), tmp_path / "a.safetensors")
    notes = str(weights_convert.convert(path, tmp_path / "out", to="diffusers"))
    assert "takes eta from the call" in notes
    assert "will set steps_offset=1" in notes
    assert "deviates from the mathematics" in notes
    path = save(replace(SD, sampler={"name": "tcd"}), tmp_path / "b.safetensors")
    assert "takes eta from the call" in str(weights_convert.convert(path, tmp_path / "tcd", to="diffusers"))


def test_a_text_model_says_steps_offset_1_where_diffusers_would_warn_without(tmp_path: Path) -> None:
    path = save(replace(SD, sampler={"name": "lcm"}), tmp_path / "a.safetensors")
    weights_convert.convert(path, tmp_path / "out", to="diffusers")
    found = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (found["_class_name"], found["steps_offset"]) == ("LCMScheduler", 1)


def test_the_depth_of_the_middle_is_told_by_the_last_level(tmp_path: Path) -> None:
    """It has no place of its own in diffusers' config; a last level with attention has the same, or is refused."""
    plain = replace(SD15, levels=(*SD15.levels[:3], Level(channels=1280)), mid=text(1280, 8, depth=3))
    assert config_json(plain)["transformer_layers_per_block"] == [1, 1, 1, 3]
    deep = replace(SD15, levels=(*SD15.levels[:3], text(1280, 8, depth=2)), mid=text(1280, 8, depth=2))
    assert config_json(deep)["transformer_layers_per_block"] == [1, 1, 1, 2]
    with pytest.raises(UnsupportedError, match="cannot have mid"):
        config_json(replace(deep, mid=text(1280, 8, depth=3)))


def test_another_sampler_replaces_the_checkpoints_own(model: Path, tmp_path: Path) -> None:
    """Its options go with it: runge_kutta means nothing to Euler."""
    for src in (model, weights_convert.convert(model, tmp_path / "a.safetensors", to="original").target):
        assert src is not None
        sampler = {"name": "euler", "sigma_spacing": "karras"}
        assert weights_convert.open_source(src, config={"sampler": sampler}).config.sampler == sampler
        assert (
            weights_convert.open_source(src, config={"sampler": {"steps_offset": 0}}).config.sampler["name"] == "pndm"
        )


def test_rows_of_one_matrix_come_together_again() -> None:
    """OpenCLIP keeps queries, keys and values in one matrix: three pairs with one name over there."""
    thirds = [
        Form(f"rows of {x}", lambda t, k=k: t.chunk(3)[k], lambda t: t, lambda s: (3 * s[0], *s[1:]))  # type: ignore[misc]
        for k, x in enumerate("qkv")
    ]
    whole = torch.arange(24.0).reshape(6, 4)
    model = nn.ModuleDict({x: nn.Linear(4, 2, bias=False, device="meta") for x in "qkv"})
    pairs = [Pair("in_proj_weight", f"{x}.weight", form) for x, form in zip("qkv", thirds, strict=True)]
    part = translate(pairs, {"in_proj_weight": lazy(whole)}, model, where="here")
    assert torch.equal(part.tensors["k.weight"].load(), whole[2:4])
    back = restore(pairs, part.tensors)
    assert {k: t.shape for k, t in back.items()} == {"in_proj_weight": (6, 4)}
    assert torch.equal(back["in_proj_weight"].load(), whole)


# ---- shards


def test_sharded(model: Path, tmp_path: Path) -> None:
    weights_convert.convert(model, tmp_path / "out", to="diffusers", sharded="60kB")
    unet = tmp_path / "out" / "unet"
    index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(p.name for p in unet.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    n = len(files)
    assert files[0] == f"diffusion_pytorch_model-00001-of-{n:05d}.safetensors"
    assert n > 2
    for file in files:
        held = TensorFile(unet / file).lazy
        assert {k for k, f in index["weight_map"].items() if f == file} == held.keys()
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 60_000
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in tiny_sd().unet.parameters())
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors.index.json").exists()
    back = weights_convert.convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes(), back


def test_what_fits_into_one_file_is_one(tmp_path: Path) -> None:
    tensors = {"a": lazy(torch.ones(10)), "b": lazy(torch.ones(10))}
    write_weights(tmp_path, "model", tensors, 80)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    write_weights(tmp_path, "other", tensors, 79)
    assert (tmp_path / "other-00002-of-00002.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2**31), ("500 MB", 5 * 10**8), ("1.5kb", 1500), (4096, 4096), ("4096", 4096)],
)
def test_sizes(given: Any, size: int) -> None:
    assert shard_size(given) == size


@pytest.mark.parametrize("given", ["", "GB", "-5GB", "5XB", "five", 0, -1, "1e9", "999", True, "0GB", "٣GB", "nan"])
def test_sizes_that_make_no_sense(model: Path, tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="sharded="):
        weights_convert.convert(model, tmp_path / "out", to="diffusers", sharded=given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["minidiff", "original"])
def test_only_folders_are_sharded(model: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(ConfigError, match="is one file"):
        weights_convert.convert(model, tmp_path / "out", to=to, sharded="5GB")


# ---- what can't be written


def refused(path: Path, to: str, error: type[MinidiffError], words: str) -> None:
    out = path.parent / "out"
    with pytest.raises(error, match=words):
        weights_convert.convert(path, out, to=to)
    assert [p for p in path.parent.iterdir() if p != path] == []


def test_models_that_diffusers_cannot_be(tmp_path: Path) -> None:
    heads = save(DDPM, tmp_path / "heads.safetensors")
    refused(heads, "diffusers", UnsupportedError, r"a UNet2DModel of diffusers cannot have mid=Level")
    heads.unlink()
    penultimate = save(replace(SD, text_layer="penultimate"), tmp_path / "layer.safetensors")
    refused(penultimate, "diffusers", UnsupportedError, "text_layer='penultimate' has no place")
    penultimate.unlink()
    zero = replace(SD, schedule=ScheduleConfig(zero_snr=True, prediction="v_prediction"))
    refused(save(zero, tmp_path / "zero.safetensors"), "diffusers", UnsupportedError, "no place for zero_snr=True")


def test_models_that_the_original_layout_has_no_names_for(tmp_path: Path) -> None:
    plain = save(DDPM, tmp_path / "plain.safetensors")
    refused(plain, "original", UnsupportedError, "a UNet, a VAE and a text encoder")


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.pt", "SD.BIN"])
def test_a_single_file_is_never_a_pickle(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"name it \.safetensors"):
        weights_convert.convert(model, tmp_path / name, to="original")
    assert list(tmp_path.iterdir()) == []


def test_unets_between_the_two_kinds() -> None:
    mixed = UNetConfig(
        levels=(text(32, 4), Level(channels=32, attention="self", heads=4)), mid=text(32, 4), context_dim=8
    )
    with pytest.raises(UnsupportedError, match="diffusers has no such model"):
        config_json(mixed)
    with pytest.raises(UnsupportedError, match="cannot have mid"):
        config_json(replace(SD15, levels=(*SD15.levels[:3], text(1280, 8)), mid=text(1280, 20)))
    assert config_json(VAE_SD)["_class_name"] == "AutoencoderKL"
    with pytest.raises(UnsupportedError, match="end_token"):
        config_json(replace(CLIP_L, end_token=2))


# ---- targets


def test_a_target_that_exists_is_left_alone(model: Path, tmp_path: Path) -> None:
    for name in ("file", "full"):
        target = tmp_path / name
        if name == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "mine.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="is not replaced; name a folder that is new or empty"):
            weights_convert.convert(model, target, to="diffusers")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    weights_convert.convert(model, tmp_path / "empty", to="diffusers")
    assert (tmp_path / "empty" / "model_index.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_folder_around_it_must_exist(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; create it first"):
        weights_convert.convert(model, tmp_path / "no" / "out", to="diffusers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    written = 0

    def full(fd: int) -> None:
        nonlocal written
        written += 1
        if written > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        weights_convert.convert(model, tmp_path / "out", to="diffusers")
    assert written > after
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    sd = tiny_sd()
    with torch.no_grad():
        sd.unet.conv_out.bias[0] = float("nan")
    sd.save(tmp_path / "bad.safetensors")
    for to in ("diffusers", "original"):
        refused(tmp_path / "bad.safetensors", to, CheckpointError, "1 of 4 values of 'unet.conv_out.bias'")


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# Converts again and again, killed at another moment every time, until a run comes to its end; tells what each left.
KILLED = """
import hashlib, json, os, signal, sys
import weights_convert

src, dst, to, stride = sys.argv[1:]
plain, left = os.fsync, 0

def fsync(fd):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    plain(fd)

def content():
    return hashlib.sha256(open(dst, "rb").read()).hexdigest() if os.path.isfile(dst) else None

found = []
for left in range(0, 1000, int(stride)):
    child = os.fork()
    if child == 0:
        os.fsync = fsync
        try:
            weights_convert.convert(src, dst, to=to)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    found.append([os.WTERMSIG(status), sorted(os.listdir(os.path.dirname(dst))), content()])
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(found))
"""


def killed(src: Path, dst: Path, to: str, stride: int) -> list[tuple[int, list[str], str | None]]:
    """(signal, names in the folder around ``dst``, hash of the file ``dst``) after every run."""
    dst.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", KILLED, str(src), str(dst), to, str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=True)
    return [tuple(run) for run in json.loads(done.stdout)]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_any_moment_leaves_no_folder_of_that_name(model: Path, tmp_path: Path) -> None:
    """What lies beside it is cleaned up by the next run, so there is never more than one of these."""
    *broken, whole = killed(model, tmp_path / "new" / "out", "diffusers", stride=5)
    assert len(broken) > 4
    for signalled, names, _ in broken[:-1]:
        assert signalled == signal.SIGKILL
        assert len(names) == 1
        assert PART.fullmatch(names[0])
    assert broken[-1][0] == signal.SIGKILL  # it may have come after the last act, the renaming
    assert (whole[0], whole[1]) == (0, ["out"])
    weights_convert.convert(tmp_path / "new" / "out", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("to", ["minidiff", "original"])
def test_killed_at_any_moment_leaves_the_old_file(model: Path, tmp_path: Path, to: str) -> None:
    old = b"what was there before"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "out").write_bytes(old)
    *broken, whole = killed(model, tmp_path / "new" / "out", to, stride=1)
    assert len(broken) == 2
    assert (broken[0][0], broken[0][2]) == (signal.SIGKILL, hashlib.sha256(old).hexdigest())  # before it is on the disk
    assert (broken[1][0], broken[1][2]) == (signal.SIGKILL, whole[2])  # renamed already: the new one, whole
    assert (whole[0], whole[1]) == (0, ["out"])


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_what_another_process_is_writing_is_not_cleaned_up(tmp_path: Path) -> None:
    code = f"""
import time
from minidiff.storage.writing import atomic_folder
with atomic_folder({str(tmp_path / "out")!r}) as folder:
    (folder / "mine").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "writing\n"
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "mine").write_text("whole")
        others = [p for p in tmp_path.iterdir() if p.name != "out"]
        assert len(others) == 1
        assert PART.fullmatch(others[0].name)
        assert (others[0] / "mine").read_text() == "half"
    finally:
        running.kill()
        running.communicate()


# ---- the commands


def test_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["convert", str(model), out, "--to", "diffusers", "--sharded", "60kB", "--dtype", "float16"]) == 0
    assert f"written   {out}" in capsys.readouterr().out
    assert cli.main(["convert", str(model), out, "--to", "diffusers", "--force"]) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert cli.main(["convert", out, str(tmp_path / "single.safetensors"), "--to", "original"]) == 0
    assert cli.main(["convert", str(model), str(tmp_path / "x"), "--to", "diffusers", "--sharded", "much"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "sharded='much' should be a size" in said


def test_the_other_command(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weights_convert", str(model), str(tmp_path / "out"), "--to", "diffusers"]
    done = subprocess.run([*command, "--sharded", "60kB"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()


def test_exporting_reads_one_tensor_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the writer holds is one tensor; the source's stay in its file."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    plain = TensorFile._load

    def load(self: TensorFile, name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = plain(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorFile, "_load", load)
    gc.collect()
    weights_convert.convert(model, tmp_path / "out", to="diffusers")
    weights_convert.convert(model, tmp_path / "out.safetensors", to="original")
    assert len(alive) > 100
    assert most <= 2


def test_a_ddpm_pipeline_is_named_after_its_sampler(tmp_path: Path) -> None:
    unet = replace(DDPM.unet, mid=replace(DDPM.unet.mid, heads=3))
    path = save(replace(DDPM, unet=unet, sampler={"name": "ddim"}), tmp_path / "a.safetensors")
    weights_convert.convert(path, tmp_path / "out", to="diffusers")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
