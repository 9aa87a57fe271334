"""The page of `minidiff explain`: what is recorded, what stands in it, and that nothing can break out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter

import pytest
import torch

import minidiff
from minidiff.cli import main
from minidiff.errors import ConfigError
from minidiff.explain import Seen, collect, explained, mistakes
from minidiff.explain.page import PANELS
from minidiff.explain.panels import samplers
from minidiff.page.html import resource
from minidiff.pipeline.request import Request

PAYLOAD = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{x}"
PROMPT = "a red circle left of a blue star on a white background"


class Elements(HTMLParser):
    """Elements of a page: the attributes of each, by name, and the text of the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._in: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id") or "" if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._in is not None:
            self.texts[self._in] = self.texts.get(self._in, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._in = None if tag == "script" else self._in


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """The panels that make many runs make them short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "STEPS", 3)
        patch.setattr(samplers, "BUDGETS", (1, 2))
        patch.setattr(mistakes, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def seen() -> Seen:
    return collect(minidiff.bundled(), Request(PROMPT, steps=4, seed=0), bundled=True)


@pytest.fixture(scope="module")
def html(seen: Seen) -> str:
    return explained(seen)


def test_what_is_recorded_leaves_the_picture_as_it_is(seen: Seen) -> None:
    plain = minidiff.bundled().generate(PROMPT, steps=4, seed=0, output="tensor")
    assert torch.equal(seen.pixels, plain[0])


def test_a_frame_holds_the_step_that_leads_to_the_next(seen: Seen) -> None:
    assert len(seen.frames) == 4
    for now, later in zip(seen.frames, seen.frames[1:], strict=False):
        assert torch.equal(now.after, later.before)
    for frame in seen.frames:
        assert frame.conditional is not None
        assert frame.unconditional is not None
        guided = frame.unconditional + 2.0 * (frame.conditional - frame.unconditional)
        assert torch.equal(guided, frame.out)
        x, _ = seen.sampler.step(seen.plan, frame.i, frame.before, frame.out, frame.state, torch.zeros_like)
        assert torch.equal(x, frame.after)


def test_the_page_asks_for_nothing_and_runs_one_script(html: str) -> None:
    elements = Elements(html)
    for name, attributes in elements.found:
        assert not {key for key in attributes if key.startswith("on")}, (name, attributes)
        for key in ("src", "href", "data", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/")), (name, value)
    kinds = [attributes.get("type") for name, attributes in elements.found if name == "script"]
    assert kinds.count(None) == 1
    assert set(kinds) <= {None, "application/json"}


def test_every_panel_is_there_with_its_code(html: str) -> None:
    ids = [attributes.get("id") for _, attributes in Elements(html).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {*PANELS} <= {*ids}
    for file, number, text in re.findall(r"<code>(minidiff/[\w/]+\.py):(\d+)</code> <code>([^<]*)</code>", html):
        with open(f"{minidiff.__path__[0]}/../{file}", encoding="utf-8") as code:
            line = code.read().splitlines()[int(number) - 1]
        assert (
            re.sub(r"&#x27;", "'", text)
            .replace("&quot;", '"')
            .replace("&gt;", ">")
            .replace("&lt;", "<")
            .replace("&amp;", "&")
            == line.strip()
        )


def test_texts_are_there_in_both_languages() -> None:
    tables = [("minidiff.explain", "page.json"), *(("minidiff.explain.panels", f"{name}.json") for name in PANELS)]
    for package, name in tables:
        for key, text in json.loads(resource(package, name)).items():
            assert set(text) == {"en", "zh"}, (name, key)
            fields = [{field for _, field, _, _ in Formatter().parse(text[code]) if field} for code in ("en", "zh")]
            assert fields[0] == fields[1], (name, key)
            assert not any("\u4e00" <= c <= "\u9fff" for c in text["en"]), (name, key)


def test_reasons_are_sentences() -> None:
    """A reason begins small after "Left out:", as a part of that sentence, and ends it."""
    reasons = {"guidance": ("no text", "distilled", "off", "no estimate"), "samplers": ("from a picture", "cannot")}
    reasons |= {"words": ("no text", "embeds", "style"), "whatif": ("distilled", "style"), "timesteps": ("own levels",)}
    reasons["training"] = ("none bundled",)
    for name, keys in reasons.items():
        texts = json.loads(resource("minidiff.explain.panels", f"{name}.json"))
        for key in keys:
            assert re.fullmatch(r"[a-z].*\.", texts[key]["en"]), (name, key)
            assert texts[key]["zh"].endswith("。"), (name, key)


def test_a_hostile_prompt_stays_text() -> None:
    seen = collect(minidiff.bundled(), Request(PAYLOAD, negative_prompt=PAYLOAD, steps=1, seed=0), bundled=True)
    page = explained(seen)
    assert "alert(1)" in page
    names = [name for name, _ in Elements(page).found]
    other = collect(seen.pipe, Request("x", negative_prompt="y", steps=1, seed=0), bundled=True)
    plain = [name for name, _ in Elements(explained(other)).found]
    assert names.count("script") == plain.count("script")
    assert not any("onerror" in attributes for _, attributes in Elements(page).found)


def test_a_hostile_file_stays_text() -> None:
    """A checkpoint's name and metadata reach the page by the recipe."""
    seen = collect(minidiff.bundled(), Request("x", steps=1, seed=0), bundled=True)
    plain = explained(seen, panels=["timesteps", "film"])
    names = ("model", "sampler", "negative_prompt", "guidance_scale", "approximate")
    hostile = replace(seen, recipe={**seen.recipe, **{key: {"name": PAYLOAD, PAYLOAD: PAYLOAD} for key in names}})
    page = explained(hostile, panels=["timesteps", "film"])
    assert page.count("alert(1)") > 3
    for name in ("script", "img"):
        assert page.count(f"<{name}") == plain.count(f"<{name}")
    assert not any("onerror" in attributes for _, attributes in Elements(page).found)


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """Neither the page, nor a part of it under another name."""

    def stopped(*args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("minidiff.explain.page.explained", stopped)
    assert main(["explain", PROMPT, "--steps", "1", "--out", str(tmp_path / "page.html"), "--quiet"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize("place", ["", "/dev/full"])
def test_a_page_goes_into_a_file(tmp_path, capsys, place: str) -> None:  # type: ignore[no-untyped-def]
    """A folder or a device is refused before the run; it is not taken for a file, beside which a second one goes."""
    out = place or str(tmp_path)
    if place and not Path(place).exists():
        pytest.skip("there is no such device here")
    before = sorted(Path(out).parent.iterdir())
    assert main(["explain", PROMPT, "--steps", "1", "--panels", "timesteps", "--out", out, "--quiet"]) == 2
    assert "name " in capsys.readouterr().err
    assert sorted(Path(out).parent.iterdir()) == before


def test_a_panel_that_there_is_not_is_refused(seen: Seen) -> None:
    with pytest.raises(ConfigError, match="panels 'films': there are"):
        explained(seen, panels=["film", "films"])


def test_without_a_prompt_the_hint_is_this_command(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["explain"]) == 2
    assert 'minidiff explain "' in capsys.readouterr().err


def test_the_command_writes_a_page(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "page.html"
    assert main(["explain", PROMPT, "--steps", "2", "--seed", "1", "--lang", "zh", "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert 'lang="zh"' in out.read_text("utf-8")[:100]
    assert main(["explain", PROMPT, "--panels", "nothing", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_narrow_logarithmic_axis_has_no_name_twice() -> None:
    from minidiff.page.languages import Text
    from minidiff.page.svg import Chart, Series

    name = Text("x", "x")
    svg = Chart(name, name, name, [Series(name, [(1, 0.02), (2, 0.5)])], log=True).svg()
    shown = re.findall(r'text-anchor="end">([^<]+)</text>', svg)
    assert len(shown) > 3
    assert [float(each) for each in shown[:5]] == pytest.approx([0.01, 10**-1.5, 0.1, 10**-0.5, 1], rel=0.03)


def test_every_question_has_a_line_in_the_readme(html: str) -> None:
    readme = (Path(minidiff.__path__[0]) / "explain" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .+ \| (\w+) \| `#(q-[\w-]+)` \|$", readme, re.M)
    listed = {(panel, anchor) for panel, anchor in rows if panel in PANELS}
    panel, there = "", set()
    for anchor, kind in re.findall(r'<section id="([\w-]+)" class="(panel|answer)', html):
        panel = anchor if kind == "panel" else panel
        there |= {(panel, anchor)} if anchor.startswith("q-") else set()
    assert there == listed
