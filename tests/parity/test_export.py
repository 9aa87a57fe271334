"""Exported checkpoints, read by the reference: diffusers loads them without a warning and makes equal latents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import weights_convert
from minidiff.pipeline import StableDiffusion, load
from minidiff.samplers import SAMPLERS, sampler_from_config
from minidiff.storage.files import lazy
from tests.parity.test_convert_folders import OVERRIDE
from tests.support.parity import twins
from tests.support.parity.ldm import original_sd1
from tests.tolerances import assert_close
from weights_convert.component import meta_model, read_component
from weights_convert.configs_out import class_of, config_json
from weights_convert.engine import expand, restore
from weights_convert.export_folder import _layout, _write_json, write_weights

CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (UNet2DConditionModel, UNet2DModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
}
PROMPT, NEGATIVE = "a red fox, sitting on a chair!", "blurry, text"
# Methods that diffusers' text pipelines can drive: the others invert, or bring noise levels of their own.
DRIVEN = [
    n for n, k in SAMPLERS.items() if not k.own_levels and "inverse" not in n and n not in ("sa_solver", "dpmpp_sde")
]
STEPS = 2  # enough for a history


@contextmanager
def silence(but: str = "none") -> Iterator[None]:
    """Fails if diffusers or transformers has anything to complain of, except for lines that hold ``but``."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(ear)
    assert [line for line in said if but not in line] == []


def opened(folder: Path, but: str = "none", **options: Any) -> Any:
    with silence(but):
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written(folder: Path, kind: str, **options: Any) -> Path:
    twins.folder_twin(folder / "folder", kind, scheduler=twins.scheduler_twin(**options))
    weights_convert.convert(folder / "folder", folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin of Stable Diffusion 1 as a minidiff file."""
    return written(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin of Stable Diffusion 2, which predicts v."""
    return written(tmp_path_factory.mktemp("sd2"), "sd2", prediction_type="v_prediction")


@pytest.fixture(params=["sd1", "sd2"])
def model(request: pytest.FixtureRequest) -> Path:
    """Either of the two."""
    found: Path = request.getfixturevalue(request.param)
    return found


def latents_of(pipe: Any, **options: Any) -> torch.Tensor:
    found: torch.Tensor = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **options,
    ).images
    return found


@pytest.mark.parametrize("sharded", [None, "150kB"])
def test_an_exported_folder_makes_the_same_latents(model: Path, tmp_path: Path, sharded: str | None) -> None:
    weights_convert.convert(model, tmp_path / "out", to="diffusers", sharded=sharded)
    pipe = opened(tmp_path / "out")
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None
    sd = load(model, device="cpu")
    assert isinstance(sd, StableDiffusion)
    ours = sd.generate(
        PROMPT, NEGATIVE, STEPS, generator=torch.Generator().manual_seed(3), output="latent", progress=False
    )
    assert ours.std() > 0.1
    assert_close(ours, latents_of(pipe))


@pytest.mark.parametrize("name", DRIVEN)
def test_every_sampler_in_an_exported_folder(sd1: Path, tmp_path: Path, name: str) -> None:
    """Chosen by name, written, and driven by diffusers: the latents of the same sampler with the reference's slips."""
    kind: Any = SAMPLERS[name]
    option: dict[str, Any] = {"name": name, "like_diffusers": True}
    fields = kind.__dataclass_fields__
    option |= {"steps_offset": 1} if "steps_offset" in fields and name != "dpmpp_2s" else {}
    option |= {"eta": 0.0} if name == "tcd" else {}  # what the pipeline passes
    weights_convert.convert(sd1, tmp_path / "out", to="diffusers", config={"sampler": option})
    pipe = opened(tmp_path / "out", but="'eta'")  # which is no option of TCD's class, but of its step
    sd = load(sd1, device="cpu")
    assert isinstance(sd, StableDiffusion)
    seed = torch.Generator().manual_seed(3)
    sampler = sampler_from_config(option)
    ours = sd.generate(PROMPT, NEGATIVE, STEPS, sampler=sampler, generator=seed, output="latent", progress=False)
    assert_close(ours, latents_of(pipe), where=name)


def test_float16_is_float16_over_there(sd1: Path, tmp_path: Path) -> None:
    weights_convert.convert(sd1, tmp_path / "out", to="diffusers", dtype="float16")
    pipe = opened(tmp_path / "out", torch_dtype=torch.float16)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float16}


def test_the_tokenizer_is_the_same_over_there(model: Path, tmp_path: Path) -> None:
    weights_convert.convert(model, tmp_path / "out", to="diffusers")
    theirs, sd = opened(tmp_path / "out").tokenizer, load(model, device="cpu")
    assert isinstance(sd, StableDiffusion)
    texts = ["", "a red fox!", "una casa in collina, 1024×768", "naïve café 北京"]
    ids = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(sd.tokenizer(texts), ids)


@pytest.mark.parametrize("kind", ["ddpm", "ddpm_heads"])
def test_an_exported_unconditional_model(tmp_path: Path, kind: str) -> None:
    twins.folder_twin(tmp_path / "folder", kind)
    weights_convert.convert(tmp_path / "folder", tmp_path / "model.safetensors")
    weights_convert.convert(tmp_path / "model.safetensors", tmp_path / "out", to="diffusers")
    pipe = opened(tmp_path / "out")
    seed = torch.Generator().manual_seed(1)
    pixels = pipe(2, num_inference_steps=3, generator=seed, output_type="np").images
    model: Any = load(tmp_path / "model.safetensors", device="cpu")
    seed = torch.Generator().manual_seed(1)
    ours = model.generate(2, steps=3, generator=seed, output="tensor", progress=False)
    assert_close(ours.permute(0, 2, 3, 1), torch.from_numpy(pixels))
    weights_convert.convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


# ---- single files


def test_an_exported_single_file(tmp_path: Path) -> None:
    """diffusers' own reader finds every tensor of the reference in it, and it makes the same latents."""
    theirs = twins.folder_twin(tmp_path / "folder")
    theirs.set_progress_bar_config(disable=True)
    weights_convert.convert(tmp_path / "folder", tmp_path / "model.safetensors")
    weights_convert.convert(tmp_path / "model.safetensors", tmp_path / "single.safetensors", to="original")
    with silence():
        pipe = StableDiffusionPipeline.from_single_file(
            tmp_path / "single.safetensors", config=str(tmp_path / "folder"), local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        got, want = getattr(pipe, name).state_dict(), getattr(theirs, name).state_dict()
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert_close(got[key], tensor, where=f"{name}.{key}")
    assert_close(latents_of(pipe), latents_of(theirs))


def test_a_single_file_has_the_names_of_the_public_layout(tmp_path: Path) -> None:
    """Against a list of names that is independent of our map."""
    pipe = twins.folder_twin(tmp_path / "folder")
    wanted = original_sd1(*(m.state_dict() for m in (pipe.unet, pipe.vae, pipe.text_encoder)), levels=3)
    weights_convert.convert(tmp_path / "folder", tmp_path / "single.safetensors", to="original")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "single.safetensors")
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert found.keys() == wanted.keys() - {"betas", "alphas_cumprod", positions}
    for key, tensor in found.items():
        assert_close(tensor, wanted[key], where=key)


def test_ldm_to_ldm_by_way_of_diffusers(tmp_path: Path) -> None:
    """LDM -> minidiff -> diffusers -> minidiff -> LDM: every bit of the tensors, and the whole config."""
    from safetensors.torch import load_file, save_file

    pipe = twins.pipeline_twin()
    tensors = original_sd1(*(m.state_dict() for m in (pipe.unet, pipe.vae, pipe.text_encoder)), levels=3)
    save_file(tensors, tmp_path / "1.safetensors")
    weights_convert.convert(tmp_path / "1.safetensors", tmp_path / "2.safetensors", config=OVERRIDE)
    weights_convert.convert(tmp_path / "2.safetensors", tmp_path / "3", to="diffusers")
    opened(tmp_path / "3").save_pretrained(tmp_path / "3b")  # and once through the reference itself
    for folder in ("3", "3b"):
        weights_convert.convert(tmp_path / folder, tmp_path / "4.safetensors")
        assert (tmp_path / "4.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    weights_convert.convert(tmp_path / "4.safetensors", tmp_path / "5.safetensors", to="original")
    back = load_file(tmp_path / "5.safetensors")
    assert len(back) == len(tensors) - 3
    for key, tensor in back.items():
        assert_close(tensor, tensors[key], where=key)
    assert (
        weights_convert.open_source(tmp_path / "5.safetensors").config
        == weights_convert.open_source(tmp_path / "2.safetensors").config
    )


# ---- components of every family


REFERENCES: dict[str, Any] = {
    **{f"unet {kind}": (lambda kind=kind: twins.unet_twin(kind)) for kind in twins.UNETS},
    **{f"clip {kind}": (lambda kind=kind: twins.clip_twin(kind)) for kind in twins.CLIPS},
    "vae": twins.vae_twin,
    "vae xl": lambda: twins.vae_twin(scaling_factor=0.13025),
    "vae plain": lambda: twins.vae_twin(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, layers_per_block=1
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_components_make_the_trip(tmp_path: Path, name: str) -> None:
    """Reference -> ours -> reference, for the parts of every family: loaded in silence, every tensor as it was."""
    reference = REFERENCES[name]()
    model = twins.ours(reference)
    found = config_json(model.config)
    assert class_of(found) == type(reference).__name__
    _write_json(tmp_path / "config.json", found)
    pairs = expand(_layout(model.config), meta_model(model.config))
    tensors = restore(pairs, {k: lazy(t) for k, t in model.state_dict().items()})
    write_weights(tmp_path, "model" if name.startswith("clip") else "diffusion_pytorch_model", tensors)
    with silence():
        back = CLASSES[class_of(found)].from_pretrained(tmp_path, local_files_only=True)
    want = reference.state_dict()
    assert back.state_dict().keys() == want.keys()
    for key, tensor in back.state_dict().items():
        assert_close(tensor, want[key], where=key)
    assert read_component(tmp_path).config == model.config
