"""Panel: samplers side by side. The same noise, four samplers, and their distance to a reference.

The reference is a solver of second order at Karras' levels (Karras et al. 2022, equation 5), which end closer to the
picture than timesteps at equal distances. For the bundled model its 30 steps are four times as close to the limit of
many steps as 200 steps at equal distances are, and the first 20 of its calls cost little, beside those of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from minidiff.errors import MinidiffError
from minidiff.explain import together
from minidiff.explain.collect import Seen
from minidiff.explain.panel import Left, Panel, line
from minidiff.explain.panels.step import packed
from minidiff.explain.pictures import img
from minidiff.explain.second_look import own_pipe
from minidiff.page.html import Child, Html, tag
from minidiff.page.languages import Text, say, words
from minidiff.page.svg import Chart, Series
from minidiff.samplers import SAMPLERS

NAMES = ("ddim", "euler", "dpmpp_2m", "ddpm")  # another sampler of the run takes the place of the second
BUDGETS = (5, 10, 20)
REFERENCE, STEPS = {"name": "unipc", "sigma_spacing": "karras"}, 30

WORDS = words(__package__, "samplers.json")

Run = tuple[str, int]
"""Name of a sampler, and its number of steps."""


def build(seen: Seen) -> Panel | Left:
    """Return the panel."""
    if seen.request.image is not None:
        return Left(anchor="samplers", title=WORDS["title"], why=WORDS["from a picture"])
    if seen.frames[0].out.shape != seen.frames[0].before.shape:  # the model predicts a variance as well
        return Left(anchor="samplers", title=WORDS["title"], why=WORDS["cannot"])
    own = str((seen.recipe.get("sampler") or {}).get("name"))
    rises = own.endswith("_inverse")  # an inversion goes from a picture to noise
    names = NAMES if own in NAMES or own not in SAMPLERS or rises else (NAMES[0], own, *NAMES[2:])
    steps = min(STEPS, len(seen.pipe.schedule))
    try:
        choices = {(name, n): name for name in names for n in BUDGETS}
        found = results(seen, {("", steps): REFERENCE, **choices})
    except MinidiffError:  # a model without timesteps to choose from, or one that these samplers can't run
        return Left(anchor="samplers", title=WORDS["title"], why=WORDS["cannot"])
    goal, _ = found.pop(("", steps))
    runs: list[dict[str, Any]] = [
        {"sampler": name, "steps": n, "calls": calls, "distance": distance(x, goal), "x": packed(x[0])}
        for (name, n), (x, calls) in found.items()
    ]
    curves = [
        Series(Text(name, name), [(r["calls"], r["distance"]) for r in runs if r["sampler"] == name], k + 1)
        for k, name in enumerate(names)
    ]
    spread = float(goal.float().std())
    body = tag(
        "div",
        say(WORDS["intro"], "p", n=steps, reference=REFERENCE["name"], spread=f"{spread:.4g}"),
        Chart(WORDS["chart"], WORDS["calls"], WORDS["distance"], curves, log=True).svg(),
        _pictures(seen, names, found, goal, steps),
        say(WORDS["first order"], "p", None, **_compared(runs)),
        say(WORDS["noise"], "p"),
        say(WORDS["ends"], "p"),
    )
    code = (
        line(SAMPLERS["ddim"].step, "x0_coef"),
        line(SAMPLERS["dpmpp_2m"].step),
        line(SAMPLERS["ddpm"].step, "mean ="),
    )
    data = {"reference": {"sampler": REFERENCE, "steps": steps, "x": packed(goal[0])}, "runs": runs}
    return Panel(anchor="samplers", title=WORDS["title"], body=body, code=code, data=data)


def results(seen: Seen, choices: Mapping[Run, Any]) -> dict[Run, tuple[Tensor, int]]:
    """Return the result of each sampler and number of steps from the first noise of the run, (1, C, h, w), with its
    number of model calls, by the plain model. That of the run itself is not computed again if it was plain."""
    recipe, asked = seen.recipe.get("sampler") or {}, seen.request
    approximated = bool(seen.pipe.approximations)
    pipe = own_pipe(seen) if approximated else seen.pipe
    whole = len(seen.frames) == len(seen.plan) and asked.like is None and not approximated
    own = (recipe.get("name"), asked.steps) if whole else None
    others = {one: sampler for one, sampler in choices.items() if one != own}
    changes: dict[str, Any] = {"like": None, "num_images": 1, "progress": False, "generator": None}
    changes["seed"] = seen.recipe.get("seed")  # gives the first noise as well
    if asked.like is not None or asked.generator is not None:  # its first noise comes from another source
        changes["latents"] = seen.frames[0].before / float(seen.plan.init_noise_sigma)
    requests = [replace(asked, sampler=sampler, steps=n, **changes) for (_, n), sampler in others.items()]
    found = dict(zip(others, together.results(pipe, requests), strict=True))
    return {one: found[one] if one in found else (seen.frames[-1].after, len(seen.frames)) for one in choices}


def distance(x: Tensor, goal: Tensor) -> float:
    """Return the root mean square of the difference."""
    return float((x.float() - goal.float()).square().mean().sqrt())


def _compared(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the distances that the text names: of both ends of the first-order and of the second-order sampler."""
    by = {(r["sampler"], r["steps"]): f"{r['distance']:.3g}" for r in runs}
    few, many = BUDGETS[0], BUDGETS[-1]
    numbers = {"few": str(few), "many": str(many), "ddim_few": by["ddim", few], "ddim_many": by["ddim", many]}
    return numbers | {"second_few": by["dpmpp_2m", few], "second_many": by["dpmpp_2m", many]}


def _pictures(
    seen: Seen, names: tuple[str, ...], found: dict[Run, tuple[Tensor, int]], goal: Tensor, steps: int
) -> Html:
    rows: list[Child] = []
    pictures = dict(zip(found, seen.painter.each([x for x, _ in found.values()]), strict=True))
    for name in names:
        figures = []
        for n in BUDGETS:
            x, calls = found[name, n]
            alt = Text(*(text.format(name=name, n=calls) for text in WORDS["picture"]))
            caption = say(WORDS["made"], "span", None, n=calls, distance=f"{distance(x, goal):.3g}")
            figures.append(tag("figure", img(pictures[name, n], alt), tag("figcaption", caption)))
        rows.append(tag("div", tag("p", tag("code", name), cls="name"), tag("div", *figures, cls="strip"), cls="reel"))
    alt = Text(*(text.format(name=REFERENCE["name"], n=steps) for text in WORDS["picture"]))
    caption = say(WORDS["made"], "span", None, n=steps, distance=0)
    whole = tag("figure", img(seen.painter(goal), alt), tag("figcaption", caption))
    name = tag("p", tag("code", REFERENCE["name"]), ", ", say(WORDS["reference"], "span"), cls="name")
    return tag("div", *rows, tag("div", name, tag("div", whole, cls="strip"), cls="reel"), cls="film")
