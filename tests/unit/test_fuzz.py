"""Short fuzzing runs: damaged checkpoints are refused or read unchanged, and so are odd LoRA and embedding files."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest

from minidiff.adapters import lora
from tests.support import fuzz, fuzz_adapters

CASES = 140


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_damaged_and_hostile_files(folder: Path) -> None:
    base = fuzz.Base(folder)
    ends: Counter[str] = Counter()
    faults = []
    for number in range(CASES):
        case, end = base.try_case(number)
        ends[end] += 1
        if end not in fuzz.ALLOWED:
            faults.append(f"case {number}, {case.how} of {case.source}: {end}")
    assert faults == []
    assert ends["refused"] > CASES / 2
    assert ends["weights"] > 0, "no case changed weights alone: the list of ways has shrunk"


def test_a_careless_reader_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: a reader that takes anything is seen to accept another model, or to run a program."""
    base = fuzz.Base(folder)
    monkeypatch.setattr("minidiff.storage.checkpoint.check_header", lambda path: None)
    n = len(base.paths)
    ends = {base.try_case(number)[1] for number in range(0, n * 400, n) if base.damaged(number).how == "other_config"}
    assert "accepted another model" in ends


def test_odd_and_hostile_adapters_and_words(tmp_path: Path) -> None:
    base = fuzz_adapters.Base(tmp_path)
    ends: Counter[str] = Counter()
    faults = []
    for number in range(CASES):
        what, end = base.try_case(number)
        ends[end] += 1
        if end not in fuzz_adapters.ALLOWED:
            faults.append(f"case {number}, {what}: {end}")
    assert faults == []
    assert min(ends["taken"], ends["refused"]) > CASES / 5


def test_a_careless_reader_of_adapters_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: an alpha that is taken as it comes, and a sum that nobody looks at."""
    reader = importlib.import_module("weights_convert.read_lora")
    monkeypatch.setattr(reader, "alpha_of", lambda path, layer, entry: float(entry.load().sum()))
    monkeypatch.setattr("minidiff.adapters.lora.fits", lambda *a: None)
    monkeypatch.setattr("minidiff.adapters.lora.require_finite", lambda tensor, what: None)
    base = fuzz_adapters.Base(tmp_path)
    ends = {base.try_case(number)[1] for number in range(CASES)}
    assert "FAULT weights are not finite" in ends
    assert "FAULT taken, and it can't be used" in ends


@pytest.mark.parametrize("slip", ["another factor", "nothing added"])
def test_a_careless_live_adapter_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slip: str) -> None:
    """The harness itself: what is fused is right, and what is added while a layer works is not."""
    if slip == "another factor":
        live = lora.Update.live
        monkeypatch.setattr(lora.Update, "live", lambda self, layer, strength: live(self, layer, 2 * strength))
    else:
        monkeypatch.setattr(lora, "forward_hook", lambda layer, hook, hooks: None)
    base = fuzz_adapters.Base(tmp_path)
    ends = {base.try_case(number)[1].partition(" of ")[0] for number in range(CASES)}
    assert "FAULT another output" in ends
