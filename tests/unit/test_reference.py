"""The reference that is made from docstrings (``scripts/make_reference.py``), and what pydoc shows."""

from __future__ import annotations

import pydoc
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import minidiff

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import make_reference  # noqa: E402

EMPTY = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Elements by their ids, links, and what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        self.open += [] if tag in EMPTY else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return make_reference.page()


def test_every_public_name_has_its_place(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert [link for link in reader.links if link.removeprefix("#") not in reader.ids] == []
    wanted = {f"minidiff.{name}" for name in minidiff.__all__ if name != "__version__"}
    wanted |= {"minidiff.StableDiffusion.generate", "minidiff.Run.cancel", "minidiff.fast.optimize"}
    assert sorted(wanted - set(reader.ids)) == []


def test_it_fetches_nothing_and_names_no_places(page: str) -> None:
    assert "<script" not in page
    assert " at 0x" not in page
    assert str(ROOT) not in page
    assert "guidance_scale" in page


def test_docstrings_become_paragraphs() -> None:
    made = make_reference.prose(
        "Return ``a < b``, as :meth:`~minidiff.Run.last` does.\n\n    code = 1\n\n* one\n* two\n  more"
    )
    assert made == (
        "<p>Return <code>a &lt; b</code>, as <code>minidiff.Run.last</code> does.</p><pre>code = 1</pre>"
        "<ul><li>one</li><li>two\n  more</li></ul>"
    )


def test_pydoc_reads_well() -> None:
    """Names first, with a text each, and nothing of what they are built from."""
    text = pydoc.plain(pydoc.render_doc(minidiff))
    assert "minidiff: Stable Diffusion from scratch" in text
    for name in ("load(path", "class StableDiffusion", "estimate(path", "class Request"):
        assert name in text
    assert " at 0x" not in text
