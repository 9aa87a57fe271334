"""The page: panels one after another, and the data that its script and its readers' programs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.resources import files
from typing import Any

from minidiff.config import check, quote
from minidiff.console import one_line
from minidiff.explain.collect import Seen
from minidiff.explain.panel import Left, Panel
from minidiff.explain.pictures import img
from minidiff.page.html import Html, document, resource, tag
from minidiff.page.languages import Text, label, say, words
from minidiff.version import VERSION

Build = Callable[[Seen], Panel | Left]

# In the order of the page. The module of each has `build`.
PANELS = ("guidance", "timesteps", "film", "step", "scales", "words", "unet", "training", "samplers", "whatif", "quiz")
LARGE = ("training", "samplers", "whatif")  # those that make about ten runs: by themselves for the bundled model alone

WORDS = words("minidiff.explain", "page.json")
LISTED = (
    ("prompt", "prompt"),
    ("negative", "negative_prompt"),
    ("model", "model"),
    ("sampler", "sampler"),
    ("steps", "steps"),
    ("scale", "guidance_scale"),
    ("seed", "seed"),
    ("approximate", "approximate"),
)


def explained(seen: Seen, language: str = "en", panels: Iterable[str] | None = None) -> str:
    """Return the page of a run, HTML. ``language``: "en" or "zh", that which is shown first. ``panels``: their names;
    None: all that this run can show.

    Raises :class:`ConfigError` for a name that there is not.
    """
    late = () if panels is not None or seen.bundled else LARGE
    built = [_not_asked_for(name) if name in late else _build(name)(seen) for name in chosen(panels)]
    shown = [panel for panel in built if isinstance(panel, Panel)]
    data = {f"data-{panel.anchor}": panel.data for panel in shown if panel.data is not None}
    title = f"{seen.recipe.get('prompt') or label(WORDS['title'])} – minidiff explain"
    return document(
        one_line(str(title), 200),
        [_switches(), _head(seen), _contents(built), *map(_section, built), _foot()],
        language=language,
        styles=[resource("minidiff.explain", "explain.css"), *_files(shown, "css")],
        scripts=_files(shown, "js"),
        data=data,
    )


def chosen(panels: Iterable[str] | None) -> Sequence[str]:
    """Return the names of the panels of a page, in its order."""
    asked = set(PANELS) if panels is None else check_names(panels)
    return [name for name in PANELS if name in asked]


def check_names(panels: Iterable[str] | None) -> set[str]:
    """Return the names that were asked for. Raises :class:`ConfigError` for one that there is not."""
    asked = set(panels or ())
    unknown = sorted(asked - {*PANELS})
    check(not unknown, f"panels {', '.join(map(quote, unknown))}: there are {', '.join(PANELS)}")
    return asked


def _build(name: str) -> Build:
    build: Build = import_module(f"minidiff.explain.panels.{name}").build
    return build


def _not_asked_for(name: str) -> Left:
    title = words("minidiff.explain.panels", f"{name}.json")["title"]
    return Left(anchor=name, title=title, why=Text(*(text.format(name=name) for text in WORDS["many"])))


def _files(shown: Sequence[Panel], ending: str) -> list[str]:
    """Return what lies beside the panels: ``film.js`` moves what film.py has drawn. Most have no style of their own."""
    beside = files("minidiff.explain.panels")
    known = dict.fromkeys(name for panel in shown for name in (*panel.uses, panel.anchor))
    names = [f"{name}.{ending}" for name in known]
    return [beside.joinpath(name).read_text("utf-8") for name in names if beside.joinpath(name).is_file()]


def _switches() -> Html:
    names = {"en": "English", "zh": "中文"}
    return tag(
        "div",
        [tag("button", name, data_speak=code, type="button") for code, name in names.items()],
        tag("button", say(WORDS["scheme"]), data_scheme_switch=True, type="button"),
        cls="switches needs-script",
    )


def _head(seen: Seen) -> Html:
    facts: list[Any] = []
    for name, key in LISTED:
        value = seen.recipe.get(key)
        if value not in (None, {}, ""):
            facts += [tag("dt", say(WORDS[name])), tag("dd", one_line(_shown(value), 500))]
    made = [say(WORDS["made"], "p", version=VERSION, calls=len(seen.frames))]
    if seen.recipe.get("approximate"):
        made.append(say(WORDS["approximated"], "p"))
    picture = img(seen.pixels, WORDS["result"], cls="result")
    return tag("header", say(WORDS["title"], "h1"), tag("div", picture, tag("dl", facts), cls="facts"), made)


def _shown(value: Any) -> str:
    """Return a sampler's name, or the settings of a dict, or the value itself."""
    if not isinstance(value, dict):
        return str(value)
    return str(value.get("name") or ", ".join(f"{key}={setting}" for key, setting in value.items()))


def _contents(built: Sequence[Panel | Left]) -> Html:
    links = [tag("li", tag("a", say(panel.title), href=f"#{panel.anchor}")) for panel in built]
    return tag("nav", tag("ol", links), aria_label=label(WORDS["contents"]))


def _section(panel: Panel | Left) -> Html:
    title = say(panel.title, "h2")
    if isinstance(panel, Left):
        return tag("section", title, say(WORDS["left"], "p", why=panel.why), id=panel.anchor, cls="panel left")
    lines = [tag("li", tag("code", f"{one.file}:{one.number}"), " ", tag("code", one.text)) for one in panel.code]
    code = tag("div", say(WORDS["code"], "h3"), tag("ul", lines), cls="code")
    return tag("section", title, panel.body, code, id=panel.anchor, cls="panel")


def _foot() -> Html:
    return tag("footer", f"minidiff {VERSION}")
