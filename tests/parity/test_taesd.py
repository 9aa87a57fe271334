"""The tiny autoencoder against the reference's, from its folder and from its author's two files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import weights_convert
from minidiff import CheckpointError, ConfigError, UnsupportedError, cli
from minidiff.config import TAESDConfig
from minidiff.models.taesd import TAESD
from minidiff.pipeline import StableDiffusion, load, preview
from minidiff.storage import checkpoint
from tests.support.parity import twins
from tests.support.tiny import tiny_ddpm
from tests.tolerances import assert_close
from weights_convert.component import meta_model
from weights_convert.configs_diffusers import Options
from weights_convert.configs_diffusers import taesd as read_config
from weights_convert.engine import expand
from weights_convert.keys_taesd import taesd

SMALL: dict[str, Any] = {
    "encoder_block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "num_encoder_blocks": (1, 3, 2, 1),
    "num_decoder_blocks": (1, 2, 3, 1),
}
HALVES = ("encoder", "decoder")
ORDINARY = SMALL | {"num_encoder_blocks": (1, 3, 3, 3), "num_decoder_blocks": (3, 3, 3, 1)}


def twin(**options: Any) -> Any:
    return twins.redraw(AutoencoderTiny(**options), 5)


def author_files(reference: Any, folder: Path, suffix: str = ".safetensors", name: str = "taesd_") -> None:
    """The reference's weights as the author's two files: flat lists of layers, the decoder's with a clamp in front."""
    for half in HALVES:
        tensors: dict[str, Tensor] = {}
        for key, tensor in getattr(reference, half).state_dict().items():
            _, number, rest = key.split(".", 2)
            tensors[f"{int(number) + (half == 'decoder')}.{rest}"] = tensor.clone()
        file = folder / f"{name}{half}{suffix}"
        if suffix == ".safetensors":
            save_file(tensors, file)
        else:
            torch.save(tensors, file)


@pytest.mark.parametrize("options", [SMALL, ORDINARY | {"latent_channels": 16}], ids=["uneven", "16 channels"])
@torch.no_grad()
def test_models_are_equal(options: dict[str, Any]) -> None:
    reference = twin(**options)
    model = twins.ours(reference)
    assert isinstance(model, TAESD)
    for size in ((16, 16), (40, 24), (36, 20)):
        for batch in (1, 2, 3):
            g = torch.Generator().manual_seed(batch)
            pixels = torch.rand(batch, 3, *size, generator=g) * 2 - 1
            where = f"batch {batch} {size}"
            latents = reference.encode(pixels).latents
            assert latents.std() > 0.05
            got = model.encode(pixels)
            assert_close(got.mean, latents, where=f"latents {where}")
            before = torch.Generator().manual_seed(7)
            assert_close(got.sample(before), latents, where="sample")
            assert torch.equal(before.get_state(), torch.Generator().manual_seed(7).get_state())  # nothing was drawn
            z = 4 * torch.randn(latents.shape, generator=g)
            assert_close(model.decode(z), reference.decode(z).sample, where=f"decode {where}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image twin whose autoencoder has a factor of 8, as the tiny one's is."""
    folder = tmp_path_factory.mktemp("base")
    pipe = twins.pipeline_twin()
    pipe.vae = twins.vae_twin(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )
    pipe.save_pretrained(folder / "folder")
    weights_convert.convert(folder / "folder", folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", ["folder", ".safetensors", ".pth", "one of the pair"])
def test_instead_of_the_large_one(base: Path, tmp_path: Path, form: str) -> None:
    """From prompt to pixels with the tiny decoder, as the reference with its ``vae`` replaced."""
    tiny = twin(**ORDINARY)
    place = tmp_path / "tiny"
    place.mkdir()
    if form == "folder":
        tiny.save_pretrained(place)
    else:
        author_files(tiny, place, ".safetensors" if form == "one of the pair" else form)
    if form == "one of the pair":
        place = place / "taesd_decoder.safetensors"
    sd = weights_convert.load(base / "model.safetensors", device="cpu", swap={"vae": place})
    assert isinstance(sd, StableDiffusion)
    assert isinstance(sd.vae, TAESD)
    theirs = DiffusionPipeline.from_pretrained(base / "folder", local_files_only=True)
    theirs.vae = tiny
    theirs.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(3)
    want = theirs("a fox", num_inference_steps=2, generator=seed, output_type="pt").images
    seed = torch.Generator().manual_seed(3)
    assert_close(sd.generate("a fox", steps=2, generator=seed, output="tensor", progress=False), want)


def place_of(tiny: Any, place: Path, form: str) -> Path:
    """Write ``tiny`` in one of the forms in which it is found; return the path to give."""
    place.mkdir()
    if form in ("folder", "bare file"):
        tiny.save_pretrained(place)
        return place if form == "folder" else place / "diffusion_pytorch_model.safetensors"
    author_files(
        tiny, place, ".pth" if ".pth" in form else ".safetensors", name="taesdxl_" if "XL" in form else "taesd_"
    )
    if "alone" in form:
        (gone,) = place.glob("*encoder.*")
        gone.unlink()
    (decoder,) = place.glob("*decoder.*")
    return place if form == "pair" else decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["folder", "bare file", "pair", "decoder.pth alone", "XL decoder alone"])
def test_a_decoder_for_previews(
    base: Path, tmp_path: Path, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the pixels of the reference's pipeline with its ``vae`` replaced, to the last bit, and leaves the model
    as it is: latents are what the UNet sees, and only the decoder is read."""
    tiny = twin(**ORDINARY)
    path = place_of(tiny, tmp_path / "tiny", form)
    config = load(base / "model.safetensors", device="cpu").config
    assert config.vae is not None
    assert config.vae.scaling_factor != tiny.config.scaling_factor == 1
    read, convert = [], checkpoint.convert
    monkeypatch.setattr(checkpoint, "convert", lambda tensor, *to: read.append(tensor) or convert(tensor, *to))
    decode = weights_convert.open_decoder(path, config, torch.device("cpu"), dtype)
    assert len(read) == len(tiny.decoder.state_dict())
    theirs = DiffusionPipeline.from_pretrained(base / "folder", local_files_only=True)
    tiny = tiny.to(dtype)
    for shape in ((1, 4, 8, 8), (2, 4, 5, 9)):
        latents = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))  # beyond the limit of 3
        with torch.no_grad():
            raw = tiny.decode(latents.to(dtype) / tiny.config.scaling_factor, return_dict=False)[0]
        want = theirs.image_processor.postprocess(raw, output_type="pt")
        assert want.std() > 0.05
        assert_close(decode(latents), want)


def test_the_picture_of_a_preview(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--preview-vae``: the file shows what the reference's small decoder makes of the latest estimate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preview, "SHARE", math.inf)  # renewed at each step
    tiny = twin(**ORDINARY)
    given = place_of(tiny, tmp_path / "tiny", "decoder.pth alone")
    options = ["--model", base / "model.safetensors", "--steps", 3, "--sampler", "ddim", "--seed", 5, "--plain"]
    shown = ["--out", "a.png", "--preview", "p.png", "--preview-vae", given, "--quiet"]
    assert cli.main(["generate", "a fox", *map(str, [*options, *shown])]) == 0
    sd = load(base / "model.safetensors", device="cpu")
    assert isinstance(sd, StableDiffusion)
    *_, last = sd.steps("a fox", steps=3, sampler="ddim", seed=5)
    with torch.no_grad():
        raw = tiny.decode(last.x0, return_dict=False)[0]
    (want,) = VaeImageProcessor().postprocess(raw, output_type="pil")
    with Image.open("p.png") as found:
        side = found.width // want.width
        assert side * want.width == found.width
        assert np.array_equal(np.asarray(found)[::side, ::side], np.asarray(want))


def test_decoders_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    config = load(base / "model.safetensors", device="cpu").config
    for options, words in (
        ({"latent_channels": 16}, "has 16 channels of latents, and this sd1 model 4"),
        ({"num_encoder_blocks": (1, 3), "num_decoder_blocks": (3, 1)}, "has 2 pixels for one latent along a side"),
    ):
        sized = {f"{half}_block_out_channels": (8,) * len(options.get("num_encoder_blocks", "four")) for half in HALVES}
        path = place_of(twin(**ORDINARY | sized | options), tmp_path / words[:6], "folder")
        with pytest.raises(CheckpointError, match=words):
            weights_convert.open_decoder(path, config, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="works on pixels"):
        weights_convert.open_decoder(path, replace(tiny_ddpm().config), torch.device("cpu"), torch.float32)
    for name in ("taesd_", "taesdxl_"):
        author_files(twin(**ORDINARY), tmp_path, name=name)
    with pytest.raises(CheckpointError, match=r"several tiny autoencoders; name a file of one: taesd_encoder\.safe"):
        weights_convert.open_decoder(tmp_path, config, torch.device("cpu"), torch.float32)


def test_it_is_kept_in_a_file_and_exported(base: Path, tmp_path: Path) -> None:
    """In minidiff's own file, and from there as an AutoencoderTiny folder; the original layout has no place for it."""
    tiny = twin(**ORDINARY)
    tiny.save_pretrained(tmp_path / "tiny")
    report = weights_convert.convert(base / "folder", tmp_path / "m.safetensors", swap={"vae": tmp_path / "tiny"})
    assert f"vae: taken from {tmp_path / 'tiny'}" in str(report)
    sd = load(tmp_path / "m.safetensors", device="cpu")
    assert isinstance(sd.config.vae, TAESDConfig)
    weights_convert.convert(tmp_path / "m.safetensors", tmp_path / "out", to="diffusers")
    back = AutoencoderTiny.from_pretrained(tmp_path / "out" / "vae", local_files_only=True).state_dict()
    for key, tensor in tiny.state_dict().items():
        assert_close(back[key], tensor, where=key)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert isinstance(pipe.vae, AutoencoderTiny)
    weights_convert.convert(tmp_path / "out", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(UnsupportedError, match="tiny autoencoder has no place"):
        weights_convert.convert(tmp_path / "m.safetensors", tmp_path / "o.safetensors", to="original")


def test_the_published_size() -> None:
    """Names and shapes of the reference with its defaults, which are those of the published weights."""
    with torch.device("meta"):
        reference = AutoencoderTiny()
    config = read_config(Options({**reference.config, "_class_name": "AutoencoderTiny"}, "here"))
    assert config == TAESDConfig()
    model = meta_model(config)
    shapes = {k: tuple(p.shape) for k, p in model.state_dict().items()}
    theirs = {k: tuple(p.shape) for k, p in reference.state_dict().items()}
    assert {p.theirs: shapes[p.ours] for p in expand(taesd(config), model)} == theirs
    assert [sum(p.numel() for p in half.parameters()) for half in model.children()] == [1_222_532, 1_222_531]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"act_fn": "silu"}, "act_fn='silu'"),
        ({"num_decoder_blocks": [3, 3, 3, 3]}, "num_decoder_blocks"),
        ({"encoder_block_out_channels": [64, 64, 64, 32]}, "encoder_block_out_channels"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
    ],
)
def test_options_that_it_does_not_have(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        read_config(Options({"_class_name": "AutoencoderTiny", **options}, "here"))


def test_half_of_the_pair(base: Path, tmp_path: Path) -> None:
    author_files(twin(**ORDINARY), tmp_path)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"taesd_encoder\.safetensors: no such file"):
        weights_convert.open_source(base / "model.safetensors", swap={"vae": tmp_path})
    save_file(load_file(tmp_path / "taesd_decoder.safetensors"), tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(CheckpointError, match="not the tiny autoencoder's layers"):
        weights_convert.open_source(base / "model.safetensors", swap={"vae": tmp_path})
