"""The ``minidiff`` command as a whole: help, what was meant by a slip, failures, and how each ends.

The commands have files of their own, ``test_cli_generate.py`` and others. Tiny untrained models stand in for real
ones, and calls run in this process through ``main``.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

import minidiff
from minidiff import console
from minidiff.samplers import SAMPLERS
from minidiff.storage import files
from tests.support.command import Ended, Run, one_error


def test_hints_and_progress_go_to_stderr(run: Run) -> None:
    ended = run("generate", "fox", "--model", "text", "--steps", 2, "--seed", 1)
    assert ended.out == ["fox-1.png"]
    assert ended.err[0] == "minidiff: computing in float32 on cpu (--dtype auto)"
    assert "step" in ended.err[-1]


def test_help(run: Run) -> None:
    for argv in (["--help"], ["generate", "-h"], ["info", "--help"], ["convert", "--help"]):
        ended = run(*argv)
        assert ended.status == 0
        assert ended.err == []
        assert ended.out[0].startswith("usage: minidiff")
    assert " ".join(SAMPLERS) in " ".join(" ".join(run("generate", "--help").out).split())
    assert run("--version") == Ended(0, [f"minidiff {minidiff.__version__}"], [])


@pytest.mark.usefixtures("unchanged")
def test_missing_things(run: Run) -> None:
    one_error(run("generate", "--model", "text", "--quiet"), "no prompt given")
    one_error(run("generate", "a fox", "--model", "none.safetensors"), "none.safetensors: no such file or folder")
    one_error(run("info", "none.safetensors"), "none.safetensors: no such file or folder")
    one_error(run("info"), "PATH", "--help")
    one_error(run("convert", "none", "x.safetensors"), "none: no such file or folder")
    one_error(run(), "no command given", "generate")
    one_error(run("paint"), "paint", "generate")


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
