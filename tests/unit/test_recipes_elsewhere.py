"""Recipes of other programs, and recipes in JPEG and WebP: what is read, what is named as not done, what is written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff import cli, read_recipe, save_picture
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline import metadata, recipes
from minidiff.pipeline.metadata import KEY, MADE, MADE_IN_PART, PARAMETERS
from minidiff.pipeline.png import label
from minidiff.pipeline.recipes import comfyui, infotext
from tests.support.comfyui import text_to_picture

RECIPE = {"prompt": 'a "fox" & <owl>, ünï', "seed": 3, "steps": 4, "height": 64, "width": 64}
PLAIN = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768"


def picture() -> Image.Image:
    return Image.frombytes("RGB", (5, 4), bytes(range(60)))


def complaint_of(work: Callable[[], object]) -> str:
    """The message with which ``work`` refuses its input; empty if it takes it."""
    try:
        work()
    except (CheckpointError, ConfigError) as e:
        return str(e)
    return ""


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_every_format_carries_the_recipe(suffix: str, tmp_path: Path) -> None:
    path = save_picture(label(picture(), RECIPE), tmp_path / f"a{suffix}")
    assert read_recipe(path) == RECIPE
    with Image.open(path) as opened:
        assert opened.format == metadata.FORMATS[suffix.lower()]
        assert opened.size == (5, 4)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_mark_of_the_iptc(suffix: str, tmp_path: Path) -> None:
    """On by default, off by an argument, never on a picture that minidiff did not make; other words with a mask."""

    def written(image: Image.Image, **options: bool) -> bytes:
        return save_picture(image, tmp_path / f"a{suffix}", **options).read_bytes()

    assert MADE.encode() in written(label(picture(), RECIPE))
    masked = written(label(picture(), {**RECIPE, "mask": "hole.png"}))
    assert MADE_IN_PART.encode() in masked
    assert b"DigitalSourceType" not in written(label(picture(), RECIPE), mark=False)
    assert b"DigitalSourceType" not in written(picture())


def test_what_is_no_picture_format(tmp_path: Path) -> None:
    for name in ("a.gif", "a", "a.txt"):
        with pytest.raises(ConfigError, match=r"is none of \.png, \.jpg, \.jpeg, \.webp"):
            save_picture(picture(), tmp_path / name)
    with pytest.raises(ConfigError, match="too long for a JPEG"):
        save_picture(label(picture(), {**RECIPE, "prompt": "x" * 70_000}), tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = save_picture(label(picture(), RECIPE), tmp_path / "a.jpg")
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randint(20, len(data))])
        assert "\n" not in complaint_of(lambda: recipes.read(path))


# --- AUTOMATIC1111 ---------------------------------------------------------------------------------------------------


def asked(text: str) -> dict[str, Any]:
    """The recipe of an infotext as JSON."""
    return recipes.described(recipes.of(infotext.read(text), "a.png"))


def test_an_infotext_is_understood() -> None:
    text = (
        "a (large:1.2) red star, <lora:ink:0.8>\nand a moon\nNegative prompt: fog,\nrain\nSteps: 20, "
        "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, "
        'Model: "photo, v2", Clip skip: 2, RNG: CPU, TI hashes: "cat: c74b, dog: 12", Version: v1.9.3'
    )
    assert asked(text) == {
        "program": "a1111",
        "prompt": "a (large:1.2) red star, \nand a moon",
        "negative_prompt": "fog,\nrain",
        "steps": 20,
        "guidance_scale": 7.5,
        "sampler": {"name": "dpmpp_2m"},
        "seed": 965400086,
        "height": 768,
        "width": 512,
        "clip_skip": 1,
        "like": "a1111:karras:cpu",
        "prompt_style": "a1111",
        "lora": [["ink", 0.8]],
        "embedding": ["cat", "dog"],
        "checkpoint": "photo, v2",
    }


@pytest.mark.parametrize(
    ("name", "levels", "sampler", "like"),
    [
        ("Euler a", None, "euler_ancestral", "a1111"),
        ("DPM++ 2M Karras", None, "dpmpp_2m", "a1111:karras"),
        ("DPM++ 2M", "Automatic", "dpmpp_2m", "a1111:karras"),
        ("DPM++ 2M SDE", "Automatic", "dpmpp_2m_sde", "a1111:exponential"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m", "a1111"),
        ("Euler", "Automatic", "euler", "a1111"),
        ("DDIM", "Automatic", "ddim", "a1111"),
        ("PLMS", None, "pndm", "a1111"),
    ],
)
def test_samplers_and_noise_levels(name: str, levels: str | None, sampler: str, like: str) -> None:
    found = asked(PLAIN.replace("Euler a", name) + (f", Schedule type: {levels}" if levels else ""))
    assert (found["sampler"]["name"], found["like"]) == (sampler, like)
    assert "not done" not in found


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ("Hires upscale: 2, Denoising strength: 0.7", "Hires upscale: '2'"),
        ("Variation seed: 3", "Variation seed: '3'"),
        ("Schedule type: KL Optimal", "noise levels 'kl optimal'"),
        ("ENSD: 31337", "ENSD: '31337'"),
        ("Eta: 0.5", "Eta: '0.5'"),
        ('ControlNet 0: "Module: canny, Weight: 1"', "ControlNet 0: 'Module: canny, Weight: 1'"),
        ("VAE: kl.pt", "VAE: 'kl.pt' (give it with --vae)"),
    ],
)
def test_what_is_not_done_is_named(more: str, note: str) -> None:
    found = asked(f"a fox\n{PLAIN}, {more}")
    assert found["not done"] == [note]
    assert "strength" not in found


def test_an_absent_sampler_is_named_and_not_replaced() -> None:
    found = asked(PLAIN.replace("Euler a", "Restart"))
    assert found["not done"] == ["sampler 'Restart'"]
    assert "sampler" not in found


def test_a_denoised_picture_is_wanted_again(tmp_path: Path) -> None:
    found = recipes.of(infotext.read(f"a fox\n{PLAIN}, Denoising strength: 0.6"), "a.png")
    assert found.recipe.request.strength == 0.6
    assert found.recipe.pictures.keys() == {"image"}


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_comments_in_exif(suffix: str, tmp_path: Path) -> None:
    """In UTF-16 of either order, and in plain text, as programs write them."""
    text = f"a café\n{PLAIN}"
    written = [b"UNICODE\0" + text.encode("utf-16-be"), b"UNICODE\0" + text.encode("utf-16-le")]
    for comment in (*written, b"ASCII\0\0\0" + text.encode()):
        exif = Image.Exif()
        exif.get_ifd(metadata.EXIF)[metadata.USER_COMMENT] = comment
        picture().save(tmp_path / f"a{suffix}", exif=exif)
        found = recipes.read(tmp_path / f"a{suffix}")
        assert (found.program, found.recipe.request.prompt) == ("a1111", "a café")


def test_lines_may_end_as_on_windows() -> None:
    found = asked(f"a fox\r\nin ink \r\n Negative prompt: fog\r\n{PLAIN}\r\n \r\n")
    assert (found["prompt"], found["negative_prompt"], found["steps"]) == ("a fox\nin ink", "fog", 20)


def test_a_prompt_alone() -> None:
    """A last line of fewer than three entries is a part of it."""
    for text in ("a fox, time: 12", "a fox\nSteps: 3", "", "a : b, c : d"):
        assert asked(text)["prompt"] == text.strip()


def test_any_text_is_read_quickly() -> None:
    rng = random.Random(0)
    words = [
        "a",
        " ",
        ",",
        ":",
        '"',
        "\\",
        "\n",
        "<lora:",
        ">",
        "Steps: 3, ",
        "Negative prompt:",
        "Seed: 9e99, ",
        PLAIN,
    ]
    for _ in range(2000):
        infotext.read("".join(rng.choice(words) for _ in range(rng.randrange(40))))
    for long in (" " * 200_000, "a" * 200_000, "a:" * 100_000, '"' * 200_000, "<lora:a" * 50_000, "Steps: 1," * 50_000):
        infotext.read(long)


def test_values_that_no_run_can_have() -> None:
    for wrong in ("Size: 0x0", "Size: 99999999x8", "Steps: 0", "CFG scale: nan"):
        name = wrong.partition(":")[0]
        kept = ", ".join(entry for entry in PLAIN.split(", ") if not entry.startswith(name))
        with pytest.raises(CheckpointError, match=r"a\.png: its recipe is damaged"):
            asked(f"a fox\n{kept}, {wrong}")


def test_what_is_written_is_read_again() -> None:
    recipe = {
        "prompt": "a fox, at dawn",
        "negative_prompt": "fog: thick",
        "steps": 20,
        "sampler": {"name": "dpmpp_2m", "sigma_spacing": "karras"},
        "guidance_scale": 7.5,
        "seed": 7,
        "width": 512,
        "height": 768,
        "clip_skip": 1,
        "lora": [["ink.safetensors", 0.8]],
    }
    found = asked(infotext.write(recipe, "0.1"))
    assert {
        key: found[key] for key in ("prompt", "negative_prompt", "steps", "guidance_scale", "seed", "clip_skip")
    } == {key: recipe[key] for key in ("prompt", "negative_prompt", "steps", "guidance_scale", "seed", "clip_skip")}
    assert (found["width"], found["height"], found["lora"]) == (512, 768, [["ink", 0.8]])
    assert found["like"] == "a1111:karras"
    assert "not done" not in found


# --- ComfyUI ---------------------------------------------------------------------------------------------------------

GRAPH: dict[str, Any] = {
    **text_to_picture("a fox", 768, 512, seed=8566257, steps=20, cfg=8, sampler_name="dpmpp_2m", scheduler="karras"),
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["4", 0],
            "clip": ["4", 1],
            "lora_name": "ink.safetensors",
            "strength_model": 0.5,
            "strength_clip": 0.5,
        },
    },
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
}


def changed(**nodes: Any) -> dict[str, Any]:
    """The graph with other inputs: n3={"steps": 4}."""
    graph: dict[str, Any] = json.loads(json.dumps(GRAPH))
    for name, inputs in nodes.items():
        graph[name[1:]]["inputs"] |= inputs
    return graph


def from_graph(graph: Any) -> dict[str, Any]:
    return recipes.described(recipes.of(comfyui.read(json.dumps(graph), "a.png"), "a.png"))


def test_a_graph_is_understood() -> None:
    assert from_graph(GRAPH) == {
        "program": "comfyui",
        "prompt": "a fox",
        "negative_prompt": "fog",
        "steps": 20,
        "guidance_scale": 8.0,
        "sampler": {"name": "dpmpp_2m"},
        "seed": 8566257,
        "height": 512,
        "width": 768,
        "clip_skip": 1,
        "like": "comfyui:karras",
        "prompt_style": "comfyui",
        "lora": [["ink.safetensors", 0.5]],
        "checkpoint": "v1-5.safetensors",
    }


def test_values_may_come_from_nodes_of_their_own() -> None:
    graph = changed(n3={"seed": ["20", 0], "latent_image": ["21", 0]}, n6={"text": ["22", 0]})
    graph["20"] = {"class_type": "PrimitiveNode", "inputs": {"value": 5}}
    graph["21"] = {"class_type": "Reroute", "inputs": {"": ["5", 0]}}
    graph["22"] = {"class_type": "PrimitiveString", "inputs": {"value": "an owl"}}
    found = from_graph(graph)
    assert (found["seed"], found["prompt"], found["width"]) == (5, "an owl", 768)
    assert "not done" not in found


def test_other_nodes_are_named() -> None:
    graph = changed(n3={"positive": ["30", 0], "scheduler": "gits", "latent_image": ["31", 0], "denoise": 0.6})
    graph["30"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0]}}
    graph["31"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["32", 0], "vae": ["4", 2]}}
    graph["32"] = {"class_type": "LoadImage", "inputs": {"image": "dawn.png"}}
    found = from_graph(graph)
    assert found["image"] == "dawn.png"
    assert found["strength"] == 0.6
    assert "prompt" not in found
    assert sorted(found["not done"]) == [
        "node 'CLIPTextEncode'",
        "node 'ConditioningCombine'",
        "node 'EmptyLatentImage'",
        "noise levels 'gits'",
    ]


def test_of_several_samplers_the_one_that_begins_is_read() -> None:
    """The second of a picture that is made large comes first in the file, if its node was drawn first."""
    graph = changed(n3={"latent_image": ["50", 0], "steps": 8, "denoise": 0.5})
    graph["50"] = {"class_type": "LatentUpscale", "inputs": {"samples": ["51", 0]}}
    graph["51"] = {"class_type": "KSampler", "inputs": {**GRAPH["3"]["inputs"], "seed": 4}}
    found = from_graph(graph)
    assert (found["seed"], found["steps"], found["width"]) == (4, 20, 768)
    assert sorted(found["not done"]) == ["node 'KSampler'", "node 'LatentUpscale'"]


def test_texts_are_found_behind_a_control() -> None:
    """Which is named as not done; both of its outputs lead to a text of its own."""
    graph = changed(n3={"positive": ["60", 0], "negative": ["60", 1]})
    graph["60"] = {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["61", 0], "negative": ["7", 0]}}
    graph["61"] = {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0]}}
    found = from_graph(graph)
    assert (found["prompt"], found["negative_prompt"]) == ("a fox", "fog")
    assert sorted(found["not done"]) == ["node 'ControlNetApply'", "node 'ControlNetApplyAdvanced'"]
    graph["60"]["inputs"]["positive"] = ["60", 0]  # a circle
    assert "prompt" not in from_graph(graph)


def test_a_graph_without_a_prompt_is_not_painted_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = {**GRAPH, "3": {**GRAPH["3"], "class_type": "KSamplerAdvanced"}}
    path = foreign(tmp_path / "a.png", prompt=json.dumps(graph))
    assert "node 'KSamplerAdvanced'" in from_graph(graph)["not done"]
    assert cli.main(["generate", "--recipe", str(path), "--model", "x.safetensors"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a.png: its recipe has no prompt (none that is understood); give one here")


def test_a_circle_of_nodes_ends() -> None:
    graph = changed(n10={"model": ["10", 0], "clip": ["11", 0]}, n11={"clip": ["10", 1]})
    graph["3"]["inputs"]["latent_image"] = ["40", 0]
    graph["40"] = {"class_type": "Reroute", "inputs": {"": ["40", 0]}}
    assert from_graph(graph)["steps"] == 20


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"3": 4}', '{"3": {"class_type": "KSampler"}}', "[" * 100_000])
def test_damaged_graphs(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"a\.png: its graph"):
        comfyui.read(text, "a.png")


def test_strange_inputs_are_named() -> None:
    for strange in (None, [], {}, "x", [1], 1e400, True, ["99", 0], [[1], 0]):
        graph = changed(
            n3={"steps": strange, "cfg": strange, "positive": strange, "model": strange, "denoise": strange}
        )
        assert "\n" not in complaint_of(lambda graph=graph: from_graph(graph))  # type: ignore[misc]


# --- the command line ------------------------------------------------------------------------------------------------


def foreign(path: Path, **texts: str) -> Path:
    """A PNG with texts of another program."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    picture().save(path, pnginfo=info)
    return path


def test_info_of_their_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign(tmp_path / "a.png", parameters=f"a fox\n{PLAIN}, Script: X/Y/Z plot")
    assert cli.main(["info", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["program"], found["prompt"], found["not done"]) == ("a1111", "a fox", ["Script: 'X/Y/Z plot'"])
    graph = foreign(tmp_path / "b.png", prompt=json.dumps(GRAPH), workflow="{}")
    assert cli.main(["info", str(graph)]) == 0
    assert json.loads(capsys.readouterr().out)["program"] == "comfyui"


def test_their_picture_wants_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign(tmp_path / "a.png", parameters=f"a fox\n{PLAIN}, Model: photo")
    assert cli.main(["generate", "--recipe", str(path)]) == 2
    assert "was made by a1111 with another model, photo; name it with --model" in capsys.readouterr().err
    lora = foreign(tmp_path / "b.png", parameters=f"a fox <lora:ink:1>\n{PLAIN}")
    assert cli.main(["generate", "--recipe", str(lora), "--model", "x.safetensors"]) == 2
    assert "was made with --lora ink; give it again" in capsys.readouterr().err
    only = foreign(tmp_path / "c.png", workflow="{}")
    assert cli.main(["info", str(only)]) == 2
    assert "not the graph that was run" in capsys.readouterr().err


SMALL = ["--steps", "2", "--seed", "3", "--quiet"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_replay_gives_the_same_file(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"a{suffix}"
    assert cli.main(["generate", "a red star", *SMALL, "--infotext", "--out", str(path)]) == 0
    before = sorted(p.name for p in tmp_path.iterdir())
    assert cli.main(["replay", str(path), "--quiet"]) == 0
    said = capsys.readouterr()
    assert "the same file again, byte for byte" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert PARAMETERS in metadata.texts_of(path, 2**20)


@pytest.mark.parametrize("name", ["a", "a.png", "a.JPE", "a.dat"])
def test_a_replay_is_written_in_the_format_that_the_file_has(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its name is: a JPEG beside a PNG of the same pixels would be called another picture."""
    assert cli.main(["generate", "a red star", *SMALL, "--out", str(tmp_path / "b.jpg")]) == 0
    path = (tmp_path / "b.jpg").rename(tmp_path / name)
    assert cli.main(["replay", str(path), "--quiet"]) == 0
    assert f"{name}: the same file again, byte for byte" in capsys.readouterr().err
    assert metadata.suffix_of(path) == ".jpg"


def test_a_replay_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, again = tmp_path / "a.png", tmp_path / "again.png"
    assert cli.main(["generate", "a red star", *SMALL, "--out", str(path)]) == 0
    recipe = read_recipe(path)
    save_picture(label(Image.new("RGB", (64, 64)), {**recipe, "torch": "1.0", "together": 4}), path)
    capsys.readouterr()
    assert cli.main(["replay", str(path), "--quiet", "--out", str(again)]) == 1
    said = capsys.readouterr()
    assert said.out == f"{again}\n"
    assert "another picture: " in said.err
    assert "torch: 1.0 then" in said.err
    assert "made together with 3 others" in said.err
    with Image.open(again) as same:
        save_picture(label(same.convert("RGB"), {**recipe, "note": 1}), path)
    assert cli.main(["replay", str(path), "--quiet"]) == 0
    assert "the same picture again; its file has other texts" in capsys.readouterr().err


def test_a_replay_of_another_program_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = foreign(tmp_path / "a.png", parameters=f"a fox\n{PLAIN}")
    assert cli.main(["replay", str(path)]) == 2
    assert "are not repeated bit for bit" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "none.png")]) == 2


def test_patterns_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "{k:03}-{prompt}-{seed}.jpg")
    assert cli.main(["generate", "a red star", *SMALL, "--num-images", "2", "--out", out]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["001-a-red-star-3.jpg", "002-a-red-star-4.jpg"]
    assert cli.main(["generate", "a red star", *SMALL, "--out", str(tmp_path / "{name}.png")]) == 2
    assert "{name} stands for nothing; known are {prompt}, {seed}, {k}" in capsys.readouterr().err


def test_the_mark_can_be_left_out(tmp_path: Path) -> None:
    for options, marked in (([], True), (["--no-mark"], False)):
        path = tmp_path / f"{marked}.png"
        assert cli.main(["generate", "a red star", *SMALL, *options, "--out", str(path)]) == 0
        assert (b"DigitalSourceType" in path.read_bytes()) == marked
        assert KEY in metadata.texts_of(path, 2**20)
