"""A short run of scripts/fuzz_checkpoints.py: some hundred damaged files, each refused or read as it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import fuzz

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
    monkeypatch.setattr("minidiff.checkpoint.check_header", lambda path: None)
    ends = {base.try_case(number)[1] for number in range(0, 7 * 400, 7) if base.damaged(number).how == "other_config"}
    assert "accepted another model" in ends
