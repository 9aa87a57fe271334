"""Checkpoints that the reference wrote, in every form in which they are published: the same tensors and settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import weights_convert
from minidiff.config import CLIP_L, SD15, VAE_SD
from minidiff.models.tokenizer import clip_table
from minidiff.storage.checkpoint import build
from tests.parity.test_convert_keys import SD15 as SD15_JSON
from tests.parity.test_convert_keys import VAE as VAE_JSON
from tests.parity.test_convert_keys import clip
from tests.support.parity import twins
from tests.support.parity.ldm import original_sd1
from tests.tolerances import assert_close
from weights_convert import keys_original
from weights_convert.component import meta_model
from weights_convert.engine import expand
from weights_convert.folder import rewrite

# What shapes can't tell of the twin.
OVERRIDE: dict[str, Any] = {
    "unet": {"levels": [{"heads": 4}, {"heads": 4}, {}], "mid": {"heads": 4}, "groups": 8, "sample_size": 8},
    "vae": {"groups": 8, "sample_size": 32},
    "text_encoder": {"heads": 4},
}


def same(got: Any, want: Any) -> None:
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        assert_close(got.tensors[name].load(), tensor.load(), where=name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The twin's folder as the reference writes it today."""
    folder = tmp_path_factory.mktemp("plain")
    twins.folder_twin(folder)
    return weights_convert.open_source(folder)


def test_sharded_folder(tmp_path: Path, plain: Any) -> None:
    twins.folder_twin(tmp_path, max_shard_size="150KB")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert (tmp_path / "text_encoder" / "model.safetensors.index.json").is_file()
    found = weights_convert.open_source(tmp_path)
    assert found.config == plain.config
    same(found, plain)


def test_float16_folder(tmp_path: Path, plain: Any) -> None:
    twins.folder_twin(tmp_path, dtype=torch.float16)
    found = weights_convert.open_source(tmp_path)
    assert found.config == plain.config
    for name, tensor in plain.tensors.items():
        assert_close(found.tensors[name].load(), tensor.load().half(), where=name)


def test_folder_as_old_versions_wrote_it(tmp_path: Path, plain: Any) -> None:
    """vocab.json and merges.txt, "text_model." before the text encoder's names, pickles, a wrong end token."""
    twins.folder_twin(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    vocab, merges = clip_table()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (tmp_path / "tokenizer" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    text = tmp_path / "text_encoder"
    tensors = {f"text_model.{k}": t for k, t in load_file(text / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (text / "model.safetensors").unlink()
    torch.save(tensors, text / "pytorch_model.bin")
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    found = weights_convert.open_source(tmp_path)
    text = dataclasses.replace(plain.config.text_encoder, end_token=None)  # where the largest id stands
    assert found.config == dataclasses.replace(plain.config, text_encoder=text)
    same(found, plain)
    assert [name for name, _, _ in found.report.dropped] == ["position ids"]


def test_sd2_folder(tmp_path: Path) -> None:
    """v-prediction and the pad token come from the folder."""
    twins.folder_twin(tmp_path, "sd2", scheduler=twins.scheduler_twin(prediction_type="v_prediction"))
    found = weights_convert.open_source(tmp_path)
    assert found.report.family == "sd2"
    assert found.config.schedule.prediction == "v_prediction"
    assert found.config.tokenizer is not None
    assert found.config.tokenizer.pad == 0
    assert found.config.unet.linear_proj


@pytest.mark.parametrize("kind", ["ddpm", "ddpm_heads"])
def test_ddpm_folder(tmp_path: Path, kind: str) -> None:
    reference = twins.folder_twin(tmp_path, kind).unet
    found = weights_convert.open_source(tmp_path)
    assert found.report.family == "ddpm"
    wanted = twins.ours(reference)
    assert found.config.unet == wanted.config
    for name, tensor in wanted.state_dict().items():
        assert_close(found.tensors[f"unet.{name}"].load(), tensor, where=name)


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "prefixless"])
def test_original_single_file(tmp_path: Path, plain: Any, form: str) -> None:
    """Written by a list of names that is independent of our map; the same tensors as from the folder."""
    pipe = twins.pipeline_twin()
    states = (m.state_dict() for m in (pipe.unet, pipe.vae, pipe.text_encoder))
    tensors = original_sd1(*states, levels=3)
    if form == "prefixless":
        tensors = {k.replace("transformer.text_model.", "transformer."): t for k, t in tensors.items()}
    path = tmp_path / ("sd.ckpt" if form == "ckpt" else "sd.safetensors")
    if form == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    else:
        save_file(tensors, path)
    found = weights_convert.open_source(path, config=OVERRIDE)
    assert found.config == plain.config
    same(found, plain)


def test_original_map_at_real_size() -> None:
    """Every tensor of a full SD1.5 by its original name and shape, with no weights."""
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**clip(hidden_size=768, num_hidden_layers=12)))
        models = (UNet2DConditionModel(**SD15_JSON), AutoencoderKL(**VAE_JSON), text)
        tensors = original_sd1(*(m.state_dict() for m in models))
    for key in ("betas", "alphas_cumprod", "cond_stage_model.transformer.text_model.embeddings.position_ids"):
        del tensors[key]
    theirs = {k: tuple(t.shape) for k, t in tensors.items()}
    maps: tuple[tuple[Any, Any], ...] = (
        (SD15, keys_original.unet(SD15)),
        (VAE_SD, keys_original.vae(VAE_SD)),
        (CLIP_L, keys_original.clip(CLIP_L)),
    )
    ours: dict[str, tuple[int, ...]] = {}
    for config, modules in maps:
        model = meta_model(config)
        shapes = {k: tuple(p.shape) for k, p in model.state_dict().items()}
        ours |= {p.theirs: p.form.stored(shapes[p.ours]) for p in expand(modules, model)}
    assert ours == theirs
    assert len(ours) == 1130


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(),
        PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        DDIMScheduler(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        DDPMScheduler(clip_sample=True),
        EulerDiscreteScheduler(),
        LMSDiscreteScheduler(steps_offset=2),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scheduler_is_rewritten_as_the_pipeline_does(scheduler: Any) -> None:
    given = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    silent = {k: v for k, v in given.items() if k not in ("steps_offset", "clip_sample")}
    for options in (given, silent):  # said outright, and left to the scheduler's defaults
        pipe = twins.pipeline_twin(scheduler=type(scheduler)(**options))
        assert isinstance(pipe, StableDiffusionPipeline)
        changed = type(scheduler)(**options | rewrite(options | {"_class_name": type(scheduler).__name__}))
        for key in ("steps_offset", "clip_sample"):
            assert changed.config.get(key) == pipe.scheduler.config.get(key), (key, options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scheduler_is_rewritten_as_the_inpainting_pipeline_does() -> None:
    """It leaves ``clip_sample``, and switches PNDM's warm-up off."""
    parts = twins.pipeline_twin("inpaint").components
    for scheduler in (PNDMScheduler(), DDIMScheduler()):
        given = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        pipe = StableDiffusionInpaintPipeline(**parts | {"scheduler": type(scheduler)(**given)})
        changed = type(scheduler)(**given | rewrite(given | {"_class_name": type(scheduler).__name__}, inpaint=True))
        for key in ("steps_offset", "clip_sample", "skip_prk_steps"):
            assert changed.config.get(key) == pipe.scheduler.config.get(key), key


def test_config_is_a_whole_model(plain: Any) -> None:
    wanted = {f"{n}.{k}" for n, part in build(plain.config).items() for k in part.state_dict()}
    assert set(plain.tensors) == wanted
