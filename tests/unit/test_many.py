"""``--prompts`` without a model: lines, what is wrong with them, seeds, names, groups, and the size of these."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.cli.many import memory
from minidiff.cli.many.groups import PATTERN, batch, groups, pictures
from minidiff.cli.many.lines import Line, read_lines
from minidiff.config import ScheduleConfig
from minidiff.errors import CheckpointError, ConfigError, MinidiffError
from minidiff.pipeline.request import Request
from minidiff.programs import read
from tests.support.tiny import tiny_ddpm, tiny_sd


def check_sampler(choice: Any, like: Any) -> None:
    program = read(like)
    if choice is not None:
        program.sampler(ScheduleConfig(), choice)


def lines_of(tmp_path: Path, text: str | bytes, name: str = "p.txt", **base: Any) -> Any:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_lines(str(path), base, check_sampler)


def test_a_prompt_a_line(tmp_path: Path) -> None:
    """Empty lines count and make nothing; only "\\n" ends a line, and an emoji or a brace is text."""
    found = lines_of(tmp_path, "\ufeffa fox\r\n\n  an owl\u2028by night \n{a|b} 🦊", steps=3)
    assert found.broken == {}
    assert found.good == [
        Line(1, {"steps": 3, "prompt": "a fox"}),
        Line(3, {"steps": 3, "prompt": "an owl\u2028by night"}),
        Line(4, {"steps": 3, "prompt": "{a|b} 🦊"}),
    ]
    assert found.hash != lines_of(tmp_path, "a fox").hash


def test_json_lines_take_precedence(tmp_path: Path) -> None:
    text = '{"prompt": "a", "steps": 4, "sampler": "euler", "guidance_interval": [0, 0.5]}\n{"seed": 3, "prompt": null}'
    first, second = lines_of(tmp_path, text, steps=3, like="a1111").good
    assert first.asked["steps"] == 4
    assert first.asked["sampler"] == {"name": "euler"}
    assert first.asked["guidance_interval"] == (0.0, 0.5)
    assert second.asked == {"steps": 3, "like": "a1111", "seed": 3}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a fox", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('"a fox"', "should be a JSON object with options, not 'a fox'"),
        ('{"scale": 3}', "'scale' is no option of a line; did you mean guidance_scale?"),
        ('{"latents": 3}', "'latents' is no option of a line"),
        ('{"steps": "two"}', "steps: expected int, got 'two'"),
        ('{"steps": 0}', "steps=0"),
        ('{"strength": 3}', "strength=3.0 must lie in 0..1"),
        ('{"guidance_scale": NaN}', "guidance_scale=nan"),
        ('{"sampler": "oiler"}', "did you mean"),
        ('{"sampler": {"name": "ddim", "eta": "x"}}', "eta"),
        ('{"sampler": {}}', "sampler"),
        ('{"like": "paint"}', "paint"),
        ('{"mask": "m.png"}', "a mask needs an image"),
        ('{"image": "gone.png"}', "image gone.png: no such file"),
        ('{"num_images": 1000000}', "at most 10,000"),
        ('{"width": 123456789}', "width"),
        ('{"seed": 1e3}', "seed: expected int"),
        (b'{"prompt": "\xff"}', "is not text in UTF-8 (byte 13)"),
    ],
)
def test_what_is_wrong_with_a_line_stays_with_it(tmp_path: Path, line: str | bytes, words: str) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    found = lines_of(tmp_path, b'{"prompt": "a"}\n' + data + b'\n{"prompt": "b"}')
    assert [one.number for one in found.good] == [1, 3]
    assert list(found.broken) == [2]
    assert words in found.broken[2]
    assert "\n" not in found.broken[2]


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "holds no prompts"), (b"\n \n", "holds no prompts"), (b"a\0b", "is not text in UTF-8")]
)
def test_files_that_are_none(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lines_of(tmp_path, data)
    with pytest.raises(CheckpointError, match="is a folder"):
        read_lines(str(tmp_path), {}, check_sampler)


def line(number: int, **asked: Any) -> Line:
    return Line(number, {"prompt": f"Picture {number}", **asked})


def test_seeds_and_names() -> None:
    """Line k begins at seed s + k - 1, whatever lines are missing; its own seed takes precedence."""
    found = pictures([line(1), line(3, num_images=2), line(4, seed=9)], [7], PATTERN)
    assert [p.name for p in found] == [f"{name}.png" for name in (
        "00001-picture-1-7", "00003-picture-3-9", "00003-picture-3-10", "00004-picture-4-9"
    )]  # fmt: skip
    assert [p.asked["seed"] for p in found] == [7, 9, 10, 9]
    several = pictures([line(1), line(2, seed=1)], [3, 5], "{k}-{seed}.jpg")
    assert [p.name for p in several] == ["1-3.jpg", "1-5.jpg", "2-1.jpg"]
    with pytest.raises(ConfigError, match=r"lines 1 and 2 both make a\.png"):
        pictures([line(1, prompt="A"), line(2, prompt="a")], [7], "{prompt}.png")
    with pytest.raises(ConfigError, match=r"lines 1 and 1 both make 1\.png"):
        pictures([line(1, num_images=2)], [7], "{k}.png")


def test_groups_are_consecutive_and_of_one_kind() -> None:
    lines = [line(k) for k in (1, 2, 3)]
    lines += [line(4, steps=3), line(5, negative_prompt="x"), line(6, negative_prompt="y"), line(7), line(8)]
    made = groups(pictures(lines, [0], PATTERN), 2)
    assert [[p.line for p in group] for group in made] == [[1, 2], [3], [4], [5, 6], [7, 8]]
    fields = batch(made[3])
    assert fields == {"prompt": ["Picture 5", "Picture 6"], "negative_prompt": ["x", "y"], "seed": [4, 5]}
    assert batch([p._replace(asked={"seed": p.line}) for p in made[0]]) == {"seed": [1, 2], "num_images": 2}


# --- the size of a group ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory.RESET.exists(), reason="peaks of memory are Linux's")
def test_a_trial_sees_what_is_taken() -> None:
    taken = memory.taken(torch.device("cpu"), lambda: torch.ones(64 << 20, dtype=torch.uint8).numel())
    assert taken is not None
    assert 60 << 20 < taken < 100 << 20


@pytest.mark.skipif(not memory.RESET.exists(), reason="peaks of memory are Linux's")
def test_a_trial_is_not_deceived_by_garbage() -> None:
    """A model that nobody holds any more lives, in cycles of references, until Python looks for them."""

    class Cycle:
        def __init__(self) -> None:
            self.me, self.weight = self, torch.ones(256 << 20, dtype=torch.uint8)

    def work() -> int:
        gc.collect()
        return torch.ones(64 << 20, dtype=torch.uint8).numel()

    gc.disable()
    try:
        calls: list[int] = []

        def littering() -> None:
            calls.append(work())
            if len(calls) == 1:
                Cycle()

        taken = memory.taken(torch.device("cpu"), littering)
    finally:
        gc.enable()
    assert taken is not None
    assert 60 << 20 < taken < 100 << 20


@pytest.mark.skipif(not memory.RESET.exists(), reason="peaks of memory are Linux's")
def test_a_trial_is_not_deceived_by_what_malloc_keeps() -> None:
    """Blocks below 32 MB come from the heap, which keeps their memory once it is free and gives it to the work."""

    def block(megabytes: int) -> torch.Tensor:
        return torch.ones(megabytes << 20, dtype=torch.uint8)

    block(31)  # a block this large, once free, moves malloc's bound for the heap above it
    blocks = [block(16) for _ in range(16)]
    above = [torch.ones(4 << 10, dtype=torch.uint8) for _ in range(64)]  # else the top of the heap is given back
    del blocks
    taken = memory.taken(torch.device("cpu"), lambda: block(64).numel())
    assert above
    assert taken is not None
    assert 60 << 20 < taken < 100 << 20


@pytest.mark.parametrize("trial", [1 << 30, None])
def test_groups_fit_into_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch, trial: int | None) -> None:
    pipe, request = tiny_sd(), Request("a fox", steps=2, seed=0)
    monkeypatch.setattr(memory, "taken", lambda device, work: trial)
    sizes = []
    for gigabytes in (0, 1, 5, 10**6):
        monkeypatch.setattr(memory, "free", lambda device, n=gigabytes: n << 30)
        sizes.append(memory.at_once(pipe, request))
    assert sizes == [1, 1, 2, 8] if trial else [1, 8, 8, 8]
    monkeypatch.setattr(memory, "free", lambda device: 16 << 30)
    assert memory.at_once(pipe, request) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.at_once(pipe, request) == (2 if trial else 8), "processes of one machine share its memory"


def test_a_real_trial() -> None:
    """A step and a decoding, with text and without; and what is broken says so as ever."""
    assert memory.at_once(tiny_sd(), Request("a fox", steps=2, seed=0)) == 8
    assert memory.at_once(tiny_ddpm(), Request(None, steps=2, seed=0)) == 8
    assert memory.free(torch.device("cpu")) > 1 << 20
    with pytest.raises(MinidiffError):
        memory.at_once(tiny_sd(), Request("a fox", steps=2, seed=0, height=9))
