"""The dtype that the command line chooses: the measurement, its cache, and the commands that use it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import cli, fast
from minidiff.cli import opening
from minidiff.fast import machine, probe
from minidiff.fast.machine import cache_folder
from tests.support.tiny import tiny_sd


class Measured:
    """Stands in for the measurement, and counts how often it is asked."""

    def __init__(self, answer: float) -> None:
        self.answer, self.asked = answer, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that keeps the answer during a test, in a folder that does not exist yet."""
    path = tmp_path / "cache" / "minidiff" / "bfloat16.json"
    monkeypatch.setattr(machine, "cache_folder", lambda: path.parent)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    fake = Measured(2.0)
    monkeypatch.setattr(probe, "measured", fake)
    return fake


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_it_is_measured_once_a_machine(cache: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [probe.gain(), probe.gain()] == [2.0, 2.0]
    assert measured.asked == 1
    here = machine.description()
    assert json.loads(cache.read_text()) == {here: 2.0}
    monkeypatch.setattr(machine, "description", lambda: "another one")
    measured.answer = 0.5
    assert [probe.gain(), probe.gain()] == [0.5, 0.5]
    assert measured.asked == 2
    assert json.loads(cache.read_text()) == {here: 2.0, "another one": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b"[" * 100_000,
        *(b'{"KEY": %s}' % x for x in (b'"fast"', b"NaN", b"-1", b"[2]", b"1" + b"0" * 400)),
    ],
    ids=lambda content: content[:12].decode("latin1"),
)
def test_a_cache_that_makes_no_sense_is_written_anew(content: bytes, cache: Path, measured: Measured) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.replace(b"KEY", machine.description().encode()))
    assert probe.gain() == 2.0
    assert measured.asked == 1
    assert json.loads(cache.read_text()) == {machine.description(): 2.0}


def test_nowhere_to_keep_it(tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path / "file" / "minidiff")  # below a file
    assert probe.gain() == 2.0
    (tmp_path / "folder" / "bfloat16.json").mkdir(parents=True)
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path / "folder")
    assert probe.gain() == 2.0

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(machine, "cache_folder", homeless)
    assert probe.gain() == 2.0
    assert measured.asked == 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bfloat16.json", "file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="paths as posix has them")
@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {}, "/me/.cache"),
        ("linux", {"XDG_CACHE_HOME": "/fast"}, "/fast"),
        ("darwin", {}, "/me/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
    ],
)
def test_where_it_is_kept(
    platform: str, environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.sys, "platform", platform)
    assert cache_folder() == Path(folder, "minidiff")


# --- what is measured ------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where work is done."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, []  # type: ignore[var-annotated]

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Work that takes ``seconds``, one after another, the last again and again."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.done.append(name)

        return run


def test_the_best_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(probe.time, "perf_counter", clock)
    plain, other = clock.work("plain", 9, 2, 7, 2), clock.work("other", 30, 1, 5)
    assert probe.speedup(plain, other) == 2.0
    assert clock.done == ["plain", "other"] * probe.ROUNDS
    clock.done.clear()
    assert probe.speedup(clock.work("plain", 1), clock.work("other", 10)) == 0.1
    assert len(clock.done) == 4, "who loses that clearly is not waited for"


def test_both_must_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers, smaller, asked in (([2.0, 1.5], 1.5, 2), ([1.5, 0.5], 0.5, 2), ([0.5], 0.5, 1)):
        left = list(answers)
        monkeypatch.setattr(probe, "speedup", lambda plain, other, left=left: left.pop(0))
        assert probe.measured() == smaller
        assert len(answers) - len(left) == asked


def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def once(plain: Callable[[], torch.Tensor], other: Callable[[], torch.Tensor]) -> float:
        seen.append((plain().dtype, other().dtype))
        return speedup(plain, other)

    speedup = probe.speedup
    monkeypatch.setattr(probe, "speedup", once)
    assert 0 < probe.measured() < float("inf")
    assert set(seen) == {(torch.float32, torch.bfloat16)}


# --- what follows from it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "gain", "dtype", "asked"),
    [
        (probe.LARGE, 1.3, torch.bfloat16, 1),
        (probe.LARGE, 1.29, torch.float32, 1),
        (probe.LARGE - 1, 9.0, torch.float32, 0),
    ],
)
@pytest.mark.usefixtures("cache")
def test_the_choice(size: int, gain: float, dtype: torch.dtype, asked: int, measured: Measured) -> None:
    measured.answer = gain
    assert probe.choice(size) == dtype
    assert measured.asked == asked


def test_size_on_disk(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"12345")
    (tmp_path / "index.json").write_bytes(b"{}")
    assert probe.size_on_disk(tmp_path) == 7
    assert probe.size_on_disk(tmp_path / "index.json") == 2
    assert probe.size_on_disk(tmp_path / "nothing") == 0


GENERATE = ("generate", "a fox", "--model", "m.safetensors", "--steps", "1", "--seed", "3", "--force", "--out", "a.png")


@pytest.mark.usefixtures("cache")
def test_the_command_line(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto takes what wins, says so and notes it; another choice, a small model and a GPU never ask."""
    monkeypatch.chdir(tmp_path)
    tiny_sd().save("m.safetensors")

    def made(*options: str) -> tuple[str, str | None, str]:
        assert cli.main([*GENERATE, *options]) == 0
        recipe = minidiff.read_recipe("a.png")
        return recipe["dtype"], recipe.get("dtype_chosen"), capsys.readouterr().err.splitlines()[0]

    assert made() == ("float32", None, "minidiff: computing in float32 on cpu (--dtype auto)")
    assert measured.asked == 0, "a small model does not ask"
    monkeypatch.setattr(probe, "LARGE", 1)
    for dtype in ("float32", "bfloat16"):
        assert made("--dtype", dtype)[:2] == (dtype, None)
    assert measured.asked == 0
    why = "this processor is faster in it; --dtype float32 is more exact"
    assert made() == ("bfloat16", "auto", f"minidiff: computing in bfloat16 on cpu (--dtype auto: {why})")
    assert measured.asked == 1
    sd = minidiff.load("m.safetensors", dtype=torch.bfloat16)
    fast.optimize(sd)  # in bfloat16, where the processor has it, attention rounds elsewhere
    (want,) = sd.generate("a fox", steps=1, seed=3, progress=False)
    with Image.open("a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(want))

    measured.answer = 0.1
    monkeypatch.setattr(machine, "description", lambda: "a slow one")
    assert made() == ("float32", None, "minidiff: computing in float32 on cpu (--dtype auto)")
    assert measured.asked == 2


def test_a_gpu_computes_as_the_file_is_stored(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LARGE", 0)
    assert opening.probed(__file__, torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert opening.probed(__file__, None) is None
    assert measured.asked == 0
