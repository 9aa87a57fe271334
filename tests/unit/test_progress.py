"""The progress bar, and runs without stdout or stderr, or with closed ones."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minidiff import StableDiffusion
from minidiff.console import progress
from minidiff.console.progress import Counter, check_progress, counted
from minidiff.errors import ConfigError
from tests.unit.test_training_loop import pixel_trainer

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Cell(io.StringIO):
    """``sys.stderr`` as it is in a notebook, which is no terminal."""

    __module__ = "ipykernel.iostream"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def stderr(monkeypatch: pytest.MonkeyPatch, stream: Any) -> Any:
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("kind", [Terminal, Cell])
@pytest.mark.parametrize("show", [None, True])
def test_a_bar_where_it_can_be_redrawn(
    kind: type[io.StringIO], show: bool | None, monkeypatch: pytest.MonkeyPatch, sd: StableDiffusion
) -> None:
    stream = stderr(monkeypatch, kind())
    sd.generate("a", steps=2, seed=0, progress=show)
    assert "3/3" in stream.getvalue()
    assert "\r" in stream.getvalue()


@pytest.mark.parametrize("kind", [Terminal, Cell, io.StringIO])
def test_nothing_where_nothing_is_wanted(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch, sd: StableDiffusion
) -> None:
    stream = stderr(monkeypatch, kind())
    sd.generate("a", steps=2, seed=0, progress=False)
    sd.generate("a", steps=2, seed=0, progress=lambda step: None)
    if kind is io.StringIO:
        sd.generate("a", steps=2, seed=0)
    assert stream.getvalue() == ""


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, then after 5 seconds and at ever longer intervals up to a minute, and the last."""
    clock, stream = Clock(), stderr(monkeypatch, io.StringIO())
    monkeypatch.setattr(progress, "time", clock)
    with Counter(1002, "step", show=True, done=2) as counter:
        for k in range(1000):
            clock.now += 1
            counter.count(f"loss {k}")
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "minidiff: step 3 of 1,002, 1 s each, 999 s left, loss 0"
    assert lines[-1] == "minidiff: step 1,002 of 1,002, 1 s each, 0 s left, loss 999"
    at = [int(line.split()[2].replace(",", "")) - 2 for line in lines]
    gaps = [b - a for a, b in pairwise(at)]
    assert gaps[:3] == [5, 5, 5]
    assert max(gaps[:-1]) == 60
    assert len(lines) < 40


def test_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, io.StringIO())
    assert list(counted([5, 6], "picture", show=True, what="reading")) == [5, 6]
    assert stream.getvalue().splitlines()[-1].startswith("minidiff: reading, picture 2 of 2, ")
    assert list(counted([], "picture", show=True)) == []


def test_what_is_neither_true_nor_a_function() -> None:
    for right in (True, False, None, print):
        check_progress(right)
    with pytest.raises(ConfigError, match="progress='no' must be True, False, None"):
        check_progress("no")


def test_training_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from minidiff.training.run import train

    stream = stderr(monkeypatch, io.StringIO())
    train(pixel_trainer(steps=2, warmup=0), tmp_path / "a")
    seen: list[Any] = []
    train(pixel_trainer(steps=2, warmup=0), tmp_path / "b", progress=seen.append)
    assert [report.step for report in seen] == [1, 2]
    assert stream.getvalue() == ""
    train(pixel_trainer(steps=2, warmup=0), tmp_path / "c", progress=True)
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("minidiff: step 2 of 2, ")
    assert f"loss {seen[-1].loss:.4f}, rate {seen[-1].rate:.2g}" in last
    stream = stderr(monkeypatch, Terminal())
    train(pixel_trainer(steps=2, warmup=0), tmp_path / "d")
    assert f"loss {seen[-1].loss:.4f}" in stream.getvalue()
    assert "2/2" in stream.getvalue()


PROGRAM = """
import os, sys
{start}
import minidiff
sd = minidiff.bundled()
image = sd.generate("a zebra beside a red circle " * 30, seed=0, steps=2, progress={progress})[0]
minidiff.save_png(image, "made.png")
"""
STREAMS = {
    "none": "sys.stdout = sys.stderr = None",
    "closed": "sys.stdout.close(); sys.stderr.close()",
    "closed below": "os.close(1); os.close(2)",
}


@pytest.mark.parametrize("start", STREAMS)
@pytest.mark.parametrize("progress", [True, None])
def test_a_program_without_stdout_and_stderr(start: str, progress: bool | None, tmp_path: Path) -> None:
    """A windowed program has neither; a warning (the prompt is cut, and a word is not known) fails nowhere either."""
    code = PROGRAM.format(start=STREAMS[start], progress=progress)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0
    assert (tmp_path / "made.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(os.name != "posix", reason="closes the streams through a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_command_without_stdout_or_stderr(closed: str, tmp_path: Path) -> None:
    """It works, and what is printed on one does not appear on the other, nor in a file that took its place."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = f'"{sys.executable}" -m minidiff generate "a zebra" --steps 1 --seed 3 --out a.png {closed}'
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0
    if ">&-" in closed.split():
        assert done.stdout == b""
    if "2>&-" in closed.split():
        assert done.stderr == b""
    if closed == "2>&-":
        assert done.stdout == b"a.png\n"
    if closed == ">&-":
        assert done.stderr.splitlines()[-1].startswith(b"minidiff: step 1 of 1")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:4] == b"\x89PNG"
    assert data[-12:] == b"\0\0\0\0IEND\xaeB`\x82"
    for words in ("--help", "generate --help", "--version"):
        command = f'"{sys.executable}" -m minidiff {words} {closed}'
        assert subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=False).returncode == 0
    command = f'"{sys.executable}" -m minidiff generate a --stesp 3 {closed}'
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=False).returncode == 2
