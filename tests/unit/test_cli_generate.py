"""``minidiff generate``: the options it takes, equal to the library's, and the ones it refuses."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import minidiff
import weights_convert
from minidiff import fast
from minidiff.adapters import lora
from minidiff.adapters import words as embeddings
from tests.support.command import Ended, Run, one_error, pixels
from tests.support.tiny import tiny_xl


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


def test_the_estimate_is_printed_and_nothing_is_made(run: Run, models: Path, tmp_path: Path) -> None:
    """With the options of the run: a recipe's, sizes, tiles, weights that take turns or, with an adapter, do not."""
    path = models / "text.safetensors"

    def told(*command: str | int | Path) -> str:
        before = sorted(tmp_path.iterdir())
        ended = run("generate", *command, "--model", "text", "--estimate", "--quiet")
        assert (ended.status, ended.err, len(ended.out)) == (0, [], 1)
        assert sorted(tmp_path.iterdir()) == before
        return ended.out[0]

    request = minidiff.Request("a fox", num_images=2, height=64, width=96)
    wanted = str(minidiff.estimate(path, request, low_memory=True))
    assert wanted.startswith("2 pictures of 96 x 64: ")
    assert told("a fox", "--num-images", 2, "--size", "96x64") == wanted
    assert told("--num-images", 2, "--size", "96x64") == wanted, "any prompt takes the same"
    run("generate", "a fox", "--model", "text", "--seed", 1, "--size", "96x64", "--steps", 1, "--out", "fox.png")
    assert told("--recipe", "fox.png").startswith("a picture of 96 x 64: ")
    preview = told("a fox", "--num-images", 2, "--size", "96x64", "--preview", "now.png")
    assert preview == str(minidiff.estimate(path, request))
    assert preview != wanted
    large = told("--size", "1024x1024")
    assert told("--size", "1024x1024", "--vae-tiles") != large
    assert run("generate", "--model", "plain", "--estimate").out[0].startswith("a picture of 8 x 8: ")
    one_error(run("generate", "a fox", "--model", "text", "--estimate", "--grid", "steps=1,2"), "leave out --grid")
    one_error(run("generate", "--prompts", "a.txt", "--model", "text", "--estimate"), "leave out --prompts")
    one_error(run("generate", "a fox", "--model", "text", "--estimate", "--size", "33x32"), "33")


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


def test_a_list_of_seeds(run: Run) -> None:
    made = ("--model", "text", "--steps", 1, "--quiet")
    assert run("generate", "fox", *made, "--seed", "5,3,9").out == ["fox-5.png", "fox-3.png", "fox-9.png"]
    both = run("generate", "an owl", "a cat", *made, "--seed", "5, 3")
    assert both.out == ["an-owl-5.png", "an-owl-3.png", "a-cat-5.png", "a-cat-3.png"]
    run("generate", "fox", *made, "--seed", 3, "--out", "alone")
    assert np.array_equal(pixels("alone.png"), pixels("fox-3.png"))
    plain = run("generate", "--model", "plain", "--steps", 2, "--seed", "8,2", "--quiet")
    assert plain.out == ["ddpm-8.png", "ddpm-2.png"]


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


def test_a_prompt_of_ten_thousand_words_is_cut_and_said_once(run: Run) -> None:
    ended = run("generate", "a fox, " * 10_000, "--model", "text", "--steps", 1, "--num-images", 2, "--quiet")
    assert ended.status == 0
    assert len(ended.err) == 1
    assert "a prompt of 30000 tokens was cut to 75" in ended.err[0]
    assert len(ended.err[0]) < 600


def test_words_without_quotes_are_pointed_out(run: Run) -> None:
    made = ("--model", "text", "--steps", 1, "--seed", 1)
    ended = run("generate", "a", "red", "fox", *made)
    assert ended.err[0] == (
        'minidiff: 3 prompts, a picture of each; for one picture quote them: minidiff generate "a red fox"'
    )
    assert len(ended.out) == 3
    assert not any("prompts" in line for line in run("generate", "a fox", "an owl", "a cat", *made).err)
    assert run("generate", "a", "red", "fox", *made, "--quiet").err == []


def test_words_that_look_like_options_and_are_none(run: Run) -> None:
    ended = run("generate", "-- a fox", "--negative", "--ugly thing", "--model", "text", "--steps", 1, "--quiet")
    assert (ended.status, len(ended.out)) == (0, 1)
    assert minidiff.read_recipe(ended.out[0])["negative_prompt"] == "--ugly thing"
    assert run("generate", "--model", "text", "--steps", 1, "--quiet", "--", "--help").status == 0


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
        (["--out", "a.tif"], ["a.tif", "a.png"]),
        (["--stpes", "3"], ["--stpes", "--help"]),
        (["--neg", "rain"], ["--neg"]),
    ],
)
def test_bad_option(option: list[str], words: list[str], run: Run) -> None:
    one_error(run("generate", "a fox", "--model", "text", "--quiet", *option), *words)
