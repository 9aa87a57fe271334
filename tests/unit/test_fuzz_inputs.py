"""A short run of scripts/fuzz_inputs.py: some dozens of odd inputs of every kind, each taken or refused in one line."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from minidiff.pipeline import image_files
from tests.support import fuzz_inputs

CASES = 110


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> fuzz_inputs.Base:
    return fuzz_inputs.Base(tmp_path_factory.mktemp("fuzz"))


def test_odd_inputs(base: fuzz_inputs.Base) -> None:
    ends: Counter[tuple[str, str]] = Counter()
    faults = []
    for number in range(CASES):
        how, end = base.try_case(number)
        ends[base.kind(number), end] += 1
        if end not in fuzz_inputs.ALLOWED:
            faults.append(f"case {number}, {how}: {end}")
    assert faults == []
    kinds = {kind for kind, _ in ends}
    assert kinds >= {
        "picture",
        "recipe",
        "training",
        "config",
        "no file",
        "dialect",
        "grid",
        "lines",
        "control",
        "theirs",
    }
    for end in fuzz_inputs.ALLOWED:
        assert sum(n for (_, e), n in ends.items() if e == end) > CASES / 8, f"hardly any case is {end}"


def of_kind(base: fuzz_inputs.Base, kind: str, many: int) -> set[str]:
    """The ends of the first cases of a kind."""
    numbers = [number for number in range(many * len(base.kinds)) if base.kind(number) == kind]
    return {base.try_case(number)[1] for number in numbers}


def test_a_careless_reader_is_caught(base: fuzz_inputs.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: readers as they were are seen to start programs, and to lose colours."""
    known = image_files.formats()
    with monkeypatch.context() as m:
        m.setattr(image_files, "formats", lambda: [*known, "EPS"])
        m.setattr(fuzz_inputs, "drawn", lambda rng: ("postscript", fuzz_inputs.POSTSCRIPT, None))
        assert any("something was started" in end for end in of_kind(base, "picture", 10))
    with monkeypatch.context() as m:
        m.setattr(fuzz_inputs, "open_picture", flat)
        m.setattr(fuzz_inputs, "MODES", ("I;16",))
        for formats in ("LOSSLESS", "OTHERS"):
            m.setattr(fuzz_inputs, formats, ("PNG", "TIFF"))
        assert any("colours are" in end for end in of_kind(base, "picture", 60))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("theirs", "minidiff.pipeline.recipes.infotext.number"),
        ("theirs", "minidiff.pipeline.recipes.comfyui.whole"),
        ("grid", "minidiff.cli.grid.read_size"),
        ("lines", "minidiff.cli.many.lines.check_range"),
        ("control", "minidiff.cli.generate.check_there"),
        ("dialect", "minidiff.cli.tokens._table"),
    ],
)
def test_a_careless_reader_of_requests_is_caught(
    base: fuzz_inputs.Base, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    def careless(*args: Any, **options: Any) -> Any:
        raise KeyError("what nobody thought of")

    monkeypatch.setattr(name, careless)
    assert any(end.startswith("FAULT") for end in of_kind(base, kind, 20))


def flat(path: Any) -> Any:
    """Pillow's own conversion, which cuts deep pictures off at 255."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def test_lines_that_steer_a_terminal_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_inputs, "main", lambda argv: print("\x1b[2J") or 0)
    assert fuzz_inputs.command("info").startswith("FAULT prints")
    monkeypatch.setattr(fuzz_inputs, "main", lambda argv: 1)
    assert fuzz_inputs.command("info").startswith("FAULT status 1")
    assert fuzz_inputs.verdict(lambda: {}["a"]).startswith("FAULT KeyError")
