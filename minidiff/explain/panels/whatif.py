"""Panel: what if. Mistakes that real projects made, their pictures, and the first stage at which each shows."""

from __future__ import annotations

from minidiff.explain.collect import Seen
from minidiff.explain.mistakes import STEPS, Result, compare
from minidiff.explain.panel import Left, Panel, answer, line
from minidiff.explain.pictures import img
from minidiff.models.attention import SpatialTransformer
from minidiff.page.html import Html, table, tag
from minidiff.page.languages import Text, say, words
from minidiff.parity.difference import difference
from minidiff.parity.stages import watched
from minidiff.pipeline.guidance import guide
from minidiff.samplers.levels import Sigmas
from minidiff.schedule import to_x0

UNSEEN = 1.0  # levels of 255, root mean square, that no eye sees

WORDS = words(__package__, "whatif.json")


def build(seen: Seen) -> Panel | Left:
    """Return the panel, or why there is none."""
    why = _missing(seen)
    if why is not None:
        return Left(anchor="whatif", title=WORDS["title"], why=WORDS[why])
    right, found = compare(seen)
    figures = [tag("figure", img(right, WORDS["right"], side=192), tag("figcaption", say(WORDS["right"])))]
    for one in found:
        name = WORDS[f"name {one.name}"]
        figures.append(tag("figure", img(one.pixels, name, side=192), tag("figcaption", say(name))))
    transformers = any(isinstance(m, SpatialTransformer) for m in seen.pipe.unet.modules())
    lessons = [_lesson(one, WORDS["one eps" if transformers else "other eps"]) for one in found]
    names = [say(WORDS[name]) for name in ("mistake", "stage", "before", "there", "apart")]
    body = tag(
        "div",
        say(WORDS["intro"], "p", steps=min(STEPS, seen.request.steps)),
        tag("div", *figures, cls="strip mistakes"),
        table(names, [_cells(one) for one in found], cls="named"),
        say(WORDS["finder"], "p"),
        *lessons,
    )
    return Panel(
        anchor="whatif",
        title=WORDS["title"],
        body=body,
        code=(
            line(difference),
            line(watched, "def watched"),
            line(guide, "return"),
            line(Sigmas.scale_input, "return x /"),
            line(to_x0),
        ),
        data=[[one.name, one.stage, one.before, one.apart] for one in found],
    )


def _missing(seen: Seen) -> str | None:
    if seen.pipe.config.unet.guidance_dim is not None:
        return "distilled"
    return "style" if getattr(seen.request, "prompt_style", None) is not None else None


def _cells(one: Result) -> tuple[Html | str | int, ...]:
    there: Html | str = "–"
    if one.there is not None:
        there = f"{one.there.max_abs:.3g}" if one.there.same_shape else say(WORDS["shape"])
    return say(WORDS[f"name {one.name}"]), one.stage or "–", one.before, there, f"{one.apart:.2g}"


def _lesson(one: Result, changed: Text) -> Html:
    """Return what a mistake teaches. ``changed``: what was done to eps."""
    name, why = WORDS[f"name {one.name}"], WORDS[f"why {one.name}"]
    said = say(why, "p", None, stage=one.stage or "–", apart=f"{one.apart:.2g}", changed=changed)
    unseen = say(WORDS["harmless"], "p") if one.apart < UNSEEN else None
    return answer(f"whatif-{one.name}", name, said, unseen)
