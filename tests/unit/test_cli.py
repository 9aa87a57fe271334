"""The ``minidiff`` command: what it prints, what it writes, and how it ends.

Tiny untrained models stand in for real ones. Most calls run in this process through ``main``; what only a process of
its own can show (signals, pipes, encodings) runs in one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import minidiff
import weights_convert
from minidiff import cli, console, fast
from minidiff.adapters import lora
from minidiff.adapters import words as embeddings
from minidiff.cli import description
from minidiff.cli import output as destination
from minidiff.config import (
    CLIPTextConfig,
    Level,
    ModelConfig,
    ScheduleConfig,
    TokenizerConfig,
    UNetConfig,
    VAEConfig,
    text,
)
from minidiff.pipeline import random_model
from minidiff.samplers import SAMPLERS
from minidiff.storage import checkpoint, files
from tests.support import convert_sources
from tests.support.tiny import tiny_xl
from weights_convert import __main__ as converter
from weights_convert import keys_original
from weights_convert.engine import expand, restore

ROOT = Path(__file__).resolve().parents[2]

TEXT = ModelConfig(
    family="sd1",
    unet=UNetConfig(
        levels=(text(32, 4), Level(channels=32)), mid=text(32, 4), context_dim=32, layers=1, groups=8, sample_size=4
    ),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=8, sample_size=32),
    text_encoder=CLIPTextConfig(width=32, layers=1, heads=2, mlp=32),
    tokenizer=TokenizerConfig(),
    schedule=ScheduleConfig(),
    sampler={"name": "pndm"},
)
PLAIN = ModelConfig(
    family="ddpm",
    unet=UNetConfig(
        levels=(Level(channels=32), Level(channels=32, attention="self", heads=1)),
        mid=Level(channels=32, attention="self", heads=1),
        in_channels=3,
        out_channels=3,
        layers=1,
        groups=8,
        sample_size=8,
    ),
    schedule=ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    sampler={"name": "ddpm"},
)


class Ended(NamedTuple):
    """How a call ended: its status and the lines that it wrote."""

    status: int
    out: list[str]
    err: list[str]


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.safetensors and plain.safetensors."""
    folder = tmp_path_factory.mktemp("models")
    random_model(TEXT, seed=1).save(folder / "text.safetensors")
    random_model(PLAIN, seed=1).save(folder / "plain.safetensors")
    return folder


@pytest.fixture
def run(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call ``main`` in an empty folder; "text" and "plain" stand for the models' files."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> Ended:
        given = [str(models / f"{a}.safetensors") if a in ("text", "plain") else str(a) for a in argv]
        capsys.readouterr()
        status = cli.main(given)
        captured = capsys.readouterr()
        return Ended(status, captured.out.splitlines(), captured.err.splitlines())

    return call


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[None]:
    """Nothing may be left in the current folder that was not there before the test's own calls."""
    yield
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".png", ".part")] == []


def process(*argv: str, cwd: Path, **options: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-m", "minidiff", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, **{"stdout": pipe, "stderr": pipe, **options})  # type: ignore[call-overload,no-any-return]


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def one_error(ended: Ended, *words: str, status: int = 2) -> None:
    """The call failed with ``status`` and one line that has all of ``words``, and printed no result."""
    assert ended.status == status, ended
    errors = [line for line in ended.err if line.startswith("minidiff: error: ")]
    assert errors == ended.err, ended.err
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert ended.out == []


# What works


def test_same_command_same_picture(run: Run, tmp_path: Path) -> None:
    command = ("generate", "A Red Fox!", "--model", "text", "--steps", 3, "--seed", 7, "--quiet")
    first, second = run(*command), run(*command)
    assert first == Ended(0, ["a-red-fox-7.png"], [])
    assert second == Ended(0, ["a-red-fox-7-2.png"], []), "an existing file gets no company of the same name"
    a, b = pixels(tmp_path / first.out[0]), pixels(tmp_path / second.out[0])
    assert a.shape == (32, 32, 3)
    assert a.std() > 0
    assert np.array_equal(a, b)
    other = run(*command[:-2], 8, "--quiet")
    assert not np.array_equal(a, pixels(tmp_path / other.out[0]))


def test_the_command_line_and_the_library_agree(run: Run, models: Path, tmp_path: Path) -> None:
    run("generate", "a fox", "--model", "text", "--negative", "rain", "--steps", 3, "--seed", 7, "--sampler", "euler",
        "--scale", 3, "--size", "40x32", "--out", "fox.png", "--quiet", "--plain")  # fmt: skip
    sd = minidiff.load(models / "text.safetensors")
    (image,) = sd.generate("a fox", "rain", 3, 3.0, sampler="euler", seed=7, width=40, height=32, progress=False)
    assert np.array_equal(pixels(tmp_path / "fox.png"), np.asarray(image))
    recipe = minidiff.read_recipe(tmp_path / "fox.png")
    assert recipe == minidiff.read_recipe(image)
    assert recipe["width"] == 40
    assert recipe["negative_prompt"] == "rain"
    # Fast, as it is by default, small weights give the same bits; and --recipe does as the picture was made.
    run("generate", "--recipe", "fox.png", "--model", "text", "--out", "again.png", "--quiet")
    run("generate", "a fox", "--model", "text", "--seed", 7, "--steps", 3, "--out", "fast.png", "--quiet")
    run("generate", "--recipe", "fast.png", "--model", "text", "--out", "fast-again.png", "--quiet")
    plain, again, fast, fast_again = (
        minidiff.read_recipe(tmp_path / f"{name}.png") for name in ("fox", "again", "fast", "fast-again")
    )
    assert again == plain
    assert fast["fast"]
    assert fast_again == fast


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


def test_like_another_program(run: Run, tmp_path: Path) -> None:
    """The recipe notes the program, and repeats it; a picture of a shared stream is no picture of its own."""
    made = ("--model", "text", "--sampler", "ddim", "--steps", 4, "--seed", 3, "--like", "ldm", "--quiet")
    run("generate", "a fox", *made, "--out", "first.png")
    recipe = minidiff.read_recipe(tmp_path / "first.png")
    assert (recipe["like"], recipe["sampler"]) == ("ldm", {"name": "ddim"})
    run("generate", "--recipe", "first.png", "--model", "text", "--out", "again.png", "--quiet")
    assert np.array_equal(pixels(tmp_path / "first.png"), pixels(tmp_path / "again.png"))
    both = run("generate", "a fox", *made, "--num-images", 2, "--out", ".")
    second = next(path for path in both.out if minidiff.read_recipe(path).get("place") == 1)
    ended = run("generate", "--recipe", second, "--model", "text")
    one_error(ended, "picture 2 of 2 from one stream; make all of them, with --seed 3")
    ended = run("generate", "a fox", "--model", "text", "--sampler", "euler", "--like", "ldm")
    one_error(ended, "ldm has no sampler 'euler'; choose one of ddim, pndm")
    one_error(run("generate", "--model", "plain", "--like", "ldm", "--steps", 2), "it cannot take --like")


def test_plans_of_several_programs(run: Run) -> None:
    ended = run("plan", "--sampler", "euler", "--steps", 5, "--like", "a1111,diffusers")
    assert ended.status == 0
    assert ended.out[0] == "a1111: 5 model calls, x starts as noise * 14.6146"
    assert len(ended.out) == 2 + 1 + 5
    own = run("plan", "--sampler", "euler", "--steps", 5, "--like", "a1111", "--set", "spacing=leading")
    assert own.out[2].split()[1] == "800"
    one_error(
        run("plan", "--like", "a1111,webui"), "no program is called 'webui'; known are minidiff, diffusers, ldm, k"
    )


def test_from_a_picture(run: Run, models: Path, tmp_path: Path) -> None:
    """--image, --mask and --strength are generate's; a recipe says what they were, but not the pictures themselves."""
    for name, seed in (("a", 0), ("mask", 1)):
        noise = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    given = ("generate", "a fox", "--model", "text", "--steps", 4, "--seed", 7, "--image", "a.png", "--quiet")
    assert run(*given, "--mask", "mask.png", "--strength", 0.6, "--out", "b").err == []
    sd = minidiff.load(models / "text.safetensors")
    image, mask = tmp_path / "a.png", tmp_path / "mask.png"
    (want,) = sd.generate("a fox", steps=4, seed=7, image=image, mask=mask, strength=0.6, progress=False)
    assert np.array_equal(pixels(tmp_path / "b.png"), np.asarray(want))
    assert want.size == (40, 32)
    again = ("generate", "--model", "text", "--recipe", "b.png", "--out", "c", "--quiet")
    one_error(run(*again), "b.png", "another picture (a.png)", "--image")
    one_error(run(*again, "--image", "a.png"), "another picture (mask.png)", "--mask")
    assert run(*again, "--image", "a.png", "--mask", "mask.png").err == []
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))


def test_adapters_and_learned_words(run: Run, models: Path, tmp_path: Path) -> None:
    """--lora and --embedding change the picture as Python does, are noted, and are asked for when it is repeated."""
    sd = minidiff.load(models / "text.safetensors")
    width = sd.config.text_encoder.width
    torch.save({"<cat>": torch.ones(2, width)}, tmp_path / "cat.pt")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    channels = sd.unet.config.levels[0].channels
    halves = {f"{name}.lora_down.weight": torch.ones(2, channels), f"{name}.lora_up.weight": torch.ones(channels, 2)}
    save_file(halves, tmp_path / "ink.safetensors")
    made = ("--model", "text", "--steps", 2, "--seed", 1)
    ended = run("generate", "a <cat>", *made, "--embedding", "cat.pt", "--lora", "ink.safetensors=0.5", "--out", "a")
    assert "minidiff: ink.safetensors: 1 of 1 modules" in ended.err
    recipe = minidiff.read_recipe(tmp_path / "a.png")
    assert (recipe["lora"], recipe["embedding"]) == ([["ink.safetensors", 0.5]], [["cat.pt", "<cat>"]])
    embeddings.add(sd, weights_convert.read_embedding(tmp_path / "cat.pt", sd.config))
    lora.apply(sd.parts, [(weights_convert.read_lora(tmp_path / "ink.safetensors", sd.config), 0.5)])
    (want,) = sd.generate("a <cat>", steps=2, seed=1, progress=False)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(want))
    one_error(run("generate", "--model", "text", "--recipe", "a.png", "--quiet"), "--lora ink.safetensors", "again")
    halves["strange.lora_down.weight"] = torch.ones(2, 2)
    save_file(halves, tmp_path / "odd.safetensors")
    given = ("generate", "a", *made, "--quiet", "--lora", "odd.safetensors")
    one_error(run(*given), "strange", "--allow-unmatched")
    assert "1 of 2 modules" in run(*given, "--allow-unmatched").err[0]
    one_error(run("generate", "--model", "plain", "--lora", "odd.safetensors", "--quiet"), "knows no text", "--lora")
    one_error(run(*given[:-1], "ink.safetensors=strong"), "--lora", "'strong'")
    one_error(run(*given[:-1], "none.safetensors=strong"), "none.safetensors=strong: no such file")


def test_files_with_an_equals_sign_and_folders_of_adapters(run: Run, models: Path, tmp_path: Path) -> None:
    """A path that exists as it stands wins; else the longest that does, and what follows it is the value."""
    sd = minidiff.load(models / "text.safetensors")
    channels = sd.unet.config.levels[0].channels
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    halves = {f"{name}.lora_down.weight": torch.ones(2, channels), f"{name}.lora_up.weight": torch.ones(channels, 2)}
    (tmp_path / "a=1").mkdir()
    for file in ("ink=v2.safetensors", "ink=0.5", "a=1/pytorch_lora_weights.safetensors"):
        save_file(halves, tmp_path / file)
    for file in ("w=d.pt", "w=d.pt=x"):
        torch.save({"<cat>": torch.ones(2, sd.config.text_encoder.width)}, tmp_path / file)
    made = ("generate", "a", "--model", "text", "--steps", 1, "--quiet", "--out", "a", "--force")
    for given, lora_, word in (
        (("--lora", "ink=v2.safetensors", "--embedding", "w=d.pt"), ["ink=v2.safetensors", 1.0], ["w=d.pt", "<cat>"]),
        (("--lora", "ink=v2.safetensors=0.5", "--embedding", "w=d.pt=y"), ["ink=v2.safetensors", 0.5], ["w=d.pt", "y"]),
        (("--lora", "ink=0.5=2", "--embedding", "w=d.pt=x"), ["ink=0.5", 2.0], ["w=d.pt=x", "<cat>"]),
        (("--lora", "ink=0.5", "--embedding", "w=d.pt=y=z"), ["ink=0.5", 1.0], ["w=d.pt", "y=z"]),
        (("--lora", "a=1", "--embedding", "w=d.pt"), ["a=1", 1.0], ["w=d.pt", "<cat>"]),
    ):
        assert run(*made, *given).status == 0
        recipe = minidiff.read_recipe(tmp_path / "a.png")
        assert (recipe["lora"], recipe["embedding"]) == ([lora_], [word])


def test_pictures_that_cannot_be_begun_from(run: Run, models: Path, tmp_path: Path) -> None:
    text = ("generate", "a fox", "--model", "text", "--quiet", "--steps", 3)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for more, words in (
        (("--image", "none.png"), ("none.png", "no such file")),
        (("--mask", "a.png"), ("--image",)),
        (("--strength", 0.5), ("--image",)),
        (("--image", "a.png", "--strength", 2), ("strength=2", "0..1")),
        (("--image", "a.png", "--strength", 0.1), ("leaves no step",)),
    ):
        one_error(run(*text, *more), *words)
    one_error(run("generate", "--model", "plain", "--image", "a.png", "--quiet"), "--image", "knows no text")
    one_error(run("generate", "--model", "plain", "--clip-skip", 1, "--quiet"), "--clip-skip", "knows no text")


def test_what_sdxl_is_told(run: Run, tmp_path: Path) -> None:
    """Every option of the library's, as Python does it, and from the recipe again."""
    sd = tiny_xl()
    sd.save(tmp_path / "xl.safetensors")
    given = ("--negative", "rain", "--prompt-2", "an owl", "--negative-2", "fog", "--guidance-rescale", 0.7)
    given += ("--clip-skip", 1, "--denoising-end", 0.7, "--original-size", "48x40", "--crop", "3,5")
    made = ("generate", "a fox", "--model", "xl.safetensors", "--steps", 4, "--seed", 7, "--quiet")
    assert run(*made, *given, "--target-size", "64x32", "--out", "a").err == []
    wanted = {"negative_prompt": "rain", "prompt_2": "an owl", "negative_prompt_2": "fog", "guidance_rescale": 0.7}
    sizes = minidiff.Sizes(original=(40, 48), crop=(5, 3), target=(32, 64))
    wanted |= {"clip_skip": 1, "denoising_end": 0.7, "sizes": sizes}
    fast.optimize(sd)  # as the command does
    (want,) = sd.generate("a fox", steps=4, seed=7, progress=False, **wanted)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(want))
    recipe = minidiff.read_recipe(tmp_path / "a.png")
    told = {"original": [40, 48], "crop": [5, 3], "target": [32, 64], "score": None}
    assert {k: recipe[k] for k in wanted} == wanted | {"sizes": told}
    again = ("generate", "--model", "xl.safetensors", "--recipe", "a.png", "--quiet", "--out")
    assert run(*again, "b").err == []
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    changed = {"--negative": "", "--prompt-2": "a fox", "--negative-2": "", "--guidance-rescale": 0, "--crop": "0,0"}
    changed |= {"--clip-skip": 0, "--denoising-end": 0.9, "--original-size": "64x64", "--target-size": "64x64"}
    for option, value in changed.items():  # each counts
        assert run(*again, "c", "--force", option, value).err == [], option
        assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png")), option
    (other,) = sd.generate("a fox", steps=2, seed=7, negative_sizes=sizes, progress=False)
    minidiff.save_png(other, tmp_path / "d.png")
    one_error(run(*again[:4], "d.png", "--quiet"), "negative_sizes", "Python")
    one_error(run(*made, "--score", 3), "score=3.0", "only a refiner")
    one_error(run(*made, "--crop", "3x5"), "--crop", "'3x5'")
    one_error(run(*made, "--denoising-start", 0.5), "denoising_start needs an image")
    one_error(run("generate", "a", "--model", "text", "--prompt-2", "b", "--quiet"), "one text encoder")


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


def altered(path: Path, to: Path, **changes: object) -> None:
    """A picture once more, with another recipe; a field that becomes None is left out."""
    with Image.open(path) as image:
        told = {**minidiff.read_recipe(image), **changes}
        image.info["minidiff"] = json.dumps({name: value for name, value in told.items() if value is not None})
        minidiff.save_png(image, to)


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
    assert "its recipe says '\\x1b[2J', 'later', which this minidiff does not know" in line


def test_a_model_without_text(run: Run, tmp_path: Path) -> None:
    ended = run("generate", "--model", "plain", "--steps", 3, "--seed", 4, "--num-images", 2, "--quiet")
    assert ended == Ended(0, ["ddpm-4.png", "ddpm-5.png"], [])
    again = run("generate", "--model", "plain", "--recipe", "ddpm-5.png", "--quiet", "--force")
    assert again == Ended(0, ["ddpm-5.png"], [])
    assert minidiff.read_recipe(tmp_path / "ddpm-5.png")["seed"] == 5
    one_error(run("generate", "a fox", "--model", "plain"), "cannot take a prompt")
    one_error(run("generate", "--scale", 0, "--model", "plain", "--quiet"), "cannot take --scale")


def test_without_a_seed_every_run_differs(run: Run, tmp_path: Path) -> None:
    seeds = []
    for _ in range(2):
        torch.manual_seed(0)  # as torch's generator stands in every new process: at one and the same place
        ended = run("generate", "fox", "--model", "text", "--steps", 1, "--quiet")
        seeds.append(minidiff.read_recipe(tmp_path / ended.out[0])["seed"])
    assert seeds[0] != seeds[1]


def test_names_of_pictures(run: Run, tmp_path: Path) -> None:
    common = ("--model", "text", "--steps", 1, "--seed", 3, "--quiet")
    (tmp_path / "there").mkdir()
    both = run("generate", "Eine Füchsin", "猫", *common, "--out", "there")
    assert both.out == [os.path.join("there", "eine-füchsin-3.png"), os.path.join("there", "猫-4.png")]
    assert run("generate", "", *common).out == ["sd1-3.png"]
    assert run("generate", "../../etc/passwd", *common).out == ["etc-passwd-3.png"]
    assert run("generate", "x" * 300, *common).out == ["x" * 40 + "-3.png"]
    assert run("generate", "fox", *common, "--num-images", 3, "--out", "a.png").out == ["a.png", "a-2.png", "a-3.png"]
    assert run("generate", "fox", *common, "--out", "a").out == ["a-4.png"]
    (tmp_path / "a.png").write_bytes(b"old")
    assert run("generate", "fox", *common, "--num-images", 2, "--out", "a.png", "--force").out == ["a.png", "a-2.png"]
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)


def test_name_where_the_file_system_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii"))
    assert destination.slug("Eine Füchsin") == "eine-f-chsin"
    assert destination.slug("猫") == "picture"
    assert destination.slug("\udc80 \U0001f98a") == "picture"


def test_hints_and_progress_go_to_stderr(run: Run) -> None:
    ended = run("generate", "fox", "--model", "text", "--steps", 2, "--seed", 1)
    assert ended.out == ["fox-1.png"]
    assert ended.err[0] == "minidiff: computing in float32 on cpu (--dtype auto)"
    assert "step" in ended.err[-1]


def test_a_prompt_that_is_cut_warns_in_one_line(run: Run) -> None:
    prompt = " ".join(["fox"] * 80 + ["owl"])
    ended = run("generate", prompt, "--model", "text", "--steps", 1, "--quiet")
    assert ended.status == 0
    assert len(ended.err) == 1
    assert ended.err[0].startswith("minidiff: warning: ")
    assert ended.err[0].endswith("owl")
    filters = list(warnings.filters)
    run("generate", prompt, "--model", "text", "--steps", 1, "--quiet")
    assert warnings.filters == filters, "main leaves the caller's warnings as they were"


def test_help(run: Run) -> None:
    for argv in (["--help"], ["generate", "-h"], ["info", "--help"], ["convert", "--help"]):
        ended = run(*argv)
        assert ended.status == 0
        assert ended.err == []
        assert ended.out[0].startswith("usage: minidiff")
    assert " ".join(SAMPLERS) in " ".join(" ".join(run("generate", "--help").out).split())
    assert run("--version") == Ended(0, [f"minidiff {minidiff.__version__}"], [])


# info


def test_info_of_a_model(run: Run, models: Path) -> None:
    ended = run("info", "text", "--check")
    assert ended.status == 0
    assert ended.err == []
    page = "\n".join(ended.out)
    file = checkpoint.open_checkpoint(models / "text.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        tensors = [t for name, t in file.file.lazy.items() if name.startswith(part + ".")]
        count = sum(torch.Size(t.shape).numel() for t in tensors)
        assert re.search(rf"^{part} +{len(tensors):,} +{count:,} +\S+ [kM]B  float32$", page, re.MULTILINE)
    total = sum(p.numel() for part in random_model(TEXT).parts.values() for p in part.parameters())
    assert re.search(rf"^total +{len(file.file.lazy):,} +{total:,} ", page, re.MULTILINE)
    assert f"{total * 4 / 1e6:.2f} MB" in page
    for line in (
        "family        sd1",
        f"hash          {file.hash}",
        f"identity      {minidiff.load(models / 'text.safetensors').identity}",
        "sampler       pndm",
        "picture       32 x 32 by default",
        "schedule      1000 timesteps, scaled_linear betas from 0.00085 to 0.012; the model predicts epsilon",
        "tokenizer     CLIP's public table; 77 ids a prompt, filled up with id 49407",
    ):
        assert line in ended.out
    assert ended.out[-1] == f"checked: the hash fits, and all {len(file.file.lazy):,} tensors are finite"


def test_info_of_a_model_without_text(run: Run) -> None:
    page = "\n".join(run("info", "plain").out)
    assert "no prompt" in page
    assert "tokenizer" not in page
    assert "picture   8 x 8 by default" in page


def test_info_tells_dtypes_apart() -> None:
    tensors = {"unet.a": files.lazy(torch.zeros(3, 5)), "unet.b": files.lazy(torch.zeros(7).half())}
    lines = description.size_table(tensors).splitlines()
    assert lines[1].split() == ["unet", "2", "22", "74", "B", "float16,", "float32"]


def test_info_of_a_picture(run: Run) -> None:
    made = run("generate", "ein Füchslein", "--model", "text", "--steps", 2, "--seed", 7, "--quiet")
    ended = run("info", made.out[0])
    assert ended.status == 0
    found = json.loads("\n".join(ended.out))
    assert found == minidiff.read_recipe(made.out[0])
    assert found["prompt"] == "ein Füchslein"


def test_check_finds_a_changed_byte(run: Run, models: Path, tmp_path: Path) -> None:
    data = bytearray((models / "text.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    assert run("info", "bad.safetensors").status == 0
    ended = run("info", "bad.safetensors", "--check")
    assert ended.status == 2
    assert len(ended.err) == 1
    assert "the file was changed" in ended.err[0]


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "1 NaN and 0 inf"), (float("-inf"), "0 NaN and 1 inf")])
def test_check_names_the_first_tensor_that_is_not_finite(value: float, said: str, run: Run, tmp_path: Path) -> None:
    model = random_model(PLAIN)
    state = dict(model.unet.named_parameters())
    first, second = sorted(state)[3], sorted(state)[5]
    with torch.no_grad():
        state[first].view(-1)[1] = value
        state[second].view(-1)[1] = value
    model.save(tmp_path / "nan.safetensors")
    ended = run("info", "nan.safetensors", "--check")
    assert ended.status == 2
    assert len(ended.err) == 1
    assert f"tensor 'unet.{first}' holds {said}" in ended.err[0]
    assert second not in ended.err[0]
    assert "changed" not in ended.err[0]


# Bad input


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--steps", "0"], ["--steps", "'0'", "1 or more"]),
        (["--steps", "-1"], ["--steps", "'-1'", "1 or more"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "1001"], ["1001"]),
        (["--num-images", "0"], ["--num-images", "'0'"]),
        (["--height", "100"], ["height=100", "divisible by 8", "nearest: 96 and 104"]),
        (["--width", "1.5"], ["--width", "'1.5'"]),
        (["--size", "big"], ["--size", "'big'", "768x512"]),
        (["--size", "32x32", "--width", "32"], ["--size", "--width"]),
        (["--sampler", "magic"], ["'magic'", "euler_ancestral"]),
        (["--dtype", "float99"], ["--dtype", "float99", "bfloat16"]),
        (["--seed", "abc"], ["--seed", "'abc'"]),
        (["--scale", "nan"], ["--scale", "'nan'"]),
        (["--device", "toaster"], ["--device toaster", "cpu"]),
        (["--device", "cuda:77"], ["--device cuda:77", "cpu"]),
        (["--recipe", "none.png"], ["none.png", "no such file"]),
        (["--out", "nowhere/a.png"], ["nowhere", "create it first"]),
        (["--out", "/dev/null/new/"], ["/dev/null", "create it first"]),
        (["--out", "a.jpg"], ["a.jpg", "a.png"]),
        (["--stpes", "3"], ["--stpes", "--help"]),
        (["--neg", "rain"], ["--neg"]),
    ],
)
def test_bad_option(option: list[str], words: list[str], run: Run) -> None:
    one_error(run("generate", "a fox", "--model", "text", "--quiet", *option), *words)


@pytest.mark.usefixtures("unchanged")
def test_missing_things(run: Run) -> None:
    one_error(run("generate", "--model", "text", "--quiet"), "no prompt given")
    one_error(run("generate", "a fox", "--model", "none.safetensors"), "none.safetensors: no such file or folder")
    one_error(run("info", "none.safetensors"), "none.safetensors: no such file or folder")
    one_error(run("info"), "PATH", "--help")
    one_error(run("convert", "none", "x.safetensors"), "none: no such file or folder")
    one_error(run(), "no command given", "generate")
    one_error(run("paint"), "paint", "generate")


def damaged(models: Path, how: str) -> bytes:
    """The bytes of a model's file with something wrong."""
    data = (models / "text.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(n for n in header if n.startswith("unet."))
    if how == "cut":
        return data[: len(data) // 2]
    if how == "empty":
        return b""
    if how == "text":
        return b"this is no model, whatever its name may say"
    if how == "header longer than the file":
        return (2**62).to_bytes(8, "little") + data[8:]
    if how == "another shape":
        header[name]["shape"] = [*header[name]["shape"], 1]
    elif how == "no tensor":
        del header[name]
    elif how == "offsets beyond the end":
        header[name]["data_offsets"] = [2**40, 2**40 + 4]
    elif how == "config":
        header["__metadata__"]["minidiff.config"] = '{"family": "\\u001b[31m", "heads": 3}'
    elif how == "version":
        header["__metadata__"]["minidiff.version"] = "99"
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + size :]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "empty",
        "text",
        "header longer than the file",
        "another shape",
        "no tensor",
        "offsets beyond the end",
        "config",
        "version",
    ],
)
@pytest.mark.parametrize("command", [("info",), ("generate", "a fox", "--quiet", "--model")])
def test_damaged_model(how: str, command: tuple[str, ...], models: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(damaged(models, how))
    ended = run(*command, "bad.safetensors")
    one_error(ended, "bad.safetensors")
    assert ended.err[0].isprintable()


def test_files_that_are_something_else(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    one_error(run("info", "plain.png"), "plain.png", "no recipe")
    one_error(run("generate", "--model", "text", "--recipe", "plain.png"), "plain.png", "no recipe")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    one_error(run("info", "broken.png"), "broken.png")


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


def test_folder_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one_error(run("generate", "a fox", "--model", "text", "--quiet", "--out", "file/a.png"), "file", "no folder")

    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some random name")

    monkeypatch.setattr(destination.tempfile, "TemporaryFile", refuse)  # root may write anywhere, and tests run as root
    ended = run("generate", "a fox", "--model", "text", "--quiet", "--out", tmp_path / "a.png")
    one_error(ended, f"{tmp_path}: Permission denied")


def test_a_folder_that_is_new_ends_with_a_slash(run: Run, tmp_path: Path) -> None:
    """It is made with the first picture, and not before there is one."""
    given = ("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 7, "--quiet", "--out")
    one_error(run(*given, "new/pictures/", "--sampler", "magic"), "'magic'")
    assert list(tmp_path.iterdir()) == []
    assert run(*given, "new/pictures/").out == ["new/pictures/a-fox-7.png"]
    assert run(*given, "new/pictures/").out == ["new/pictures/a-fox-7-2.png"]
    (tmp_path / "file").touch()
    one_error(run(*given, "file/"), "--out file/: there is no folder file")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_force_replaces_regular_files_alone(run: Run, models: Path, tmp_path: Path) -> None:
    """Of a link it replaces the link; a picture that has no name of its own takes the next one instead."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link.png").symlink_to("precious")
    (tmp_path / "to the pipe").symlink_to("pipe.png")
    made = ("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 7, "--quiet", "--force", "--out")
    one_error(run(*made, "pipe.png"), "pipe.png: is a named pipe, and only regular files are replaced")
    assert run(*made, "link.png").out == ["link.png"]
    assert not (tmp_path / "link.png").is_symlink()
    os.mkfifo(tmp_path / "a-fox-7.png")
    assert run(*made, ".").out == ["a-fox-7-2.png"]
    assert run(*made, ".", "--num-images", 2).out == ["a-fox-7-2.png", "a-fox-8.png"]
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/null")
    (tmp_path / "to the pipe.safetensors").symlink_to("pipe.safetensors")
    for command in (("convert", "text"), ("parity", "record", "text")):
        for name in ("pipe.safetensors", "to the pipe.safetensors"):
            one_error(run(*command, name, "--force"), f"{name}: is a named pipe, and only regular files are replaced")
        one_error(run(*command, "device.safetensors", "--force"), "device.safetensors: is a device")
    (tmp_path / "link.safetensors").symlink_to("precious")
    assert run("convert", "text", "link.safetensors", "--force").status == 0
    assert not (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe.png").st_mode)


def test_pictures_of_one_name_all_stay(run: Run, tmp_path: Path) -> None:
    """Also where two of this run would have it, and one only differs in what the file system ignores."""
    (tmp_path / "a.png").write_bytes(b"old")
    made = ("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 7, "--quiet", "--num-images", 2)
    assert run(*made, "--out", "a.png").out == ["a-2.png", "a-3.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert run(*made, "--out", "a.png", "--force").out == ["a.png", "a-2.png"]
    seeds = [minidiff.read_recipe(tmp_path / name)["seed"] for name in ("a.png", "a-2.png", "a-3.png")]
    assert seeds == [7, 8, 8]


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


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """The tensors of a small Stable Diffusion 1 by the names of the original single file."""
    sd1 = ModelConfig(
        family="sd1",
        unet=UNetConfig(levels=(text(32, 8), Level(channels=32)), mid=text(32, 8), context_dim=32, layers=1),
        vae=VAEConfig(channels=(32, 32, 32, 32), layers=1),
        text_encoder=CLIPTextConfig(width=32, layers=1, heads=1, mlp=32),
        tokenizer=TokenizerConfig(),
        schedule=ScheduleConfig(),
    )
    out = {}
    for name, part in random_model(sd1, seed=3).parts.items():
        walk = {"unet": keys_original.unet, "vae": keys_original.vae, "text_encoder": keys_original.clip}[name]
        state = {key: files.lazy(t) for key, t in part.state_dict().items()}
        out |= {k: t.load().contiguous() for k, t in restore(expand(walk(getattr(sd1, name)), part), state).items()}
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


# What is nobody's mistake


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
        (MemoryError(), ["not enough memory"]),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
            ["not enough memory", "2.00"],
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ["not enough memory"]),
        (RuntimeError("mat1 and mat2\nshapes"), ["unexpected RuntimeError: mat1 and mat2 shapes", "--debug"]),
        (KeyError("surprise"), ["unexpected KeyError: 'surprise'", "--debug"]),
    ],
)
def test_failures_that_are_not_the_users(
    error: Exception, words: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    one_error(run("generate", "a fox", "--model", "text", "--steps", 1, "--quiet"), *words, status=1)


def test_debug_shows_the_traceback(run: Run) -> None:
    ended = run("info", "none.safetensors", "--debug")
    assert ended.status == 2
    assert ended.err[0] == "Traceback (most recent call last):"
    assert ended.err[-1] == "minidiff: error: none.safetensors: no such file or folder"


def test_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("two\nlines, \x1b[31mred\x07, é and 猫", "warning")
    assert capsys.readouterr().err == "minidiff: warning: two lines, \\x1b[31mred\\x07, é and 猫\n"


# In a process of its own


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c(models: Path, tmp_path: Path, number: int, status: int, word: str) -> None:
    model = str(models / "text.safetensors")
    with process("generate", "a fox", "--model", model, "--steps", "999", "--sampler", "ddim", cwd=tmp_path) as p:
        assert p.stderr is not None
        seen = b""
        deadline = time.monotonic() + 60
        while b"step" not in seen and time.monotonic() < deadline:  # the bar counts: it is at work
            seen += os.read(p.stderr.fileno(), 4096)
        p.send_signal(number)
        out, err = p.communicate(timeout=60)
    assert p.returncode == status, seen + err
    assert out == b""
    assert err.decode().splitlines()[-1] == f"minidiff: {word}"
    assert "Traceback" not in (seen + err).decode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="pipes and /dev/full")
def test_stdout_that_closes_or_is_full(models: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    model = str(models / "text.safetensors")
    env = {"PYTHONUNBUFFERED": ""}  # what a buffer still holds must not fail again when the interpreter ends
    with process("info", model, cwd=tmp_path, stdout=write, env=env) as p:
        os.close(write)
        _, err = p.communicate(timeout=60)
    assert (p.returncode, err) == (0, b"")
    if not os.path.exists("/dev/full"):
        return
    with open("/dev/full", "wb") as full, process("info", model, cwd=tmp_path, stdout=full, env=env) as p:
        _, err = p.communicate(timeout=60)
    assert (p.returncode, err.decode()) == (1, "minidiff: error: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="sets the locale by environment")
def test_terminal_that_knows_only_ascii(models: Path, tmp_path: Path) -> None:
    env = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"}
    model = str(models / "text.safetensors")
    argv = ("generate", "füchse" + " 猫" * 100, "--model", model, "--steps", "1", "--seed", "1", "--quiet")
    with process(*argv, cwd=tmp_path, env=env) as p:
        out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    assert err.decode("ascii").startswith("minidiff: warning: ")
    assert len(err.decode("ascii").splitlines()) == 1
    (picture,) = tmp_path.iterdir()
    assert out.decode("ascii").startswith("f\\xfcchse-\\u732b-")
    assert minidiff.read_recipe(picture)["prompt"] == argv[1]


def test_plan(run: Run) -> None:
    ended = run("plan", "--sampler", "ddim", "--steps", "50", "--set", "steps_offset=0", "--set", "spacing=leading")
    assert (ended.status, ended.err) == (0, [])
    assert [line.split()[:2] for line in ended.out[2:]] == [[str(i), str(980 - 20 * i)] for i in range(50)]
    assert "x starts as noise * 14.6146" in run("plan", "--sampler", "euler", "--steps", "3").out[0]
    assert run("plan", "--model", "text", "--steps", "2").out[0].startswith("PNDM: 3 model calls")
    one_error(run("plan", "--sampler", "ddim", "--set", "foo=1"), "ddim has no option 'foo'")
    one_error(run("plan", "--set", "spacing"), "'spacing' should be OPTION=VALUE")
    one_error(run("plan", "--sampler", "ddim", "--steps", "5000"), "steps=5000")
    one_error(run("plan", "--model", "missing.safetensors"), "missing.safetensors", "no such file")


# Habits


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generat"], ["'generat'", "did you mean generate?"]),
        (["Generate", "a"], ["did you mean generate?"]),
        (["a red circle"], ["no command", "minidiff generate 'a red circle'"]),
        (["--hlep"], ["--hlep", "did you mean --help?"]),
        (["generate", "--hlep"], ["--hlep", "did you mean --help?"]),
        (["convert", "--hlep"], ["did you mean --help?"]),
        (["generate", "a", "--stepss", "3"], ["did you mean --steps?"]),
        (["generate", "a", "—steps", "3"], ["—steps", "did you mean --steps?"]),
        (["generate", "a", "–cfg-scale=3"], ["here it is --scale"]),
        (["generate", "a", "--num_images", "3"], ["did you mean --num-images?"]),
        (["generate", "--prompt", "a"], ["without an option"]),
        (["generate", "a", "--guidance_scale", "3"], ["here it is --scale"]),
        (["generate", "a", "-W", "512"], ["here it is --width"]),
        (["generate", "a", "--dtype", "fp16"], ["float16"]),
        (["train", "--lr", "1e-4"], ["here it is --rate"]),
        (["plan", "--sampelr", "ddim"], ["did you mean --sampler?"]),
        (["parity", "recrod", "a", "b"], ["parity recrod", "did you mean record?"]),
        (["parity", "compare", "--tolerence", "1"], ["did you mean --tolerance?"]),
        (["convert", "a", "b", "--to", "difusers"], ["did you mean diffusers?"]),
        (["generate", "a", "--sampler", "DPM++ 2M Karras"], ["--sampler dpmpp_2m --set sigma_spacing=karras"]),
        (["convert", "text", "b", "--sampler", "DPM++ 2M Karras"], ["--sampler dpmpp_2m --set sigma_spacing=karras"]),
        (
            ["parity", "record", "text", "b", "--sampler", "DPM++ 2M Karras"],
            ["did you mean dpmpp_2m? (with sigma_spacing=karras, which cannot be set here)"],
        ),
        (["parity", "record", "text", "b", "--sampler", "Euler a"], ["did you mean --sampler euler_ancestral?"]),
        (["generate", "a", "--like", "comfy"], ["did you mean comfyui?"]),
        (["generate", "a", "--size", "500x500"], ["height=500 and width=500", "nearest: 496 and 504"]),
        (["generate", "a", "--size", "100000x100000"], ["a picture of 100000 x 100000 needs", "GB of memory"]),
        (["generate", "a", "--size", "9" * 5000 + "x8"], ["--size"]),
        (["generate", "a", "--num-images", "100000000"], ["100,000,000 pictures of 32 x 32 need", "GB of memory"]),
        (["generate", "a", "--seed", "-1"], ["'-1'", "without --seed each run draws a fresh one"]),
        (["generate", "a", "--seed", "1,-1"], ["'-1'", "without --seed"]),
        (["generate", "a", "--seed", "1,,2"], ["''", "--seed"]),
        (["generate", "a", "--seed", str(2**64)], ["2**64 - 1"]),
        (["generate", "a", "--seed", "1,2", "--num-images", "3"], ["2 seeds", "--num-images 3", "leave one out"]),
        (["train", "--data", "x", "--out", "y", "--seed", "-1"], ["'-1'", "--seed"]),
        (["generate", "a", "--image", "https://example.com/a.png"], ["an address", "download it"]),
        (["generate", "a", "--mask", "s3://bucket/a.png", "--image", "x"], ["--image x: no such file"]),
        (["generate", "a", "--model", "runwayml/stable-diffusion-v1-5"], ["no such file or folder", "model hub"]),
        (["info", "http://example.com/model.safetensors"], ["an address", "download it"]),
        (["convert", "https://example.com/model.ckpt", "b"], ["an address"]),
        (["generate", "a", "--set", "name=euler", "--sampler", "ddim"], ["--sampler chooses another"]),
        (["generate", "a", "--set", "eat=1", "--sampler", "ddim"], ["did you mean eta?"]),
        (["generate", "a", "--set", "eta=1"], ["pndm has no option 'eta'"]),
    ],
)
def test_what_was_meant(argv: list[str], words: list[str], run: Run) -> None:
    own = argv[0] == "generate" and "--model" not in argv
    one_error(run(*argv, *(["--model", "text", "--quiet"] if own else [])), *words)


def test_help_where_it_is_looked_for(run: Run) -> None:
    wanted = run("generate", "--help")
    assert wanted.out[0].startswith("usage: minidiff generate")
    for argv in (["--help", "generate"], ["help", "generate"], ["-h", "generate"], ["generate", "a", "--help"]):
        assert run(*argv) == wanted
    assert run("help").out == run("--help").out
    assert run("help", "parity", "record").out[0].startswith("usage: minidiff parity record")
    assert run("--help", "parity").out[0].startswith("usage: minidiff parity [")
    one_error(run("help", "generat"), "did you mean generate?")


def test_words_that_look_like_options_and_are_none(run: Run) -> None:
    ended = run("generate", "-- a fox", "--negative", "--ugly thing", "--model", "text", "--steps", 1, "--quiet")
    assert (ended.status, len(ended.out)) == (0, 1)
    assert minidiff.read_recipe(ended.out[0])["negative_prompt"] == "--ugly thing"
    assert run("generate", "--model", "text", "--steps", 1, "--quiet", "--", "--help").status == 0


def test_options_of_the_sampler(run: Run, models: Path, tmp_path: Path) -> None:
    """--set changes the named sampler, the checkpoint's own, or that of a recipe, as Python's options do."""
    made = ("generate", "a fox", "--model", "text", "--steps", 3, "--seed", 7, "--quiet", "--plain")
    karras = ("--set", "sigma_spacing=karras")
    assert run(*made, "--sampler", "dpmpp_2m", *karras, "--set", "solver_order=1", "--out", "a").err == []
    sd = minidiff.load(models / "text.safetensors")
    chosen = {"name": "dpmpp_2m", "sigma_spacing": "karras", "solver_order": 1}
    (want,) = sd.generate("a fox", steps=3, seed=7, sampler=chosen, progress=False)
    assert np.array_equal(pixels("a.png"), np.asarray(want))
    (other,) = sd.generate("a fox", steps=3, seed=7, sampler="dpmpp_2m", progress=False)
    assert not np.array_equal(pixels("a.png"), np.asarray(other))
    assert run(*made, "--set", "steps_offset=7", "--out", "b").err == []
    assert minidiff.read_recipe("b.png")["sampler"]["name"] == "pndm"
    assert minidiff.read_recipe("b.png")["sampler"]["steps_offset"] == 7
    again = ("generate", "--model", "text", "--recipe", "a.png", "--quiet", "--out", "c", "--set", "solver_order=2")
    assert run(*again).err == []
    sampler = minidiff.read_recipe("c.png")["sampler"]
    assert (sampler["name"], sampler["sigma_spacing"], sampler["solver_order"]) == ("dpmpp_2m", "karras", 2)


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


def test_a_list_of_seeds(run: Run) -> None:
    made = ("--model", "text", "--steps", 1, "--quiet")
    assert run("generate", "fox", *made, "--seed", "5,3,9").out == ["fox-5.png", "fox-3.png", "fox-9.png"]
    both = run("generate", "an owl", "a cat", *made, "--seed", "5, 3")
    assert both.out == ["an-owl-5.png", "an-owl-3.png", "a-cat-5.png", "a-cat-3.png"]
    run("generate", "fox", *made, "--seed", 3, "--out", "alone")
    assert np.array_equal(pixels("alone.png"), pixels("fox-3.png"))
    plain = run("generate", "--model", "plain", "--steps", 2, "--seed", "8,2", "--quiet")
    assert plain.out == ["ddpm-8.png", "ddpm-2.png"]


def test_words_without_quotes_are_pointed_out(run: Run) -> None:
    made = ("--model", "text", "--steps", 1, "--seed", 1)
    ended = run("generate", "a", "red", "fox", *made)
    assert ended.err[0] == (
        'minidiff: 3 prompts, a picture of each; for one picture quote them: minidiff generate "a red fox"'
    )
    assert len(ended.out) == 3
    assert not any("prompts" in line for line in run("generate", "a fox", "an owl", "a cat", *made).err)
    assert run("generate", "a", "red", "fox", *made, "--quiet").err == []


def test_nothing_that_is_printed_steers_a_terminal(run: Run, models: Path, tmp_path: Path) -> None:
    """Paths, recipes and reports: what comes from outside is written out, and JSON stays JSON."""
    evil = "a\x1b]0;x\x07b\x9b31m\u202egnp\u2028z"
    folder = tmp_path / evil
    folder.mkdir()
    (folder / "m.safetensors").write_bytes((models / "text.safetensors").read_bytes())
    made = ("--model", folder / "m.safetensors", "--steps", 1, "--seed", 1)
    calls = [
        run("generate", "fox", *made, "--out", str(folder / "x.png")),
        run("generate", "fox", *made, "--out", str(folder / "none" / "x.png")),
        run("info", folder / "m.safetensors", "--check"),
        run("info", folder / "none"),
        run("convert", folder / "m.safetensors", folder / "n.safetensors"),
        run("generate", evil, "--model", "text", "--steps", 1, "--out", "y.png", "--quiet"),
        run("info", "y.png"),
        run("generate", "fox", f"--{evil}"),
        run("plan", "--set", f"{evil}=1"),
        run(evil),
    ]
    for ended in calls:
        assert all(line.isprintable() for line in (*ended.out, *ended.err)), ended
    assert calls[0].out == [str(folder / "x.png").replace(evil, console.escaped(evil))]
    assert json.loads("\n".join(calls[6].out))["prompt"] == evil


def test_a_page_of_one_endless_line_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("a\n" + "b" * 300_000 + "\nc", longest=console.LONGEST_LINE)
    out = capsys.readouterr().out.splitlines()
    assert (out[0], out[2], len(out[1])) == ("a", "c", console.LONGEST_LINE + 4)


@pytest.mark.parametrize(
    "prompt", ["", "   ", "a\0b", "a \udc80 b", "a\x1b[31m b\u202e", " \n\t", "\ufffe", "\U0010ffff"]
)
def test_any_text_is_a_prompt(prompt: str, run: Run, tmp_path: Path) -> None:
    """It makes a picture whose recipe has it, under a name that any system takes."""
    ended = run("generate", prompt, "--model", "text", "--steps", 1, "--seed", 3, "--quiet", "--out", ".")
    assert (ended.status, ended.err) == (0, [])
    (path,) = tmp_path.glob("*.png")
    assert re.fullmatch(r"[\w-]+-3\.png", path.name)
    assert minidiff.read_recipe(path)["prompt"] == prompt


def test_a_prompt_of_ten_thousand_words_is_cut_and_said_once(run: Run) -> None:
    ended = run("generate", "a fox, " * 10_000, "--model", "text", "--steps", 1, "--num-images", 2, "--quiet")
    assert ended.status == 0
    assert len(ended.err) == 1
    assert "a prompt of 30000 tokens was cut to 75" in ended.err[0]
    assert len(ended.err[0]) < 600
