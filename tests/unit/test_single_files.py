"""Single files as they are published: under other key names, without a part, in float8, or no model at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor

import minidiff
import weights_convert
import weights_convert.__main__
from minidiff import CheckpointError, UnsupportedError, cli
from minidiff.config import CLIPTextConfig, TAESDConfig
from minidiff.pipeline import random_model
from minidiff.storage.files import TensorFile
from tests.support.convert_sources import OVERRIDE, original_tensors, translated, write_folder
from tests.support.tiny import SD, tiny_sd
from weights_convert import keys_diffusers
from weights_convert.tensors import read_tensors

VAE, TEXT, UNET = "first_stage_model.", "cond_stage_model.transformer.", "model.diffusion_model."


def without(*prefixes: str) -> dict[str, Tensor]:
    return {k: t for k, t in original_tensors().items() if not k.startswith(prefixes)}


def bare(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in original_tensors().items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as minidiff's file, which every form must become."""
    folder = tmp_path_factory.mktemp("whole")
    save_file(original_tensors(), folder / "one.safetensors")
    weights_convert.convert(folder / "one.safetensors", folder / "whole.safetensors", config=OVERRIDE)
    return folder / "whole.safetensors"


# --- told by content -------------------------------------------------------------------------------------------------


def write_misnamed(folder: Path) -> list[Path]:
    """Safetensors under the names of pickles, pickles under those of safetensors, and names that say nothing."""
    tensors = original_tensors()
    stored = ("really_safetensors.ckpt", "UPPER.SAFETENSORS", "really_safetensors.bin", "no_suffix", "odd.png")
    for name in stored:
        save_file(tensors, folder / name)
    pickled = ("really_pickle.safetensors", "also_pickle.PT", "no_suffix_either", "picture.png")
    for k, name in enumerate(pickled):
        torch.save({"state_dict": tensors}, folder / name, _use_new_zipfile_serialization=k % 2 == 0)
    return [folder / name for name in (*stored, *pickled)]


def test_files_under_other_names(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Library and command line read each by its content, and write the very same file."""
    (tmp_path / "config.json").write_text(json.dumps(OVERRIDE))
    for path in write_misnamed(tmp_path):
        out = tmp_path / "out.safetensors"
        weights_convert.convert(path, out, config=OVERRIDE)
        assert out.read_bytes() == whole.read_bytes(), path.name
        out.unlink()
        options = ["--config", str(tmp_path / "config.json")]
        assert cli.main(["convert", str(path), str(out), *options]) == 0, path.name
        assert out.read_bytes() == whole.read_bytes(), path.name
        out.unlink()
        assert cli.main(["info", str(path)]) == 2, path.name  # recognised; what shapes can't tell is missing
        assert "if it is a relative of sd1" in capsys.readouterr().err, path.name


def test_minidiffs_own_file_under_other_names(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.ckpt", "model", "model.PNG"):
        shutil.copy(whole, tmp_path / name)
        assert minidiff.load(tmp_path / name).hash == minidiff.load(whole).hash
        assert weights_convert.open_source(tmp_path / name).report.layout == "minidiff"
        assert cli.main(["info", str(tmp_path / name)]) == 0
        assert "family" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_parts_under_other_names(tmp_path: Path, whole: Path, part: str) -> None:
    prefix = VAE if part == "vae" else TEXT
    save_file(bare(prefix), tmp_path / "part.pt")
    torch.save(bare(prefix), tmp_path / "part.safetensors")
    for name in ("part.pt", "part.safetensors"):
        found = weights_convert.open_source(whole, swap={part: tmp_path / name})
        want = TensorFile(whole).lazy
        assert all(torch.equal(t.load(), want[k].load()) for k, t in found.tensors.items()), name


def test_components_under_other_names(tmp_path: Path) -> None:
    """A safetensors file that is called .bin inside a folder."""
    folder = write_folder(tmp_path / "folder")
    want = {k: t.load().clone() for k, t in weights_convert.open_source(folder).tensors.items()}
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = folder / part / f"{name}.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin"))
    found = weights_convert.open_source(folder).tensors
    assert all(torch.equal(found[k].load(), t) for k, t in want.items())


MISTAKEN = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 3438\n", "Git LFS"),
    "page": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", "web page"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
    "empty": (b"", "empty"),
    "text": (b"Access to this model is restricted.", "a text"),
}


@pytest.mark.parametrize("what", MISTAKEN)
def test_what_is_no_model_is_called_what_it_is(
    tmp_path: Path, whole: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every place where a model's file, or a part's, can be named; with one line that says what to do."""
    data, words = MISTAKEN[what]
    folder = write_folder(tmp_path / "folder")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    places = [folder]
    for name in ("a.safetensors", "a.ckpt", "a.bin", "a"):
        (tmp_path / name).write_bytes(data)
        places.append(tmp_path / name)
    for place in places:
        with pytest.raises(CheckpointError, match=words) as caught:
            weights_convert.open_source(place)
        assert "\n" not in str(caught.value)
        assert cli.main(["convert", str(place), str(tmp_path / "out.safetensors")]) == 2
        assert words in capsys.readouterr().err
        assert cli.main(["info", str(place)]) == 2
        assert words in capsys.readouterr().err
    for place in places[1:]:
        for call in (
            lambda place=place: minidiff.load(place),
            lambda place=place: weights_convert.open_source(whole, swap={"vae": place}),
            lambda place=place: read_tensors(place),
        ):
            with pytest.raises(CheckpointError, match=words):
                call()


def test_load_says_which_call_reads_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder")
    save_file(original_tensors(), tmp_path / "one.safetensors")
    torch.save(original_tensors(), tmp_path / "one.ckpt")
    torch.save(original_tensors(), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name, what in {
        "folder": "is a folder",
        "one.safetensors": "a safetensors file",
        "one.ckpt": "is a pickle",
        "old.safetensors": "is a pickle",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            minidiff.load(tmp_path / name)
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / name}: {what}")
        assert "weights_convert.load" in said
        assert "minidiff convert" in said


# --- without a part --------------------------------------------------------------------------------------------------


def test_without_a_vae(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --vae it is the whole model, in whichever form the VAE comes."""
    save_file(without(VAE), tmp_path / "novae.safetensors")
    save_file(bare(VAE), tmp_path / "bare.safetensors")
    save_file({f"{VAE}{k}": t for k, t in bare(VAE).items()}, tmp_path / "prefixed.safetensors")
    torch.save({"state_dict": bare(VAE)}, tmp_path / "vae.pt")
    assert SD.vae is not None
    save_file(translated(keys_diffusers.vae(SD.vae), tiny_sd().parts["vae"]), tmp_path / "diffusers.safetensors")
    folder = write_folder(tmp_path / "folder")
    (tmp_path / "config.json").write_text(json.dumps(OVERRIDE))
    forms = ("bare.safetensors", "prefixed.safetensors", "vae.pt", "diffusers.safetensors", "folder", "folder/vae")
    for form in (*forms, whole):
        out = tmp_path / "out.safetensors"
        given = tmp_path / form
        weights_convert.convert(tmp_path / "novae.safetensors", out, config=OVERRIDE, swap={"vae": given})
        assert out.read_bytes() == whole.read_bytes(), form
        out.unlink()
    options = ["--vae", str(folder), "--config", str(tmp_path / "config.json")]
    assert cli.main(["convert", str(tmp_path / "novae.safetensors"), str(out), *options]) == 0
    assert out.read_bytes() == whole.read_bytes()
    for call in (weights_convert.open_source, weights_convert.load, weights_convert.detect):
        if call is weights_convert.detect:
            assert call(tmp_path / "novae.safetensors").family == "sd1"
            continue
        with pytest.raises(CheckpointError, match=r"the VAE is missing; .* with --vae PATH \(swap="):
            call(tmp_path / "novae.safetensors")
    assert cli.main(["info", str(tmp_path / "novae.safetensors")]) == 2
    printed = capsys.readouterr()
    assert "family    sd1" in printed.out
    assert "the VAE is missing" in printed.err
    pipe = weights_convert.load(tmp_path / "novae.safetensors", config=OVERRIDE, swap={"vae": folder})
    settings: dict[str, Any] = {"steps": 2, "seed": 0, "output": "tensor", "progress": False}
    want = minidiff.load(whole).generate("a fox", **settings)
    assert torch.equal(pipe.generate("a fox", **settings), want)


def test_without_a_text_encoder_and_without_both(tmp_path: Path, whole: Path) -> None:
    save_file(without(TEXT), tmp_path / "notext.safetensors")
    save_file(without(TEXT, VAE), tmp_path / "unet.safetensors")
    save_file(bare(VAE), tmp_path / "vae.safetensors")
    assert SD.text_encoder is not None
    hugging = translated(keys_diffusers.clip(SD.text_encoder), tiny_sd().parts["text_encoder"])
    save_file(hugging, tmp_path / "text.safetensors")
    save_file({k.removeprefix("text_model."): t for k, t in hugging.items()}, tmp_path / "plain.safetensors")
    save_file(bare(TEXT), tmp_path / "cut.safetensors")
    folder = write_folder(tmp_path / "folder")
    out = tmp_path / "out.safetensors"
    places = [tmp_path / f"{name}.safetensors" for name in ("text", "plain", "cut")]
    for text in (*places, folder, folder / "text_encoder", whole):
        found = weights_convert.detect(tmp_path / "notext.safetensors")
        assert found.family == "sd1"
        swap = {"text_encoder": text}
        weights_convert.convert(tmp_path / "notext.safetensors", out, config=OVERRIDE, swap=swap)
        assert out.read_bytes() == whole.read_bytes(), text
        swap["vae"] = tmp_path / "vae.safetensors"
        weights_convert.convert(tmp_path / "unet.safetensors", out, config=OVERRIDE, swap=swap)
        assert out.read_bytes() == whole.read_bytes(), text
    with pytest.raises(CheckpointError, match=r"the text encoder is missing; .* --text-encoder PATH"):
        weights_convert.open_source(tmp_path / "notext.safetensors", config=OVERRIDE)
    with pytest.raises(
        CheckpointError, match=r"the VAE and the text encoder are missing; .* --vae PATH --text-encoder PATH"
    ):
        weights_convert.open_source(tmp_path / "unet.safetensors", config=OVERRIDE)
    with pytest.raises(CheckpointError, match=r"the text encoder is missing; .* --text-encoder PATH"):
        weights_convert.open_source(tmp_path / "unet.safetensors", swap={"vae": tmp_path / "vae.safetensors"})
    with pytest.raises(CheckpointError, match="no such file"):
        weights_convert.open_source(tmp_path / "notext.safetensors", swap={"text_encoder": tmp_path / "none"})


def test_a_part_that_is_none(tmp_path: Path) -> None:
    save_file(without(VAE), tmp_path / "novae.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors.*'encoder.conv_in.weight' is missing"):
        weights_convert.open_source(tmp_path / "novae.safetensors", swap={"vae": tmp_path / "other.safetensors"})


def test_a_tiny_autoencoder_for_a_file_without_one(tmp_path: Path) -> None:
    config = TAESDConfig(width=8, blocks=(1, 1))
    small = random_model(replace(SD, vae=config), seed=3)
    assert isinstance(small, minidiff.StableDiffusion)
    small.save(tmp_path / "small.safetensors")
    save_file(without(VAE), tmp_path / "novae.safetensors")
    given = {"vae": tmp_path / "small.safetensors"}
    rest = {k: v for k, v in OVERRIDE.items() if k != "vae"}
    found = weights_convert.open_source(tmp_path / "novae.safetensors", config=rest, swap=given)
    assert found.config.vae == config
    assert isinstance(found.config.text_encoder, CLIPTextConfig)
    for key, tensor in small.vae.state_dict().items():
        assert torch.equal(found.tensors[f"vae.{key}"].load(), tensor)


# --- float8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_float16(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every value there is, NaN and infinities too; and a whole checkpoint, in any dtype that is asked for."""
    every = torch.arange(256).to(torch.uint8).view(dtype)
    save_file({"a": every.view(16, 16)}, tmp_path / "a.safetensors")
    got = TensorFile(tmp_path / "a.safetensors").lazy["a"]
    assert (got.shape, got.dtype, got.load().dtype) == ((16, 16), torch.float16, torch.float16)
    assert torch.equal(got.load().view(-1).float().nan_to_num(7), every.float().nan_to_num(7))
    tensors = {k: t.to(dtype) if k.startswith(UNET) else t for k, t in original_tensors().items()}
    save_file(tensors, tmp_path / "one.safetensors")
    torch.save(tensors, tmp_path / "one.ckpt")
    plain = {k: t.float() if k.startswith(UNET) else t for k, t in tensors.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    want = weights_convert.open_source(tmp_path / "plain.safetensors", config=OVERRIDE).tensors
    for name in ("one.safetensors", "one.ckpt"):
        for option in (None, "float32", "float16"):
            weights_convert.convert(tmp_path / name, tmp_path / "out.safetensors", config=OVERRIDE, dtype=option)
            for key, found in TensorFile(tmp_path / "out.safetensors").lazy.items():
                kept = torch.float16 if key.startswith("unet.") else torch.float32
                kind = kept if option is None else getattr(torch, option)
                assert found.dtype == kind, (name, option, key)
                assert torch.equal(found.load(), want[key].load().to(kind)), (name, option, key)


def test_float8_inside_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    narrow = {k: t.to(torch.float8_e4m3fn) for k, t in safetensors.torch.load_file(file).items()}
    save_file(narrow, file)
    found = weights_convert.open_source(folder).tensors
    want = translated(keys_diffusers.unet(SD.unet), tiny_sd().unet)
    assert len(found) > len(narrow) == len(want)
    got = {k: t.load() for k, t in found.items() if k.startswith("unet.")}
    for key, tensor in tiny_sd().unet.state_dict().items():
        assert torch.equal(got[f"unet.{key}"], tensor.to(torch.float8_e4m3fn).to(torch.float16)), key


@pytest.mark.parametrize(
    "key",
    [
        f"{UNET}scaled_fp8",
        "scaled_fp8",
        f"{UNET}out.2.scale_weight",
        f"{UNET}out.2.scale_input",
        f"{UNET}out.2.weight_scale",
        f"{UNET}out.2.comfy_quant",
    ],
)
def test_scaled_float8_is_refused_by_name(tmp_path: Path, key: str) -> None:
    tensors = {k: t.to(torch.float8_e4m3fn) if k.startswith(UNET) else t for k, t in original_tensors().items()}
    tensors[key] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "one.safetensors")
    torch.save(tensors, tmp_path / "one.ckpt")
    for name in ("one.safetensors", "one.ckpt"):
        with pytest.raises(UnsupportedError, match=f"has '{key}', so its weights are 8-bit numbers with scales"):
            weights_convert.open_source(tmp_path / name, config=OVERRIDE)


# --- a copy ----------------------------------------------------------------------------------------------------------


def test_a_copy_outlives_its_file(tmp_path: Path, whole: Path) -> None:
    """A mapped file that someone truncates ends the process; weights that were copied are the process's own."""
    settings: dict[str, Any] = {"steps": 2, "seed": 0, "output": "tensor", "progress": False}
    want = minidiff.load(whole).generate("a fox", **settings)
    for name, load in (("own", minidiff.load), ("any", weights_convert.load)):
        path = tmp_path / f"{name}.safetensors"
        shutil.copy(whole, path)
        pipe = load(path, copy=True)
        os.truncate(path, 0)
        assert torch.equal(pipe.generate("a fox", **settings), want)
    with pytest.raises(minidiff.ConfigError, match=r"copy.*low_memory"):
        minidiff.load(whole, copy=True, low_memory=True)
    with pytest.raises(minidiff.ConfigError, match=r"copy.*low_memory"):
        weights_convert.load(whole, copy=True, low_memory=True)


def test_without_a_copy_it_is_mapped(tmp_path: Path, whole: Path) -> None:
    """The counterpart: what is written into the file is seen."""
    shutil.copy(whole, tmp_path / "model.safetensors")
    plain, copied = (minidiff.load(tmp_path / "model.safetensors", copy=copy) for copy in (False, True))
    data = (tmp_path / "model.safetensors").read_bytes()
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(bytes(len(data)))
    assert all(not p.any() for p in [max(plain.unet.parameters(), key=Tensor.numel)])
    assert all(p.any() for p in [max(copied.unet.parameters(), key=Tensor.numel)])


# --- names and texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("foo.txt", "minidiff", r"never as pickles or anything else; name it \.safetensors"),
        ("foo.ckpt", "minidiff", r"name it \.safetensors"),
        ("foo.PNG", "minidiff", r"name it \.safetensors"),
        ("foo.v1.5", "original", r"name it \.safetensors"),
        ("foo.pt", "original", r"name it \.safetensors"),
        ("foo.safetensors", "diffusers", "writes a folder; name it foo"),
        ("foo.ckpt", "diffusers", "writes a folder; name it foo"),
        ("foo.txt", "diffusers", "writes a folder; name it foo"),
    ],
)
def test_a_target_is_named_for_its_layout(
    tmp_path: Path, whole: Path, name: str, to: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if to != "diffusers":
        with pytest.raises(minidiff.ConfigError, match=words):
            weights_convert.convert(whole, tmp_path / name, to=to)
    assert cli.main(["convert", str(whole), str(tmp_path / name), "--to", to]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said)
    assert said.count("\n") == 1
    assert weights_convert.__main__.main([str(whole), str(tmp_path / name), "--to", to]) == 2
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_right(tmp_path: Path, whole: Path) -> None:
    for name, to in (("A.SAFETENSORS", "minidiff"), ("b", "original"), ("model-v1.5", "diffusers")):
        weights_convert.convert(whole, tmp_path / name, to=to)
        assert (tmp_path / name).exists()


STEERING = "\x1b[31mred\x1b[0m \x9b2J \u202egnp.exe \u2066 \x07\x00"


def test_nothing_from_a_file_steers_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys, metadata, paths and a sampler's options, in what ``convert`` and ``info`` print on either stream."""
    folder = tmp_path / ("a\x1b[2J\u202eb\nwritten   passwd" if os.name == "posix" else "a\u202eb")
    folder.mkdir()
    tensors = original_tensors()
    save_file(tensors, folder / "one.safetensors")
    save_file(tensors | {f"{UNET}{STEERING}": torch.ones(1)}, folder / "key.safetensors")
    save_file({STEERING * 10_000: torch.ones(1)}, folder / "long.safetensors")
    torch.save({"state_dict": tensors, STEERING: 3, "x" * 100_000: 4}, folder / "one.ckpt")
    (tmp_path / "config.json").write_text(json.dumps({**OVERRIDE, "sampler": {"name": STEERING}}))
    (tmp_path / "good.json").write_text(json.dumps(OVERRIDE))
    good, bad = (["--config", str(tmp_path / name)] for name in ("good.json", "config.json"))
    out = str(folder / "out.safetensors")
    calls = [["info", str(folder / name)] for name in ("one.safetensors", "key.safetensors", "long.safetensors")]
    calls += [["convert", str(folder / "one.ckpt"), out, "--force", *good], ["info", out], ["info", str(folder)]]
    calls += [["convert", str(folder / f"{name}.safetensors"), out, *good] for name in ("key", "long")]
    calls += [["convert", str(folder / "one.safetensors"), out, "--force", *bad]]
    for call in calls:
        cli.main(call)
        printed = capsys.readouterr()
        text = printed.out + printed.err
        assert text, call
        assert all(c.isprintable() or c == "\n" for c in text), call
        assert not any(line.startswith("written   passwd") for line in text.splitlines()), call
        assert max(map(len, text.splitlines())) < 3000, call
