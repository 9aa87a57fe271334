"""Goldens under hostile bytes: a short run of tests/support/fuzz_goldens.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import fuzz_goldens

CASES = 120


@pytest.fixture
def base(tmp_path: Path) -> fuzz_goldens.Base:
    return fuzz_goldens.Base(tmp_path)


@pytest.mark.slow
def test_damaged_goldens(base: fuzz_goldens.Base) -> None:
    ends: Counter[str] = Counter()
    faults = []
    for number in range(CASES):
        how, end = base.try_case(number)
        ends[end] += 1
        if end not in fuzz_goldens.ALLOWED:
            faults.append(f"case {number}, {how}: {end}")
    assert faults == []
    assert all(ends[end] > CASES / 20 for end in fuzz_goldens.ALLOWED), ends


def test_wrong_verdicts_and_tracebacks_are_seen(base: fuzz_goldens.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: of a comparison that is always content, or never, and of one that raises."""
    ends = {}
    for status in (0, 1):
        monkeypatch.setattr(fuzz_goldens, "main", lambda argv, status=status: status)
        ends[status] = {base.try_case(number)[1] for number in range(60) if number % 8 != 7}
    assert "FAULT a wrong verdict: equal" in ends[0]
    assert "FAULT a wrong verdict: differs" in ends[1]

    def careless(*args: Any, **options: Any) -> Any:
        raise KeyError("what nobody thought of")

    monkeypatch.undo()
    monkeypatch.setattr("minidiff.parity.header._entry", careless)
    assert any(base.try_case(number)[1].startswith("FAULT status") for number in range(10))
