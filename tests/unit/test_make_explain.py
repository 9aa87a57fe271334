"""The course page of the bundled model, made whole by its script: all panels, 20 steps, its size and its list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minidiff.explain.page import PANELS
from tests.support.scripts import script

MOST = 5_000_000  # bytes


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("course") / "explain.html"
    assert script("make_explain").page(out, 20) == 0
    assert out.stat().st_size <= MOST
    return out.read_text("utf-8")


def test_every_panel_is_made(page: str) -> None:
    found = re.findall(r'<section id="(\w+)" class="(panel[^"]*)"', page)
    assert found == [(name, "panel") for name in PANELS], "none is left out"


def test_the_readme_lists_its_questions(page: str) -> None:
    made = script("make_explain")
    rows = [f"| {words} | {panel} | `#{anchor}` |" for anchor, panel, words in made.questions(page)]
    assert len(rows) > 30
    table = made.README.read_text("utf-8").split(made.BEGIN)[1].split(made.END)[0]
    assert table.splitlines() == rows, "python scripts/make_explain.py --list writes it anew"


def test_the_front_page_shows_a_small_picture_of_it() -> None:
    made = script("make_explain")
    assert made.PICTURE.stat().st_size < 100_000
    for name in ("README.md", "README.zh.md"):
        text = (Path(made.ROOT) / name).read_text("utf-8")
        assert f"]({made.PICTURE.relative_to(made.ROOT).as_posix()})](minidiff/explain/README.md)" in text
