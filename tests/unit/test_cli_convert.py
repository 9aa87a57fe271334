"""``minidiff convert``: dtypes, layouts, the sampler that a model is given, and files that stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import minidiff
import weights_convert
from minidiff.pipeline import random_model
from minidiff.storage import checkpoint, files
from tests.support import convert_sources
from tests.support.command import ORIGINAL, Ended, Run, one_error, pixels
from weights_convert import __main__ as converter
from weights_convert import keys_original
from weights_convert.engine import expand, restore


def test_convert_to_another_dtype(run: Run, tmp_path: Path) -> None:
    ended = run("convert", "text", "half.safetensors", "--dtype", "float16")
    assert ended.status == 0
    assert ended.err == []
    hash = checkpoint.open_checkpoint(tmp_path / "half.safetensors").hash
    assert any(hash in line for line in ended.out)
    assert "float16" in run("info", "half.safetensors", "--check").out[-3]
    one_error(run("convert", "text", "half.safetensors"), "half.safetensors: already exists", "--force")
    assert run("convert", "text", "half.safetensors", "--force").status == 0
    assert "float32" in run("info", "half.safetensors", "--check").out[-3]
    one_error(run("convert", "text", "nowhere/x.safetensors"), "nowhere", "create it first")


def test_a_converted_model_has_the_sampler_that_was_chosen(run: Run) -> None:
    """--sampler and --set of convert, and of python -m weights_convert; options alone are the source's sampler's."""

    def sampler(*given: object, source: str = "text") -> dict[str, Any]:
        assert run("convert", source, "out.safetensors", "--force", *given).status == 0
        return weights_convert.open_source("out.safetensors").config.sampler

    karras = {"name": "dpmpp_2m", "sigma_spacing": "karras"}
    assert sampler("--sampler", "dpmpp_2m", "--set", "sigma_spacing=karras") == karras
    assert sampler("--set", "steps_offset=7") == {"name": "pndm", "steps_offset": 7}
    assert run("convert", "text", "folder", "--to", "diffusers").status == 0
    own = sampler(source="folder")
    assert sampler("--set", "steps_offset=7", source="folder") == {**own, "steps_offset": 7}
    assert weights_convert.load("folder", sampler=karras).config.sampler == karras
    assert converter.main(["folder", "other.safetensors", "--sampler", "ddim", "--set", "eta=0.5"]) == 0
    assert weights_convert.open_source("other.safetensors").config.sampler == {"name": "ddim", "eta": 0.5}
    one_error(run("convert", "text", "x.safetensors", "--set", "eta=1"), "pndm has no option 'eta'")
    one_error(run("convert", "text", "x.safetensors", "--sampler", "ddim", "--set", "eat=1"), "did you mean eta?")


def test_what_a_file_does_not_say(run: Run, tmp_path: Path) -> None:
    """--prediction and --sampler, where a single file leaves it open."""
    tensors = convert_sources.original_tensors()
    width = tensors["model.diffusion_model.time_embed.0.weight"].shape[1]
    tensors["model.diffusion_model.time_embed.cond_proj.weight"] = torch.randn(width, 8)
    save_file(tensors | {"ztsnr": torch.zeros(0)}, tmp_path / "lcm.safetensors")
    (tmp_path / "told.json").write_text(json.dumps(convert_sources.OVERRIDE))
    made = ("convert", "lcm.safetensors", "out.safetensors", "--config", "told.json")
    one_error(run(*made), "lcm.safetensors", "what its model predicts", "--prediction")
    one_error(run(*made, "--prediction", "epsilon"), "lcm.safetensors", "distilled for few steps", "--sampler")
    one_error(run(*made, "--prediction", "epsilon", "--sampler", "lmc"), "lmc")
    ended = run(*made, "--prediction", "v_prediction", "--sampler", "lcm")
    assert any("has the marker 'ztsnr'" in line for line in ended.out)
    assert any(
        "reads the guidance scale: has 'model.diffusion_model.time_embed.cond_proj.weight'" in x for x in ended.out
    )
    config = minidiff.load(tmp_path / "out.safetensors").config
    assert (config.family, config.sampler, config.unet.guidance_dim) == ("sd1-lcm", {"name": "lcm"}, 8)
    assert (config.schedule.prediction, config.schedule.zero_snr) == ("v_prediction", True)
    one_error(run("plan", "--model", "lcm.safetensors"), "what its model predicts", "--prediction")
    told = run("info", "lcm.safetensors")
    assert told.status == 2
    assert any("family    sd1-lcm" in line for line in told.out)


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """The tensors of a small Stable Diffusion 1 by the names of the original single file."""
    out = {}
    for name, part in random_model(ORIGINAL, seed=3).parts.items():
        walk = {"unet": keys_original.unet, "vae": keys_original.vae, "text_encoder": keys_original.clip}[name]
        state = {key: files.lazy(t) for key, t in part.state_dict().items()}
        out |= {
            k: t.load().contiguous() for k, t in restore(expand(walk(getattr(ORIGINAL, name)), part), state).items()
        }
    return out


def test_another_layout(original: dict[str, torch.Tensor], run: Run, tmp_path: Path) -> None:
    save_file(original, tmp_path / "original.safetensors")
    torch.save({"state_dict": original, "global_step": 5}, tmp_path / "original.ckpt")
    command = ("generate", "a fox", "--steps", 2, "--seed", 7, "--size", "32x32", "--model")
    made = run(*command, "original.safetensors")
    assert made.out == ["a-fox-7.png"]
    assert made.err[0].startswith("minidiff: converted in memory; `minidiff convert original.safetensors FILE")
    quiet = run(*command, "original.ckpt", "--quiet")
    assert quiet == Ended(0, ["a-fox-7-2.png"], [])
    converted = run("convert", "original.ckpt", "mini.safetensors")
    assert converted.status == 0, converted
    assert any(line.split() == ["layout", "original"] for line in converted.out)
    assert run("generate", "--model", "mini.safetensors", "--recipe", "a-fox-7.png", "--out", "c", "--quiet").err == []
    for name in ("a-fox-7-2.png", "c.png"):
        assert np.array_equal(pixels(tmp_path / "a-fox-7.png"), pixels(tmp_path / name))
    page = run("info", "original.safetensors", "--check")
    assert page.status == 0
    assert ["family", "sd1"] in [line.split() for line in page.out]
    assert page.out[-1].startswith(f"checked: all {len(original)} tensors are finite")
    assert page.out[-3].split()[:2] == ["total", str(len(original))]


@pytest.mark.usefixtures("unchanged")
def test_another_layout_that_is_damaged(original: dict[str, torch.Tensor], run: Run, tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.bias"
    save_file({**original, key: torch.full_like(original[key], float("nan"))}, tmp_path / "nan.safetensors")
    checked = run("info", "nan.safetensors", "--check")
    assert checked.status == 2
    assert len(checked.err) == 1
    assert "tensor 'unet.conv_out.bias' holds 4 NaN" in checked.err[0]
    one_error(run("convert", "nan.safetensors", "x.safetensors"), "nan.safetensors", "unet.conv_out.bias")
    assert not (tmp_path / "x.safetensors").exists()
    save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for name in ("other.safetensors", "empty"):
        for command in (("info", name), ("generate", "a fox", "--model", name), ("convert", name, "x.safetensors")):
            one_error(run(*command), name)


def test_convert_does_not_overwrite(run: Run, models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes((models / "text.safetensors").read_bytes())
    (tmp_path / "there.safetensors").write_text("precious")
    one_error(run("convert", source, "there.safetensors"), "there.safetensors", "--force")
    one_error(run("convert", source, source, "--force"), "source.safetensors", "another")
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    one_error(run("convert", source, "x", "--to", "flax"), "--to", "flax", "diffusers")
    one_error(run("convert", source, "x", "--dtype", "int8"), "--dtype", "int8")


def test_what_appears_during_a_conversion_is_not_replaced(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files._bytes

    def meanwhile(*args: object) -> memoryview:
        (tmp_path / "b.safetensors").write_text("precious")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "_bytes", meanwhile)
    for to in ("minidiff", "original"):
        one_error(run("convert", "text", "b.safetensors", "--to", to), "b.safetensors: already exists", "--force")
        assert (tmp_path / "b.safetensors").read_text() == "precious"
        (tmp_path / "b.safetensors").unlink()
    assert list(tmp_path.iterdir()) == []
