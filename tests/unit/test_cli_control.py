"""``--control``: how its value is read, its pictures, mistakes in one line each, and ``info`` of a control."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.utils import save_image

import minidiff
import weights_convert
from minidiff import Control, ControlModel, StableDiffusion, fast
from minidiff.cli.controls import Named, read_control, written
from minidiff.pipeline.recipe import Steered
from tests.support.command import TEXT, Ended, Run, one_error, pixels
from tests.support.tiny import tiny_controlnet

MADE = ("--model", "text", "--steps", 2, "--seed", 1, "--device", "cpu", "--quiet")


@pytest.fixture
def canny(tmp_path: Path) -> Path:
    """A ControlNet for the command's model, and a picture for it."""
    tiny_controlnet(config=TEXT).save(tmp_path / "canny.safetensors")
    save_image(torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0)), tmp_path / "edges.png")
    return tmp_path / "canny.safetensors"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors=b.png", ("a.safetensors", "b.png", {})),
        ("a=b.png,0.5", ("a", "b.png", {"weight": 0.5})),
        ("a=b.png,0.5,0,0.25", ("a", "b.png", {"weight": 0.5, "low": 0.0, "high": 0.25})),
        ("a=b.png,1,0.1,0.9,soft", ("a", "b.png", {"weight": 1.0, "low": 0.1, "high": 0.9, "soft": 0.825})),
        ("a=b.png,guess", ("a", "b.png", {"guess": True})),
        ("a=b,c.png,-1", ("a", "b,c.png", {"weight": -1.0})),
        ("a=b.png,1,2,3,4", ("a", "b.png,1", {"weight": 2.0, "low": 3.0, "high": 4.0})),
        ("a=b=c.png", ("a=b", "c.png", {})),
    ],
)
def test_the_value_is_read_from_the_right(text: str, wanted: Named) -> None:
    assert read_control(text) == Named(*wanted)


def test_names_of_files_that_exist_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=1,b", "c=d,0.5", "a=1,b=c", "d,0.5"):
        Path(name).touch()
    assert read_control("a=1,b=c=d,0.5,0.7") == Named("a=1,b=c", "d,0.5", {"weight": 0.7})
    Path("a=1,b=c").unlink()
    assert read_control("a=1,b=c=d,0.5,0.7") == Named("a=1,b", "c=d,0.5", {"weight": 0.7})
    Path("d").touch()
    assert read_control("a=1,b=d,0.5") == Named("a=1,b", "d", {"weight": 0.5})


@pytest.mark.parametrize("text", ["canny.safetensors", "=x.png", "canny=", "", ",", "="])
def test_a_value_without_a_picture(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"should be FILE=PICTURE\[,WEIGHT") as e:
        read_control(text)
    assert ("a model of that name expects white edges on black" in str(e.value)) == ("canny" in text)


def test_a_file_alone_is_told_to_lack_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its name has signs that could part it."""
    monkeypatch.chdir(tmp_path)
    Path("canny=a,0.5").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="with the picture that the model reads"):
        read_control("canny=a,0.5")
    assert read_control("canny=a,0.5=b").path == "canny=a,0.5"


@pytest.mark.parametrize("text", ["a=b", "a=b,0.5", "a=b,1,0.2", "a=b,1,0,0.9", "a=b,-2,0.1,0.9,soft", "a=b,guess"])
def test_a_control_of_a_recipe_is_written_as_it_is_given(text: str) -> None:
    named = read_control(text)
    assert written(Steered(name=named.path, picture=named.picture, **named.settings)) == text


def test_a_picture_under_a_control(run: Run, canny: Path, models: Path) -> None:
    value = f"{canny.name}=edges.png,0.8,0,0.9"
    ended = run("generate", "a fox", *MADE, "--control", value, "--control", "canny.safetensors=edges.png,guess")
    assert ended == Ended(0, ["a-fox-1.png"], [])
    sd, net = StableDiffusion.load(models / "text.safetensors", "cpu"), ControlModel.load(canny, "cpu")
    for one in (sd, net):
        fast.optimize(one)
    controls = [Control(net, "edges.png", 0.8, 0, 0.9), Control(net, "edges.png", guess=True)]
    wanted = sd.generate("a fox", steps=2, seed=1, controls=controls, progress=False)[0]
    assert np.array_equal(pixels("a-fox-1.png"), np.asarray(wanted))
    assert wanted.size == (40, 32)
    assert minidiff.read_recipe("a-fox-1.png")["control"] == minidiff.read_recipe(wanted)["control"]


def test_what_a_model_of_that_name_expects_is_said(run: Run, canny: Path) -> None:
    ended = run("generate", "a fox", *MADE[:-1], "--control", "canny.safetensors=edges.png")
    assert "minidiff: 'canny.safetensors' expects white edges on black, as Canny's detector draws them" in ended.err


def test_a_recipe_asks_for_its_controls(run: Run, canny: Path) -> None:
    run("generate", "a fox", *MADE, "--control", "canny.safetensors=edges.png,0.5", "--out", "first.png")
    again = ("generate", "--recipe", "first.png", "--model", "text", "--device", "cpu", "--quiet", "--out", "again.png")
    one_error(run(*again), "first.png: was made with --control canny.safetensors=edges.png,0.5; give it again")
    assert run(*again, "--control", "canny.safetensors=edges.png,0.5").err == []
    assert np.array_equal(pixels("first.png"), pixels("again.png"))
    replay = ("replay", "first.png", "--model", "text", "--device", "cpu", "--quiet")
    assert run(*replay, "--control", "canny.safetensors=edges.png,0.5").status == 0, "the same bytes"
    assert run(*replay).status == 2
    ended = run(*again, "--control", "canny.safetensors=edges.png,0.4")
    assert ended.err == [
        "minidiff: warning: the picture was made with other controls than this run, other pictures for them, or other "
        "weights"
    ]


def test_mistakes(run: Run, canny: Path, models: Path) -> None:
    def wrong(value: str, *words: str, model: str = "text") -> None:
        given = ("generate", *(["a fox"] if model == "text" else []), "--model", model, "--steps", 2, "--quiet")
        one_error(run(*given, "--control", value), *words)

    edges = canny.with_name("edges.png")
    edges.rename(edges.with_suffix(".kept"))
    try:
        wrong("canny.safetensors=edges.png", "--control: the picture edges.png: no such file or folder")
    finally:
        edges.with_suffix(".kept").rename(edges)
    wrong("no.safetensors=edges.png", "--control: the model no.safetensors: no such file or folder")
    wrong("canny.safetensors", "should be FILE=PICTURE", "expects white edges on black")
    wrong("canny.safetensors=edges.png,nan", "the picture edges.png,nan: no such file or folder")
    wrong("canny.safetensors=edges.png,1,0.5,0.2", "low=0.5, high=0.2 of a control must be 0 <= low < high <= 1")
    wrong("canny.safetensors=canny.safetensors", "no readable picture (is a safetensors file")
    wrong(f"{models / 'text.safetensors'}=edges.png", "a sd1 model; name a ControlNet or a T2I-Adapter")
    wrong("canny.safetensors=edges.png", "cannot take --control", model="plain")
    one_error(run("generate", "a fox", "--model", "canny.safetensors"), "canny.safetensors", "name it with --control")
    assert [p.name for p in canny.parent.glob("*.png")] == ["edges.png"]


def test_info_and_convert(run: Run, canny: Path) -> None:
    page = run("info", "canny.safetensors", "--check")
    assert page.status == 0
    lines = [" ".join(line.split()) for line in page.out]
    assert "family tiny control" in lines
    assert "expects white edges on black, as Canny's detector draws them" in lines
    assert any(
        line.startswith("control ControlNet; widths 32, 32; 4 channels in; reads a context of") for line in lines
    )
    assert sum(line.startswith("control ") for line in lines) == 2, "one is in the table of sizes"
    assert run("convert", "canny.safetensors", "folder", "--to", "diffusers", "--sharded", "50kB").status == 0
    assert (Path("folder") / "diffusion_pytorch_model.safetensors.index.json").exists()
    page = run("info", "folder", "--check")
    assert page.status == 0
    assert any("ControlNetModel" in line for line in page.out)
    assert isinstance(weights_convert.load("folder", "cpu"), ControlModel)
    one_error(run("convert", "folder", "b.safetensors", "--ema"), "folder: ema is given, which is for models")
