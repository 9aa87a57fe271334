"""Parts of a model from other files: every form in which they are published, and errors for those that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weights_convert
from minidiff import CheckpointError, ConfigError, StableDiffusion, cli
from minidiff.config import ModelConfig, TAESDConfig, from_json, to_json
from minidiff.models.taesd import TAESD
from minidiff.pipeline import random_model
from minidiff.storage import checkpoint
from tests.support import convert_sources as sources
from tests.support.tiny import DDPM, SD, redraw, tiny_ddpm, tiny_sd
from weights_convert import keys_diffusers, keys_original, keys_taesd

assert SD.vae is not None
assert SD.text_encoder is not None
VAE, TEXT = SD.vae, SD.text_encoder
OTHER: Any = tiny_sd(seed=1)  # where the parts come from
MAPS: dict[str, dict[str, Any]] = {
    "vae": {
        "diffusers": keys_diffusers.vae(VAE),
        "diffusers of 2022": keys_diffusers.vae(VAE, old_names=True, conv_attention=True),
        "original": keys_original.vae(VAE),
    },
    "unet": {"diffusers": keys_diffusers.unet(SD.unet), "original": keys_original.unet(SD.unet)},
    "text_encoder": {
        "diffusers": keys_diffusers.clip(TEXT),
        "no text_model": keys_diffusers.clip(TEXT, prefix=""),
        "original": keys_original.clip(TEXT),
        "original, no text_model": keys_original.clip(TEXT, prefix=""),
    },
}
PREFIX = {
    "vae": "first_stage_model.",
    "unet": "model.diffusion_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
# The key maps are generators, used up by the first walk.
TENSORS = {p: {f: sources.translated(m, OTHER.parts[p]) for f, m in forms.items()} for p, forms in MAPS.items()}
for part_, forms_ in TENSORS.items():
    cut = {k.removeprefix(PREFIX[part_]): t for k, t in forms_["original"].items()}
    forms_["original, cut out"] = cut
CASES = [(part, form) for part, forms in TENSORS.items() for form in forms]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tiny_sd().save(path)
    return path


def check(sd: Any, part: str, wanted: Any = OTHER) -> None:
    """``part`` is that of ``wanted``, and all the others are as they were."""
    for name, module in sd.parts.items():
        source = wanted if name == part else tiny_sd()
        for key, tensor in source.parts[name].state_dict().items():
            assert torch.equal(module.state_dict()[key], tensor), f"{name}.{key}"


@pytest.mark.parametrize(("part", "form"), CASES)
def test_a_bare_file(model: Path, tmp_path: Path, part: str, form: str) -> None:
    save_file(TENSORS[part][form], tmp_path / "part.safetensors")
    check(weights_convert.load(model, device="cpu", swap={part: tmp_path / "part.safetensors"}), part)


def test_a_pickle_with_what_training_left(model: Path, tmp_path: Path) -> None:
    """As the published vae-ft-mse-840000-ema-pruned.ckpt: a wrapper, no prefix, the weights of a loss beside."""
    tensors = {**TENSORS["vae"]["original, cut out"], "loss.logvar": torch.zeros(1)}
    tensors["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1, 1)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "vae.ckpt")
    source = weights_convert.open_source(model, swap={"vae": tmp_path / "vae.ckpt"})
    assert ("training loss", 2) in [(name, n) for name, n, _ in source.report.dropped]
    check(weights_convert.load(model, device="cpu", swap={"vae": tmp_path / "vae.ckpt"}), "vae")


@pytest.mark.parametrize("part", TENSORS)
def test_a_part_of_a_whole_checkpoint(model: Path, tmp_path: Path, part: str) -> None:
    whole = {k: t for p in TENSORS for k, t in TENSORS[p]["original"].items()}
    save_file(whole, tmp_path / "whole.safetensors")
    source = weights_convert.open_source(model, swap={part: tmp_path / "whole.safetensors"})
    assert ("other parts", len(whole) - len(TENSORS[part]["original"])) in [(n, c) for n, c, _ in source.report.dropped]
    check(weights_convert.load(model, device="cpu", swap={part: tmp_path / "whole.safetensors"}), part)


@pytest.mark.parametrize("part", TENSORS)
def test_a_part_of_a_minidiff_file(model: Path, tmp_path: Path, part: str) -> None:
    OTHER.save(tmp_path / "other.safetensors")
    check(weights_convert.load(model, device="cpu", swap={part: tmp_path / "other.safetensors"}), part)


@pytest.mark.parametrize("where", ["component", "pipeline"])
def test_a_folder_brings_its_own_config(model: Path, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "pipe" / "vae"
    sources.write_json(folder / "config.json", sources.VAE_JSON | {"scaling_factor": 0.5})
    save_file(TENSORS["vae"]["diffusers"], folder / "diffusion_pytorch_model.safetensors")
    path = folder if where == "component" else tmp_path / "pipe"
    sd = weights_convert.load(model, device="cpu", swap={"vae": path})
    check(sd, "vae")
    assert isinstance(sd, StableDiffusion)
    assert sd.vae.config.scaling_factor == 0.5


def test_several_at_once_and_none(model: Path, tmp_path: Path) -> None:
    for part, forms in TENSORS.items():
        save_file(forms["diffusers"], tmp_path / f"{part}.safetensors")
    swap = {part: tmp_path / f"{part}.safetensors" for part in TENSORS}
    out = tmp_path / "out.safetensors"
    report = weights_convert.convert(model, out, swap=swap)
    for part, module in OTHER.parts.items():
        lazies = checkpoint.open_checkpoint(out).file.lazy
        assert all(torch.equal(lazies[f"{part}.{k}"].load(), t) for k, t in module.state_dict().items())
        assert f"{part}: taken from {swap[part]} (diffusers layout)" in str(report)
    weights_convert.convert(model, tmp_path / "same.safetensors", swap={"vae": None})
    assert (tmp_path / "same.safetensors").read_bytes() == model.read_bytes()


def test_unet_and_text_encoder_of_another_width_come_together(model: Path, tmp_path: Path) -> None:
    config = replace(SD, unet=replace(SD.unet, context_dim=24), text_encoder=replace(TEXT, width=24))
    random_model(config).save(tmp_path / "wide.safetensors")
    wide = tmp_path / "wide.safetensors"
    found = weights_convert.open_source(model, swap={"unet": wide, "text_encoder": wide}).config
    assert (found.unet, found.text_encoder) == (config.unet, config.text_encoder)
    with pytest.raises(CheckpointError, match=r"unet given: they do not fit the rest of the model \(context_dim=24"):
        weights_convert.open_source(model, swap={"unet": wide})


# ---- TAESD


def tiny_vae() -> TAESD:
    torch.manual_seed(0)
    vae = TAESD(TAESDConfig(width=8)).eval()
    redraw(vae, 3)
    return vae


def test_tiny_autoencoder_from_its_authors_files(model: Path, tmp_path: Path) -> None:
    vae = tiny_vae()
    tensors = sources.translated(keys_taesd.taesd(vae.config, original=True), vae)
    for half in ("encoder", "decoder"):
        own: dict[str, Tensor] = {k.removeprefix(f"{half}."): t for k, t in tensors.items() if k.startswith(half)}
        assert all(k[0].isdigit() for k in own)
        torch.save(own, tmp_path / f"taesd_{half}.pth")
    for path in (tmp_path, tmp_path / "taesd_encoder.pth", tmp_path / "taesd_decoder.pth"):
        sd = weights_convert.load(model, device="cpu", swap={"vae": path})
        assert isinstance(sd, StableDiffusion)
        for key, tensor in vae.state_dict().items():
            assert torch.equal(sd.vae.state_dict()[key], tensor)
        z = torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            assert torch.equal(sd.decode(z), (vae.decode(z) / 2 + 0.5).clamp(0, 1))


def test_tiny_autoencoder_in_a_config() -> None:
    config = replace(SD, vae=TAESDConfig(width=8, blocks=(1, 2)))
    assert from_json(ModelConfig, to_json(config)) == config
    assert TAESDConfig(blocks=(1, 2)).factor == 2
    assert from_json(ModelConfig, to_json(SD)).vae == SD.vae
    wrong = json.loads(to_json(config))
    wrong["vae"]["widht"] = 3
    with pytest.raises(ConfigError, match="unknown field"):
        from_json(ModelConfig, wrong)
    with pytest.raises(ConfigError, match="width"):
        TAESDConfig(width=0)
    with pytest.raises(ConfigError, match="blocks"):
        TAESDConfig(blocks=(1, -1))


def test_info_of_a_tiny_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model(replace(SD, vae=TAESDConfig(width=8))).save(tmp_path / "m.safetensors")
    assert cli.main(["info", str(tmp_path / "m.safetensors")]) == 0
    assert "tiny, width 8; 4 latent channels, 1/8 the side" in capsys.readouterr().out


# ---- what does not fit


def refused(model: Path, part: str, path: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        weights_convert.open_source(model, swap={part: path})
    assert "\n" not in str(caught.value)


def test_other_shapes(model: Path, tmp_path: Path) -> None:
    tensors = dict(TENSORS["vae"]["original"])
    key = "first_stage_model.decoder.conv_in.weight"
    save_file({**tensors, key: torch.zeros(16, 8, 3, 3)}, tmp_path / "wide.safetensors")
    words = r"wide\.safetensors: tensor .* has shape \[16, 8, 3, 3\].*it has to fit the vae that it replaces"
    refused(model, "vae", tmp_path / "wide.safetensors", CheckpointError, words)
    del tensors[key]
    save_file(tensors, tmp_path / "less.safetensors")
    refused(model, "vae", tmp_path / "less.safetensors", CheckpointError, "is missing")
    save_file({**TENSORS["vae"]["original, cut out"], "surprise": torch.zeros(1)}, tmp_path / "more.safetensors")
    refused(model, "vae", tmp_path / "more.safetensors", CheckpointError, "'surprise' is unknown")


def test_no_such_part(model: Path, tmp_path: Path) -> None:
    save_file(TENSORS["unet"]["diffusers"], tmp_path / "unet.safetensors")
    refused(
        model, "vae", tmp_path / "unet.safetensors", CheckpointError, "holds no vae in a known form; its .* keys begin"
    )
    refused(model, "vea", tmp_path / "unet.safetensors", ConfigError, "no such part to replace; it has unet, vae, text")
    refused(model, "vae", tmp_path / "none.safetensors", CheckpointError, "no such file or folder")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    refused(model, "vae", tmp_path / "broken.safetensors", CheckpointError, "not a readable safetensors file")
    (tmp_path / "empty").mkdir()
    refused(model, "vae", tmp_path / "empty", CheckpointError, "no such file")
    tiny_ddpm().save(tmp_path / "ddpm.safetensors")
    refused(model, "vae", tmp_path / "ddpm.safetensors", CheckpointError, "family tiny ddpm, which has no vae")
    refused(tmp_path / "ddpm.safetensors", "vae", model, ConfigError, "it has unet")
    sources.write_json(tmp_path / "kind" / "config.json", sources.VAE_JSON)
    save_file(TENSORS["vae"]["diffusers"], tmp_path / "kind" / "diffusion_pytorch_model.safetensors")
    refused(model, "unet", tmp_path / "kind", CheckpointError, "is of another kind, a VAEConfig; a unet is wanted")
    assert DDPM.vae is None


# ---- the command


def test_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae, out = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    save_file(TENSORS["vae"]["original"], vae)
    text = tmp_path / "text.safetensors"
    save_file(TENSORS["text_encoder"]["diffusers"], text)
    options = ["--vae", str(vae), "--text-encoder", str(text)]
    assert cli.main(["convert", str(model), str(out), *options]) == 0
    said = capsys.readouterr().out
    assert f"vae: taken from {vae} (original layout)" in said
    assert f"text_encoder: taken from {text} (diffusers layout)" in said
    pictures = []
    for name, more in (
        ("a", ["--model", str(out)]),
        ("b", ["--model", str(model), *options]),
        ("c", ["--model", str(model)]),
    ):
        argv = [
            "generate",
            "a fox",
            *more,
            "--steps",
            "1",
            "--seed",
            "3",
            "--quiet",
            "--out",
            str(tmp_path / f"{name}.png"),
        ]
        assert cli.main(argv) == 0
        from PIL import Image

        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert cli.main(["convert", str(model), str(tmp_path / "x"), "--unet", str(vae)]) == 2
    assert "holds no unet" in capsys.readouterr().err
