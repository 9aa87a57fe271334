"""Recipes on the command line: ``generate --recipe`` paints the same picture again, or says why it can't."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.pipeline import random_model
from minidiff.storage import checkpoint
from tests.support import convert_sources
from tests.support.command import TEXT, Ended, Run, altered, one_error, pixels


def test_a_recipe_gives_the_same_picture(run: Run, tmp_path: Path) -> None:
    run("generate", "a fox", "--model", "text", "--negative", "rain", "--steps", 3, "--seed", 7, "--sampler",
        "euler_ancestral", "--scale", 3, "--width", 40, "--out", "first", "--quiet")  # fmt: skip
    again = run("generate", "--recipe", "first.png", "--model", "text", "--out", "again.png", "--quiet")
    assert again == Ended(0, ["again.png"], [])
    assert np.array_equal(pixels(tmp_path / "first.png"), pixels(tmp_path / "again.png"))
    first, second = (minidiff.read_recipe(tmp_path / name) for name in ("first.png", "again.png"))
    assert first == second
    run("generate", "an owl", "--recipe", "first.png", "--model", "text", "--scale", 0, "--out", "other", "--quiet")
    other = minidiff.read_recipe(tmp_path / "other.png")
    assert other == {**first, "prompt": "an owl", "guidance_scale": 0.0}, "options override, the rest is as it was"


def test_a_recipe_of_another_model_warns(run: Run, tmp_path: Path) -> None:
    random_model(TEXT, seed=2).save(tmp_path / "other.safetensors")
    run("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 1, "--out", "a.png", "--quiet")
    ended = run("generate", "--recipe", "a.png", "--model", "other.safetensors", "--quiet")
    assert ended.status == 0
    assert len(ended.err) == 1
    assert ended.err[0].startswith("minidiff: warning: the picture was made with model_hash ")
    ended = run("generate", "--recipe", "a.png", "--model", "text", "--dtype", "bfloat16", "--quiet")
    assert ended.err == [
        "minidiff: warning: the picture was made with dtype float32, this run has bfloat16; pixels may differ"
    ]


def test_a_recipe_of_another_family_is_an_error(run: Run, tmp_path: Path) -> None:
    """Above all where no model is named: the bundled one paints its own pictures only."""
    made = ("--steps", 1, "--seed", 1, "--quiet")
    run("generate", "a fox", "--model", "text", *made, "--out", "fox.png")
    run("generate", "a red star", *made, "--out", "star.png")
    run("generate", "--model", "plain", *made, "--out", "plain.png")
    fox = minidiff.read_recipe(tmp_path / "fox.png")["model_hash"]
    quiet = ("--quiet", "--out", "again.png", "--force")
    one_error(run("generate", "--recipe", "fox.png", *quiet), "fox.png", "a sd1 model", fox, "--model PATH")
    one_error(run("generate", "--recipe", "plain.png", *quiet), "plain.png", "a ddpm model", "--model PATH")
    one_error(run("generate", "--recipe", "star.png", "--model", "text", *quiet), "a shapes model", "is a sd1 model")
    assert not (tmp_path / "again.png").exists()
    assert run("generate", "--recipe", "star.png", *quiet).err == []
    assert np.array_equal(pixels(tmp_path / "star.png"), pixels(tmp_path / "again.png"))
    altered(tmp_path / "star.png", tmp_path / "other.png", model_hash="0" * 32)
    (line,) = run("generate", "--recipe", "other.png", *quiet).err
    assert line.startswith(
        f"minidiff: warning: the picture was made with another bundled model {'0' * 32}, this run has "
    )


def test_recipes_of_before_models_had_an_identity(run: Run, models: Path, tmp_path: Path) -> None:
    """They name a minidiff file by its content hash, and an unconverted one not at all."""
    run("generate", "a fox", "--model", "text", "--steps", 2, "--seed", 1, "--out", "a.png", "--quiet")
    for told in (checkpoint.open_checkpoint(models / "text.safetensors").hash, "", None):
        altered(tmp_path / "a.png", tmp_path / "old.png", model_hash=told)
        ended = run("generate", "--recipe", "old.png", "--model", "text", "--out", "b.png", "--force", "--quiet")
        assert ended == Ended(0, ["b.png"], [])
        assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_a_recipe_of_an_unconverted_checkpoint(run: Run, tmp_path: Path) -> None:
    """It names its model like any other: the same file is silent, one with other weights is not."""
    convert_sources.write_folder(tmp_path / "folder")
    again = ("--model", "folder", "--quiet")
    assert run("generate", "a", "--steps", 1, "--seed", 1, "--out", "a.png", *again).err == []
    assert len(minidiff.read_recipe(tmp_path / "a.png")["model_hash"]) == 32
    assert run("generate", "--recipe", "a.png", "--out", "b.png", *again).err == []
    path = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: t * 2 for name, t in load_file(path).items()}, path, {"format": "pt"})
    (line,) = run("generate", "--recipe", "a.png", "--out", "c.png", *again).err
    assert "the picture was made with model_hash" in line


def test_what_a_recipe_says_beyond_what_is_known(run: Run, tmp_path: Path) -> None:
    run("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 1, "--out", "a.png", "--quiet")
    altered(tmp_path / "a.png", tmp_path / "b.png", **{"later": 1, "\x1b[2J": 2})
    (line,) = run("generate", "--recipe", "b.png", "--model", "text", "--quiet", "--out", "c.png").err
    assert "its recipe asks for more, which is not done here: '\\x1b[2J', 'later'" in line


@pytest.mark.parametrize(
    ("change", "word"),
    [({"steps": "3"}, "steps: expected int, got '3'"), ({"seed": None}, "no seed"), ({"sampler": []}, "sampler")],
)
def test_damaged_recipe(change: dict[str, object], word: str, run: Run, tmp_path: Path) -> None:
    run("generate", "a fox", "--model", "text", "--steps", 1, "--out", "a.png", "--quiet")
    with Image.open(tmp_path / "a.png") as image:
        image.info["minidiff"] = json.dumps({**minidiff.read_recipe(image), **change})
        minidiff.save_png(image, tmp_path / "b.png")
    one_error(run("generate", "--recipe", "b.png", "--model", "text", "--quiet"), "b.png", word)
