"""Settings that a pipeline's folder carries beside its weights: honoured as the reference does, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

import weights_convert
from minidiff.adapters import words as embeddings
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.models.tokenizer_files import tokenizer_config
from tests.parity.test_convert_models import unet_inputs
from tests.support.parity import twins
from tests.support.parity.configs import aligned
from tests.tolerances import assert_close
from weights_convert import read_embedding
from weights_convert.configs_out import config_json

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROMPT = "a red fox, sitting"


Twin = Callable[[str], Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The folder of a kind of twin, and the reference's pipeline that wrote it; made once, and changed by no test."""

    @cache
    def make(kind: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(kind)
        return folder, twins.folder_twin(folder, kind)

    return make


@pytest.fixture
def twin(written: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> Twin:
    """Copy the folder of a kind of twin into the test's own, and give the reference's pipeline."""

    def copy(kind: str) -> Any:
        folder, pipeline = written(kind)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return pipeline

    return copy


def edit(file: Path, **settings: Any) -> None:
    """Put settings into a JSON file; ``...`` takes one out."""
    found = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def latents(folder: Path, prompt: str = PROMPT, steps: int = 2) -> tuple[Tensor, Tensor]:
    """The same call on minidiff and on the reference, both reading the folder."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            aligned(part)
    call: dict[str, Any] = {"guidance_scale": 5.0, "generator": torch.Generator().manual_seed(3)}
    want = pipe(prompt, num_inference_steps=steps, output_type="latent", **call).images
    call["generator"].manual_seed(3)
    sd: Any = weights_convert.load(folder, device="cpu")
    return sd.generate(prompt, steps=steps, output="latent", progress=False, **call), want


def notes(folder: Path) -> str:
    return str(weights_convert.open_source(folder).report)


@pytest.mark.parametrize("named", ["PNDMScheduler", "NoSuchScheduler", ...])
def test_the_index_decides_the_scheduler(twin: Twin, tmp_path: Path, named: Any) -> None:
    twin("sd1")
    edit(tmp_path / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit(tmp_path / "scheduler" / "scheduler_config.json", _class_name=named)
    assert weights_convert.open_source(tmp_path).config.sampler["name"] == "euler"
    assert_close(*latents(tmp_path))
    said = "none" if named is ... else repr(named)
    assert f"EulerDiscreteScheduler, as model_index.json says; scheduler_config.json names {said}" in notes(tmp_path)


def test_an_unknown_option_of_a_scheduler_is_a_note(twin: Twin, tmp_path: Path) -> None:
    twin("sd1")
    edit(tmp_path / "scheduler" / "scheduler_config.json", my_extra=1)
    assert_close(*latents(tmp_path))
    assert "scheduler: 'my_extra' is no option of any scheduler; ignored" in notes(tmp_path)


@pytest.mark.parametrize("version", ["0.6.0", "0.8.1", "0.8.0.dev0", "0.9.0", "0.9.0.dev0", "0.10.2", ...])
@pytest.mark.parametrize("kind", ["sd1", "inpaint", "lcm", "sdxl"])
def test_a_small_sample_size_of_old_versions_means_64(twin: Twin, tmp_path: Path, kind: str, version: Any) -> None:
    """In the pipelines of SD1 and SD2, in no other, and only where it is one number."""
    reference = twin(kind)
    config = tmp_path / "unet" / "config.json"
    edit(config, _diffusers_version=version)
    rest = {name: part for name, part in reference.components.items() if name not in ("unet", "scheduler")}
    pipe: Any = type(reference).from_pretrained(tmp_path, **rest)
    found = weights_convert.open_source(tmp_path)
    size = pipe.unet.config.sample_size
    assert found.config.unet.sides == (size, size)
    assert size == (64 if version in ("0.6.0", "0.8.1", "0.8.0.dev0") and kind in ("sd1", "inpaint") else 8)
    assert ("sample_size was 8, set to 64" in str(found.report)) == (size == 64)
    edit(config, sample_size=[8, 8])
    assert weights_convert.open_source(tmp_path).config.unet.sides == (8, 8)


def test_a_version_that_is_none_is_refused(twin: Twin, tmp_path: Path) -> None:
    twin("sd1")
    for version in ("", "new", None, 3):
        edit(tmp_path / "unet" / "config.json", _diffusers_version=version)
        with pytest.raises(CheckpointError, match="is no version"):
            weights_convert.open_source(tmp_path)


def test_pictures_that_are_not_square(twin: Twin, tmp_path: Path) -> None:
    twin("sd1")
    edit(tmp_path / "unet" / "config.json", sample_size=[8, 12])
    got, want = latents(tmp_path)
    assert got.shape == (1, 4, 8, 12)
    assert_close(got, want)
    weights_convert.convert(tmp_path, tmp_path / "again", to="diffusers")
    assert json.loads((tmp_path / "again" / "unet" / "config.json").read_text())["sample_size"] == [8, 12]


def test_a_ddpm_that_is_not_square(twin: Twin, tmp_path: Path) -> None:
    twin("ddpm")
    edit(tmp_path / "unet" / "config.json", sample_size=[8, 16])
    sd: Any = weights_convert.load(tmp_path)
    assert sd.generate(steps=1, seed=0, output="tensor", progress=False).shape == (1, 3, 8, 16)


SSD = twins.SDXL | {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 5], [2, 1, 1], 1],
}
SMALLER: dict[str, tuple[Any, dict[str, Any]]] = {
    "SSD-1B": (UNet2DConditionModel, SSD | {"mid_block_type": "UNetMidBlock2D"}),
    "its depths": (UNet2DConditionModel, SSD | {"transformer_layers_per_block": [1, [2, 1], [3, 4]]}),
    "other depths on the way up": (
        UNet2DConditionModel,
        twins.SD2 | {"transformer_layers_per_block": [1, 2, 1], "reverse_transformer_layers_per_block": [1, 1, 2]},
    ),
    "Tiny-SD": (UNet2DConditionModel, twins.SD1 | {"mid_block_type": None, "layers_per_block": 1}),
    "a ddpm without a middle": (UNet2DModel, twins.DDPM | {"mid_block_type": None}),
}


@pytest.mark.parametrize("name", SMALLER)
@torch.no_grad()
def test_models_that_were_made_smaller(name: str) -> None:
    cls, options = SMALLER[name]
    reference = twins.redraw(cls(**options), 0)
    model = twins.ours(reference)
    again = cls(**{k: v for k, v in config_json(model.config).items() if k != "_class_name"})
    again.load_state_dict(reference.state_dict())
    for batch, size in ((1, (8, 8)), (2, (8, 16)), (3, (16, 8))):
        x, theirs, ours = unet_inputs(reference, batch, size)
        t = torch.tensor([1, 500, 999])[:batch]
        want = reference(x, t, **theirs).sample
        assert_close(model(x, t, **ours), want, where=f"{name} batch {batch}")
        assert_close(again.eval()(x, t, **theirs).sample, want, where="as written back")


@pytest.mark.parametrize("name", ["SSD-1B", "its depths", "Tiny-SD"])
def test_smaller_models_as_single_files(tmp_path: Path, name: str) -> None:
    """Written in the original layout and read from the shapes alone: the same model as from the folder."""
    kind = "sd1" if name == "Tiny-SD" else "sdxl"
    pipe = twins.pipeline_twin(kind)
    options = SMALLER[name][1] | {"cross_attention_dim": pipe.unet.config.cross_attention_dim}
    pipe.unet = twins.redraw(UNet2DConditionModel(**options), 0)
    pipe.save_pretrained(tmp_path / "folder")
    weights_convert.convert(tmp_path / "folder", tmp_path / "single.safetensors", to="original")
    save_file(load_file(tmp_path / "single.safetensors"), tmp_path / "bare.safetensors")  # without our own header
    folder = weights_convert.open_source(tmp_path / "folder")
    told = {"levels": [{"heads": level.heads} for level in folder.config.unet.levels], "groups": 8, "sample_size": 8}
    told["mid"] = {"heads": folder.config.unet.mid.heads}
    text = {"heads": 4}
    parts = {"unet": told, "vae": {"groups": 8}, "text_encoder": text}
    parts |= {"text_encoder_2": {"heads": 6}} if kind == "sdxl" else {}
    parts |= {"unet": told | {"added_sinusoid": 8}} if kind == "sdxl" else {}
    single = weights_convert.open_source(tmp_path / "bare.safetensors", config=parts)
    assert single.config.unet == folder.config.unet
    for key, tensor in folder.tensors.items():
        assert_close(single.tensors[key].load(), tensor.load(), where=key)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("text_encoder", {"num_hidden_layers": 2}),
        ("unet", {"transformer_layers_per_block": 1}),
        ("unet", {"mid_block_type": None}),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}),
    ],
    ids=str,
)
def test_fewer_layers_in_the_config_than_in_the_file(tmp_path: Path, part: str, settings: dict[str, Any]) -> None:
    pipe = twins.pipeline_twin("sd2")
    if part == "unet":
        pipe.unet = twins.unet_twin("sd2", transformer_layers_per_block=2)
    pipe.save_pretrained(tmp_path)
    full = latents(tmp_path)[0]
    edit(tmp_path / part / "config.json", **settings)
    got, want = latents(tmp_path)
    assert_close(got, want)
    assert not torch.equal(got, full)
    dropped = {name: count for name, count, _ in weights_convert.open_source(tmp_path).report.dropped}
    assert dropped["layers beyond the config's"] > 0


@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_folder_saved_after_textual_inversion(tmp_path: Path, layout: str) -> None:
    """A word of one vector and two of three, of which the reference stretches the one in small letters only; the
    tokenizer's files as transformers writes them now, and as before."""
    pipe = twins.pipeline_twin("sd1")
    g = torch.Generator().manual_seed(0)
    for word, count in (("<cat-toy>", 1), ("<style>", 3), ("<Loud>", 3)):
        pipe.load_textual_inversion({word: 9 * torch.randn(count, 32, generator=g)}, token=word)
    pipe.save_pretrained(tmp_path)
    place = tmp_path / "tokenizer"
    if layout == "old":
        pipe.tokenizer.save_pretrained(place)
        whole = json.loads((place / "tokenizer.json").read_text())
        (place / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
        (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        words = {t["content"]: t["id"] for t in whole["added_tokens"] if t["id"] >= 49408}
        (place / "added_tokens.json").write_text(json.dumps(words))
        (place / "tokenizer.json").unlink()
        edit(place / "tokenizer_config.json", added_tokens_decoder=...)
    loud = (("<Loud>", 1), ("<Loud>_1", 1), ("<Loud>_2", 1))
    added = (("<cat-toy>", 1), ("<style>", 3), *loud)
    assert weights_convert.open_source(tmp_path).config.tokenizer.added == added
    plain = latents(tmp_path, "a dog in")[0]
    for prompt in ("a <cat-toy> in <style>", "<style>_2", "a <Loud> <Loud>_1"):
        got, want = latents(tmp_path, prompt)
        assert_close(got, want, where=prompt)
        assert not torch.equal(got, plain)


@pytest.mark.parametrize("end", [49407, 2])
def test_where_a_prompt_with_a_learned_word_is_pooled(twin: Twin, tmp_path: Path, end: int) -> None:
    """With ``eos_token_id`` 2, as published, the reference pools where the largest id stands: at the learned word."""
    twin("sdxl")
    for part in ("text_encoder", "text_encoder_2"):
        edit(tmp_path / part / "config.json", eos_token_id=end)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path)
    sd: Any = weights_convert.load(tmp_path, device="cpu")
    g = torch.Generator().manual_seed(1)
    vectors = {"clip_l": torch.randn(1, 32, generator=g), "clip_g": torch.randn(1, 48, generator=g)}
    save_file(vectors, tmp_path / "word.safetensors")
    for part, tokenizer, name in (
        ("text_encoder", "tokenizer", "clip_l"),
        ("text_encoder_2", "tokenizer_2", "clip_g"),
    ):
        encoder, table = getattr(pipe, part), getattr(pipe, tokenizer)
        pipe.load_textual_inversion(vectors[name], token="<s0>", text_encoder=encoder, tokenizer=table)
        aligned(encoder)
    embeddings.add(sd, read_embedding(tmp_path / "word.safetensors", sd.config, "<s0>"))
    for prompt in ("a photo of <s0> here", "a photo"):
        assert_close(sd.encode_prompt(prompt)[1], pipe.encode_prompt(prompt)[2], where=prompt)
    assert ("pooled at the largest id" in notes(tmp_path)) == (end == 2)
    weights_convert.convert(tmp_path, tmp_path / "again", to="diffusers")
    assert json.loads((tmp_path / "again/text_encoder_2/config.json").read_text())["eos_token_id"] == end


REFUSED = [
    ("sd1", "text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask=True is not supported"),
    ("sd1", "tokenizer/tokenizer_config.json", {"padding_side": "left"}, "padding_side='left' is not supported"),
    ("sd1", "tokenizer/tokenizer_config.json", {"truncation_side": "left"}, "truncation_side='left' is not"),
    ("sd1", "model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer is a 'T5Tokenizer'"),
    ("sd1", "model_index.json", {"unet": ["my_code", "UNet2DConditionModel"]}, "unet comes from 'my_code'"),
    ("sd1", "model_index.json", {"unet": "UNet2DConditionModel"}, "should be a library and a class"),
    ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": "no"}, "should be true or false"),
    ("refiner", "model_index.json", {"requires_aesthetics_score": False}, "requires_aesthetics_score=False, but"),
    ("sdxl", "tokenizer/tokenizer_config.json", {"model_max_length": 60}, r"lengths \[60, 77\] differ"),
    ("ddpm", "model_index.json", {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "noise of the wrong size"),
]


@pytest.mark.parametrize(("kind", "file", "settings", "message"), REFUSED, ids=str)
def test_settings_that_are_refused(
    twin: Twin, tmp_path: Path, kind: str, file: str, settings: dict[str, Any], message: str
) -> None:
    twin(kind)
    weights_convert.open_source(tmp_path)
    edit(tmp_path / file, **settings)
    with pytest.raises((UnsupportedError, CheckpointError), match=message):
        weights_convert.open_source(tmp_path)


def test_a_first_encoder_with_a_projection_is_refused(tmp_path: Path) -> None:
    """The reference would take its pooled text, and not the second's."""
    pipe = twins.pipeline_twin("sdxl")
    pipe.text_encoder = twins.clip_twin("bigg", hidden_size=32, num_attention_heads=4)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="text_encoder is a CLIPTextModelWithProjection"):
        weights_convert.open_source(tmp_path)


def test_a_watermark_is_left_out_and_that_is_said(twin: Twin, tmp_path: Path) -> None:
    twin("sdxl")
    edit(tmp_path / "model_index.json", add_watermarker=True)
    assert "minidiff adds no invisible watermark" in notes(tmp_path)


def test_pndm_pipelines_have_a_scheduler_of_their_own(twin: Twin, tmp_path: Path) -> None:
    twin("ddpm")
    edit(tmp_path / "model_index.json", _class_name="PNDMPipeline")
    assert weights_convert.open_source(tmp_path).config.sampler["name"] == "pndm"


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_sides_that_are_said_outright_are_the_usual_ones(tmp_path: Path, side: str) -> None:
    twins.tokenizer_twin().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", **{side: "right"})
    texts = ["a photo", " ".join(f"word{i}" for i in range(120))]
    read = CLIPTokenizer.from_pretrained(tmp_path)
    want = read(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="was cut to 75"):
        assert torch.equal(Tokenizer(tokenizer_config(tmp_path))(texts), want)
