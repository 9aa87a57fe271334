"""The page of `minidiff explain` in a real browser: both languages and schemes, every control, and without a script.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import minidiff
from minidiff.explain import collect, explained, mistakes
from minidiff.explain.page import PANELS
from minidiff.explain.panels import samplers
from minidiff.pipeline.request import Request
from tests.support.chromium import Page, browser, executable

PROMPT = "a red circle left of a blue star on a white background"
CHROMIUM = executable()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

# All that a reader sees of a section: what is painted, what is said, and what is marked.
SEEN = """(section) => JSON.stringify([
  [...section.querySelectorAll("canvas")].map((c) => c.toDataURL()),
  [...section.querySelectorAll("output, [aria-pressed], [aria-current], .right, .wrong, details")].map(
    (e) => [e.textContent, e.className, e.open, e.getAttribute("aria-pressed"), e.getAttribute("aria-current")]),
  [...section.querySelectorAll("img")].map((i) => i.src.length), section.innerText.length, section.innerText])"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seen = collect(minidiff.bundled(), Request(PROMPT, steps=3, seed=0), bundled=True)
    out = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:  # the panels that make many runs make them short
        patch.setattr(samplers, "STEPS", 3)
        patch.setattr(samplers, "BUDGETS", (1, 2))
        patch.setattr(mistakes, "STEPS", 2)
        out.write_text(explained(seen, panels=PANELS), "utf-8")
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(str(CHROMIUM), tmp_path_factory.mktemp("profile")) as page:
        yield page


def sized(page: Page, width: int) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_panel_is_there_without_a_network(page: Page, path: Path, language: str, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    sized(page, 1280)
    page.open(path)
    page.run(f"document.querySelector('[data-speak={language}]').click()")
    titles = page.run(
        "[...document.querySelectorAll('section.panel')]"
        ".map((s) => [s.id, s.innerText.trim().split('\\n')[0], s.offsetHeight])"
    )
    assert [name for name, _, _ in titles] == list(PANELS)
    for name, title, height in titles:
        assert height > 100, name
        assert any("\u4e00" <= c <= "\u9fff" for c in title) == (language == "zh"), (name, title)
    red, *_ = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red > 128) == (scheme == "light")
    page.run("document.querySelector('[data-scheme-switch]').click()")
    red, *_ = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red > 128) != (scheme == "light")
    assert page.run("[...document.images].filter((i) => !i.complete || !i.naturalWidth).length") == 0
    assert page.troubles() == []


def test_every_control_does_something(page: Page, path: Path) -> None:
    sized(page, 1280)
    page.open(path)
    idle = page.run(
        f"""(async () => {{
          const seen = {SEEN};
          const soon = () => new Promise((done) => setTimeout(done, 30));
          const idle = [];
          await Promise.all([...document.images].map((i) => i.decode().catch(() => null)));
          await soon();
          for (const section of document.querySelectorAll("section.panel")) {{
            const note = (control, states) => {{
              if (states.length > 1 && new Set(states).size < 2)
                idle.push(section.id + ": " + (control.getAttribute("aria-label") || control.outerHTML.slice(0, 80)));
            }};
            for (const control of section.querySelectorAll("input[type=range], input[type=number], select")) {{
              const values = control.options ? [...control.options].map((o) => o.value) : [control.min, control.max];
              const states = [];
              for (const value of new Set(values)) {{
                control.value = value;
                control.dispatchEvent(new Event("input", {{ bubbles: true }}));
                control.dispatchEvent(new Event("change", {{ bubbles: true }}));
                await soon();
                states.push(seen(section));
              }}
              note(control, states);
            }}
            for (const control of section.querySelectorAll("input[type=checkbox], [type=radio], button, summary")) {{
              const states = [seen(section)];
              control.click();
              await soon();
              states.push(seen(section));
              if (!control.matches("button, input[type=radio]")) note(control, states);
            }}
            for (const canvas of section.querySelectorAll("canvas")) {{
              const box = canvas.getBoundingClientRect();
              const at = {{ clientX: box.left + box.width / 3, clientY: box.top + box.height / 3, bubbles: true }};
              for (const kind of ["pointerdown", "pointermove", "pointerup", "click"])
                canvas.dispatchEvent(new (kind === "click" ? MouseEvent : PointerEvent)(kind, at));
            }}
          }}
          return idle;
        }})()"""
    )
    assert idle == []
    assert page.troubles() == []


def test_sliders_answer_to_the_keyboard(page: Page, path: Path) -> None:
    page.open(path)
    assert page.run("document.querySelectorAll('input[type=range]').length") > 0
    page.run("document.querySelector('[data-film] input[type=range]').focus()")
    before = page.run("document.activeElement.value")
    page.press("ArrowLeft")
    assert page.run("document.activeElement.value") != before
    names = page.run(
        "[...document.querySelectorAll('input, select, canvas, button')].filter((e) => !e.hidden && "
        "!(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length))"
        ".map((e) => e.outerHTML.slice(0, 90))"
    )
    assert names == [], "controls without a name for a screen reader"
    assert page.troubles() == []


WORDS = """(() => {
  const found = [];
  for (const e of document.querySelectorAll("[aria-label], [aria-valuetext], img[alt], option, svg title"))
    for (const text of [e.getAttribute("aria-label"), e.getAttribute("aria-valuetext"), e.getAttribute("alt"),
                        e.matches("option, title") ? e.textContent : null])
      if (text && !e.closest("[lang]:not(html)")) found.push(text);
  return found;
})()"""


def test_menus_and_spoken_names_are_in_one_language(page: Page, path: Path) -> None:
    sized(page, 1280)
    page.open(path)
    pages = {}
    for language in ("en", "zh", "en"):
        page.run(f"document.querySelector('[data-speak={language}]').click()")
        assert page.run("document.querySelector('[data-speak][aria-pressed=true]').dataset.speak") == language
        pages[language] = page.run(WORDS)
    chinese = re.compile("[\u4e00-\u9fff]")
    assert [text for text in pages["en"] if chinese.search(text) and "中文" not in text] == []
    both = [en for en, zh in zip(pages["en"], pages["zh"], strict=True) if en != zh]
    assert len(both) > 100
    assert [text for text in pages["zh"] if text in both] == [], "said in English alone"
    assert page.run("[...document.querySelectorAll('option')].filter((o) => !o.textContent.trim()).length") == 0


def test_a_telephone_shows_it_without_scrolling_sideways(page: Page, path: Path) -> None:
    sized(page, 390)
    page.open(path)
    for language in ("en", "zh"):
        page.run(f"document.querySelector('[data-speak={language}]').click()")
        wide = page.run(
            "[...document.querySelectorAll('section.panel')].filter((s) => s.scrollWidth > 390).map((s) => s.id)"
        )
        assert wide == []
        assert page.run("document.documentElement.scrollWidth") <= 390


def test_without_a_script_all_pictures_and_numbers_are_there(page: Page, path: Path) -> None:
    sized(page, 1280)
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(path)
        assert page.run("document.documentElement.classList.contains('scripted')") is False
        assert page.run("[...document.images].filter((i) => !i.complete || !i.naturalWidth).length") == 0
        empty = page.run(
            "[...document.querySelectorAll('section.panel')].filter((s) => s.innerText.length < 200).map((s) => s.id)"
        )
        assert empty == []
        hidden = page.run(
            "[...document.querySelectorAll('table, svg, .strip')].filter((e) => !e.closest('.needs-script') && "
            "!e.closest('[lang=zh]') && !e.getBoundingClientRect().height).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert hidden == []
        dead = page.run(
            "[...document.querySelectorAll('input, select, canvas')].filter((e) => e.getBoundingClientRect().height)"
            ".map((e) => e.outerHTML.slice(0, 80))"
        )
        assert dead == [], "controls that do nothing without a script"
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.troubles() == []
