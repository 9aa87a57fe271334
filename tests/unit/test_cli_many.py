"""``minidiff generate --prompts``: the library's pictures, runs that go on, kills, processes, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import Control, fast
from minidiff.cli.many.inputs import WHOLE, fingerprint
from minidiff.training.run import claimed
from tests.support.command import ROOT, TEXT, Run, one_error, pixels, process
from tests.support.tiny import tiny_controlnet

LINES = "a fox\nan owl\n\na cat\na dog\nan emu\n"
MADE = ("--model", "text", "--steps", 2, "--quiet")


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are() -> Iterator[None]:
    """A job that goes on sets the number of threads that it was begun with."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text(LINES)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """The pictures of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0].isdigit()}


@pytest.mark.parametrize("style", ["plain", "fast", "comfyui"])
def test_batches_are_those_of_the_library(run: Run, models: Path, prompts: Path, tmp_path: Path, style: str) -> None:
    """Plain and fast, in a dialect, and under a control: two lines at once, of which an empty one is none."""
    options: list[object] = {
        "plain": ["--plain"],
        "comfyui": ["--prompt-style", "comfyui", "--negative", "(rain)"],
    }.get(style, [])
    if style == "comfyui":
        prompts.write_text("a (fox:1.3)\n" + LINES[6:])
    tiny_controlnet(config=TEXT).save(tmp_path / "canny.safetensors")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "edges.png")
    control = ["--control", "canny.safetensors=edges.png,0.5"] if style != "plain" else []
    ended = run(
        "generate", "--prompts", "p.txt", "--out", "pics/", "--seed", 7, "--together", 2, *MADE, *options, *control
    )
    assert (ended.status, ended.err) == (0, [])
    sd = minidiff.load(models / "text.safetensors", low_memory=style == "comfyui")
    net = minidiff.load("canny.safetensors")
    if style != "plain":
        fast.optimize(sd)
        fast.optimize(net)
    controls = [Control(net, "edges.png", 0.5)] if control else None
    texts = [(prompts.read_text().split("\n")[k], 7 + k) for k in (0, 1, 3, 4, 5)]
    more = {"prompt_style": "comfyui", "negative_prompt": "(rain)"} if style == "comfyui" else {}
    wanted = []
    for k in (0, 2, 4):
        some = texts[k : k + 2]
        wanted += sd.generate(
            [p for p, _ in some], steps=2, seed=[s for _, s in some], progress=False, controls=controls, **more
        )
    assert len(ended.out) == 5
    for path, image in zip(ended.out, wanted, strict=True):
        assert np.array_equal(pixels(path), np.asarray(image))
        assert minidiff.read_recipe(path) == minidiff.read_recipe(image)
    assert [Path(p).name for p in ended.out[1:3]] == ["00002-an-owl-8.png", "00004-a-cat-10.png"]


def test_a_run_goes_on_where_it_was(run: Run, prompts: Path, tmp_path: Path) -> None:
    """What is missing is made with the rest of its group, from the seed that was drawn; the rest stays as it is."""
    command = ("generate", "--prompts", "p.txt", "--out", "pics/{k}.webp", "--together", 2, *MADE)
    (tmp_path / "pics").mkdir()
    first = run(*command)
    assert (first.status, len(first.out), first.err) == (0, 5, [])
    before = files(tmp_path / "pics")
    assert list(before) == [f"{k}.webp" for k in (1, 2, 4, 5, 6)]
    kept = (tmp_path / "pics" / "1.webp").stat()
    (tmp_path / "pics" / "2.webp").unlink()
    again = run(*command[:-1])
    assert (again.status, again.out) == (0, ["pics/2.webp"])
    assert any("4 of 5 pictures" in line or "3 of 5 pictures" in line for line in again.err), again.err
    assert files(tmp_path / "pics") == before
    assert (tmp_path / "pics" / "1.webp").stat() == kept
    assert run(*command).out == []


def test_a_model_s_words_are_listed_once(run: Run, prompts: Path) -> None:
    """Groups that a small vocabulary does not know name what is new in them; the list of its words is said once."""
    prompts.write_text("a red fox\na fox and an owl\na blue star\na fox\n")
    options = ("--steps", 1, "--seed", 1, "--together", 1, "--quiet")
    ended = run("generate", "--prompts", "p.txt", "--out", "pics/", *options)
    assert ended.status == 0
    first, second = ended.err
    assert first.startswith("minidiff: warning: this model does not know 'fox'; its words are: a above ")
    assert second == "minidiff: warning: this model does not know 'owl'"
    again = run("generate", "a fox", "--out", "fox.png", "--steps", 1, "--quiet")  # another run in the same process
    assert "its words are: " in again.err[0]


def test_threads_are_those_of_the_first_run(run: Run, prompts: Path, tmp_path: Path) -> None:
    command = ("generate", "--prompts", "p.txt", "--out", "pics/", "--seed", 1, *MADE)
    torch.set_num_threads(2)
    assert run(*command).status == 0
    job = json.loads((tmp_path / "pics" / "job.json").read_text())
    assert (job["threads"], job["seeds"], job["together"]) == (2, [1], 8)
    torch.set_num_threads(1)
    ended = run(*command[:-1])
    assert "minidiff: pics/job.json: 2 threads a process, as it was begun" in ended.err
    assert torch.get_num_threads() == 2


def test_a_folder_has_one_run_at_a_time(run: Run, prompts: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "pics"):
        one_error(run("generate", "--prompts", "p.txt", "--out", "pics/", *MADE), "another run is using this folder")


def test_another_job_is_not_mixed_in(run: Run, prompts: Path, tmp_path: Path) -> None:
    command = ("generate", "--prompts", "p.txt", "--out", "pics/", "--seed", 1, *MADE)
    assert run(*command).status == 0
    before = files(tmp_path / "pics")
    one_error(run(*command, "--steps", 3), "pics/job.json: was begun with --steps 2, this run has 3; name another")
    one_error(run(*command, "--seed", 2), "was begun with --seed 1, this run has 2;")
    one_error(run(*command, "--scale", 2), "was begun with --scale none, this run has 2.0;")
    one_error(run(*command, "--together", 3), "was begun with --together 8")
    one_error(run("generate", "--prompts", "p.txt", "--out", "pics/", "--steps", 2, "--quiet"), "another model")
    prompts.write_text("a fox\n")
    one_error(run(*command), "was begun with other lines")
    job = tmp_path / "pics" / "job.json"
    told = json.loads(job.read_text())
    job.write_text(json.dumps({**told, "threads": 0}))
    one_error(run(*command), "pics/job.json: is damaged (together=8, threads=0")
    job.unlink()
    one_error(run(*command), "pics/00001-a-fox-1.png: exists, and no job.json that says how; name another folder")
    assert files(tmp_path / "pics") == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--out", "pics/", "a fox"], "--prompts and prompts are both given"),
        (["--out", "pics/", "--force"], "--prompts and --force are both given"),
        (["--out", "fox.png"], "--out fox.png: is one name for many pictures"),
        (["--out", "{k}-{who}.png"], "{who} stands for nothing"),
        (["--out", "{prompt}.png"], "lines 1 and 2 both make a-fox.png"),
        ([], "name a folder for them: --out pictures/"),
        (["--out", "pics/", "--prompts", "gone.txt"], "gone.txt: no such file"),
        (["--out", "pics/", "--prompts", "."], ".: is a folder"),
        (["--out", "pics/", "--together", "0"], "--together"),
        (["--out", "pics/", "--sampler", "oiler"], "oiler"),
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_mistakes_are_one_line(run: Run, prompts: Path, given: list[str], words: str) -> None:
    prompts.write_text("a fox\nA fox\n")
    one_error(run("generate", "--prompts", "p.txt", *MADE, *given), words)
    one_error(run("generate", "a fox", "--together", 2, *MADE), "--together is about the lines of --prompts")
    assert not Path("pics").exists()


def test_broken_lines_are_told_at_the_end(run: Run, tmp_path: Path) -> None:
    """A line that only the model finds wrong does not take its group along; text and options go to a model in turn."""
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a fox"}\nnonsense\n{"prompt": "a cat", "height": 9}\n{"prompt": "a dog", "image": "p.jsonl"}\n'
        '{"prompt": "an owl"}\n{"prompt": "an emu", "prompt_style": "comfyui"}\n'
        '{"prompt": "(x:1e99)", "prompt_style": "comfyui"}\n'
    )
    ended = run("generate", "--prompts", "p.jsonl", "--out", "pics/", "--seed", 1, *MADE)
    assert ended.status == 1
    assert [Path(p).name for p in ended.out] == ["00001-a-fox-1.png", "00005-an-owl-5.png", "00006-an-emu-6.png"]
    told = [line.removeprefix("minidiff: error: p.jsonl, ").partition(":")[0] for line in ended.err]
    assert told == ["line 2", "line 3", "line 4", "line 7"], ended.err
    (tmp_path / "p.jsonl").write_text('{"steps": 2}\n{"seed": 3, "num_images": 2}\n{"prompt": "a fox"}\n')
    ended = run(
        "generate", "--prompts", "p.jsonl", "--out", "plain/", "--model", "plain", "--quiet", "--seed", 1, "--steps", 2
    )
    assert [Path(p).name for p in ended.out] == [f"0000{k}-picture-{s}.png" for k, s in ((1, 1), (2, 3), (2, 4))]
    assert len(ended.err) == 1
    assert "p.jsonl, line 3: " in ended.err[0]
    assert "knows no text" in ended.err[0]


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_a_kill_in_the_middle_of_a_batch(run: Run, models: Path, prompts: Path, tmp_path: Path) -> None:
    """Every file that is there is whole, at most one group is lost, and the next run gives the bytes of a whole one."""
    prompts.write_text("".join(f"picture {k}\n" for k in range(12)))
    given = ["generate", "--prompts", "p.txt", "--model", str(models / "text.safetensors"), "--together", "2",
             "--steps", "40", "--seed", "1", "--quiet"]  # fmt: skip
    with process(*given, "--out", "cut/", cwd=tmp_path) as p:
        deadline = time.monotonic() + 100
        folder = tmp_path / "cut"
        while (not folder.exists() or len(files(folder)) < 4) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)
        p.send_signal(signal.SIGKILL)
        out, _ = p.communicate(timeout=60)
    there = files(folder)
    assert 4 <= len(there) < 12
    assert len(out.splitlines()) >= len(there) - 1, "each is printed when it is whole"
    for name in there:
        minidiff.read_recipe(folder / name)
    assert run(*given, "--out", "cut/").status == 0
    assert run(*given, "--out", "whole/").status == 0
    assert files(folder) == files(tmp_path / "whole")
    assert [p.name for p in folder.iterdir() if p.suffix == ".part"] == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_one_two_and_three_processes_make_the_same_files(models: Path, prompts: Path, tmp_path: Path) -> None:
    """Broken lines are told once, after all groups; a second run goes on where the first was."""
    prompts.write_text(
        "".join(f'{{"prompt": "picture {k}"}}\n' for k in range(7)) + '{"prompt": "x", "height": 9}\nx\n'
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    made = {}
    for ranks in (1, 2, 3):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        given = ["-m", "minidiff", "generate", "--prompts", "p.txt", "--out", f"{ranks}/", "--model"]
        given += [
            str(models / "text.safetensors"),
            "--steps",
            "2",
            "--seed",
            "1",
            "--quiet",
            "--together",
            "2",
            "--device",
            "cpu",
        ]
        command = [*([sys.executable] if ranks == 1 else launch), *given]
        if ranks == 3:  # one of two has been made by another run
            (tmp_path / "3").mkdir()
            for path in list((tmp_path / "2").iterdir())[:4]:
                (tmp_path / "3" / path.name).write_bytes(path.read_bytes())
            (tmp_path / "3" / "job.json").write_bytes((tmp_path / "2" / "job.json").read_bytes())
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        told = [line for line in done.stderr.splitlines() if line.startswith("minidiff: ")]
        assert [line.partition(", ")[2][:7] for line in told] == ["line 8:", "line 9:"], done.stderr
        assert done.returncode == 1
        made[ranks] = files(tmp_path / str(ranks))
        if ranks < 3:
            assert sorted(done.stdout.split()) == [f"{ranks}/{name}" for name in made[ranks]]
    assert len(made[1]) == 7
    assert made[1] == made[2] == made[3]


def test_lines_name_their_controls(run: Run, models: Path, tmp_path: Path) -> None:
    """In place of those of the command line; a control that is missing or none breaks its line alone."""
    net = tiny_controlnet(config=TEXT)
    for name in ("canny", "depth"):
        net.save(tmp_path / f"{name}.safetensors")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "edges.png")
    lines = [
        {"prompt": "a fox", "seed": 3},
        {"prompt": "a fox", "seed": 3, "control": "depth.safetensors=edges.png,0.5"},
        {
            "prompt": "a fox",
            "seed": 3,
            "control": ["canny.safetensors=edges.png", "depth.safetensors=edges.png,0.5,0,0.5"],
        },
        {"prompt": "a fox", "seed": 3, "control": []},
        {"prompt": "a fox", "seed": 3, "control": "none.safetensors=edges.png"},
        {"prompt": "a fox", "seed": 3, "control": "edges.png"},
        {"prompt": "a fox", "seed": 3, "control": 4},
        {"prompt": "a fox", "seed": 3, "control": "text.safetensors=edges.png"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = ("--control", "canny.safetensors=edges.png,0.8", "--plain")
    ended = run("generate", "--prompts", "p.jsonl", "--out", "pics/", "--together", 1, *MADE, *shared)
    assert ended.status == 1
    for number, told in ((5, "none.safetensors"), (6, "FILE=PICTURE"), (7, "expected a list"), (8, "text.safetensors")):
        (line,) = (line for line in ended.err if f"p.jsonl, line {number}: " in line)
        assert told in line
    sd = minidiff.load(models / "text.safetensors")
    one, two = Control(net, "edges.png", 0.8), Control(net, "edges.png", 0.5)
    half = [Control(net, "edges.png"), Control(net, "edges.png", 0.5, 0, 0.5)]
    assert len(ended.out) == 4
    for path, controls in zip(ended.out, ([one], [two], half, []), strict=True):
        wanted = sd.generate("a fox", steps=2, seed=3, controls=controls, progress=False)[0]
        assert np.array_equal(pixels(path), np.asarray(wanted))


def test_a_file_that_has_changed_since_is_not_mixed_in(run: Run, tmp_path: Path) -> None:
    """Of the command line and of a line, pictures and controls."""
    for seed, name in ((5, "canny"), (6, "other")):
        tiny_controlnet(seed, config=TEXT).save(tmp_path / f"{name}.safetensors")
    colours = {"edges.png": "white", "start.png": "red", "own.png": "blue"}
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    lines = [{"prompt": "a fox", "control": "canny.safetensors=edges.png"}, {"prompt": "an owl", "image": "own.png"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ("generate", "--prompts", "p.jsonl", "--out", "pics/", "--seed", 1, *MADE, "--image", "start.png")
    assert run(*command).status == 0
    for path in (*colours, "canny.safetensors"):
        before = (tmp_path / path).read_bytes()
        if path.endswith(".png"):
            Image.new("RGB", (32, 32), "green").save(tmp_path / path)
        else:
            (tmp_path / path).write_bytes((tmp_path / "other.safetensors").read_bytes())
        one_error(run(*command), f"pics/job.json: was begun with another '{path}'; name another folder with --out")
        (tmp_path / path).write_bytes(before)
    assert run(*command).status == 0
    job = tmp_path / "pics" / "job.json"
    told = json.loads(job.read_text())
    assert set(told.pop("inputs")) == {*colours, "canny.safetensors"}
    job.write_text(json.dumps(told))  # as versions before this wrote it
    assert run(*command).status == 0


@pytest.mark.parametrize("size", [100, WHOLE + 5])
def test_a_fingerprint_sees_both_ends_of_a_file(tmp_path: Path, size: int) -> None:
    path, found = tmp_path / "file", set()
    for change in (None, 0, size - 1):
        with path.open("wb") as file:
            file.truncate(size)
            if change is not None:
                file.seek(change)
                file.write(b"x")
        found.add(fingerprint(path))
    assert len(found) == 3
    inside = fingerprint(tmp_path)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    assert fingerprint(tmp_path) == inside, "no folder inside it, and no pipe is opened"
    (tmp_path / "more").write_text("x")
    assert fingerprint(tmp_path) != inside


def test_a_line_whose_file_cannot_be_read_is_told_and_the_others_are_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("minidiff.cli.many.inputs.fingerprint", refuse)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    lines = [{"prompt": "a fox", "image": name} for name in ("pipe.png", "folder.png")] + [{"prompt": "an owl"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = run("generate", "--prompts", "p.jsonl", "--out", "pics/", "--seed", 1, *MADE)
    assert (ended.status, len(ended.out)) == (1, 1)
    assert [line.partition("line ")[2][0] for line in ended.err] == ["1", "2"]
