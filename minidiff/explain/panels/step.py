"""Panel: a step in numbers. The next sample as a sum, in one latent pixel that the reader picks, in three spellings."""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

from torch import Tensor

from minidiff.explain.arithmetic import Sums, sums, total
from minidiff.explain.collect import Frame, Seen
from minidiff.explain.panel import Panel, line
from minidiff.explain.panels.film import thinned
from minidiff.explain.panels.step_answers import answers
from minidiff.page.html import Html, table, tag
from minidiff.page.languages import say, words
from minidiff.page.svg import Chart, Series
from minidiff.pipeline.denoise import denoise
from minidiff.samplers.linear import row_at
from minidiff.samplers.method import Method, Plan

MOST = 50  # steps of a long run whose numbers are in the page
SIDE = 16  # places of a row or a column of the latents that can be picked

NEAR = 1e-5  # weights that differ less are equal but for rounding

WORDS = words(__package__, "step.json")
BLOCKS = ("direct", "through", "split")


def build(seen: Seen) -> Panel:
    """Return the panel."""
    frames = thinned(seen.frames, MOST)
    steps = [sums(seen, frame) for frame in frames]
    grid = Grid(frames[0].after)
    k = len(frames) // 2
    said = [say(WORDS["intro"], "p")]
    if len(frames) < len(seen.frames):
        said.append(say(WORDS["thinned"], "p", n=len(seen.frames), k=len(frames)))
    if grid.thinned:
        said.append(
            say(WORDS["coarse"], "p", h=grid.shape[1], w=grid.shape[2], rows=len(grid.rows), n=len(grid.columns))
        )
    odd = {step.why for step in steps if step.why is not None}
    said += [say(WORDS[f"why {why}"], "p") for why in sorted(odd)]
    if any(step.kept for step in steps):
        said.append(say(WORDS["kept"], "p"))
    body = tag(
        "div",
        *said,
        tag("div", _first(seen, grid), _worked(seen, frames[k], steps[k], grid), data_step=True, cls="worked"),
        say(WORDS["not one"], "p") if all(step.direct is None for step in steps) else _weights(seen, frames, steps),
        answers(seen, frames[k], steps[k], grid.pixel),
    )
    code = [
        line(Method.scale_input, "return x"),
        line(Plan.x0),
        line(denoise, "sampler.step"),
        _own(seen),
        line(row_at),
    ]
    return Panel(anchor="step", title=WORDS["title"], body=body, code=tuple(code), data=data(seen, frames, steps, grid))


class Grid:
    """Places of a sample (1, C, h, w) that can be picked, all of them unless it is large."""

    def __init__(self, x: Tensor) -> None:
        self.shape = tuple(x.shape[1:])
        self.rows, self.columns = (_spread(n) for n in self.shape[1:])
        self.thinned = (len(self.rows), len(self.columns)) != self.shape[1:]
        self.pixel = (0, self.rows[len(self.rows) // 2], self.columns[len(self.columns) // 2])

    def of(self, x: Tensor) -> Tensor:
        """Return (C, h, w) at these places."""
        return x[: self.shape[0], self.rows][:, :, self.columns]


def _spread(n: int) -> list[int]:
    k = min(n, SIDE)
    return [(2 * j + 1) * n // (2 * k) for j in range(k)]


def data(seen: Seen, frames: list[Frame], steps: list[Sums], grid: Grid) -> dict[str, Any]:
    """Return every step's weights and the values at the places of the grid, float32 as base64."""
    found = []
    for frame, step in zip(frames, steps, strict=True):
        weights = {name: getattr(step, name) for name in ("x0", *BLOCKS)}
        found.append(
            {"number": seen.frames.index(frame) + 1, "i": frame.i, "t": frame.t, "scale": step.scale}
            | {"signal": step.signal, "noise": step.noise}
            | {name: None if sum_ is None else dict(sum_) for name, sum_ in weights.items()}
            | {"given": {name: packed(grid.of(value)) for name, value in step.given.items()}}
            | {"next": packed(grid.of(frame.after[0])), "kept": step.kept}
        )
    shape = [grid.shape[0], len(grid.rows), len(grid.columns)]
    place = [grid.pixel[0], grid.rows.index(grid.pixel[1]), grid.columns.index(grid.pixel[2])]
    first = float(seen.plan.init_noise_sigma) if _from_noise(seen) else None
    return {"shape": shape, "rows": grid.rows, "columns": grid.columns, "place": place, "first": first, "steps": found}


def packed(x: Tensor) -> str:
    """Return a tensor as base64 of little-endian float32."""
    return base64.b64encode(x.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode("ascii")


def _from_noise(seen: Seen) -> bool:
    return seen.request.image is None


def _own(seen: Seen) -> Any:
    kind = type(seen.sampler)
    return line(getattr(kind, "step", kind), "return" if hasattr(kind, "step") else "")


def _first(seen: Seen, grid: Grid) -> Html:
    factor = float(seen.plan.init_noise_sigma)
    c, y, x = grid.pixel
    if not _from_noise(seen):
        return say(WORDS["from picture"], "p")
    begun = float(seen.frames[0].before[0, c, y, x])
    values = {"noise": begun / factor, "factor": factor, "x": begun}
    return say(WORDS["first"], "p", None, **{name: _cell(f"first-{name}", value) for name, value in values.items()})


def _worked(seen: Seen, frame: Frame, step: Sums, grid: Grid) -> Html:
    """Return the sums of one step in one pixel. A script writes other numbers into the same cells."""
    c, y, x = grid.pixel
    at = {name: float(value[c, y, x]) for name, value in step.values.items() if c < len(value)}
    place: dict[str, float | str] = {
        "k": seen.frames.index(frame) + 1,
        "n": len(seen.frames),
        "t": f"{frame.t:g}",
        "c": c,
        "y": y,
        "x": x,
    }
    where = say(WORDS["where"], "p", {"cls": "where"}, **{name: _cell(name, v) for name, v in place.items()})
    shown = {"x": at["x"], "scale": step.scale, "shown": at["x"] * step.scale, "out": at["out"]}
    told = WORDS["asked" if seen.guided else "asked plain"]
    asked = say(told, "p", None, **{name: _cell(f"asked-{name}", v) for name, v in shown.items()})
    blocks = [_block(block, step, at) for block in BLOCKS if getattr(step, block) is not None]
    after = say(WORDS["recorded"], "p", x=_cell("recorded", float(frame.after[0, c, y, x])))
    return tag("div", where, asked, tag("div", *blocks, cls="sums"), after)


def _block(name: str, step: Sums, at: dict[str, float]) -> Html:
    lines: list[list[Html | str]] = []
    whole = 0.0
    for value, weight in getattr(step, name).items():
        whole += weight * at.get(value, 0.0)
        numbers = (at.get(value, 0.0), weight, weight * at.get(value, 0.0))
        lines.append([tag("code", value), *(_number(number) for number in numbers)])
    lines.append([say(WORDS["sum"]), "", "", _number(whole)])
    heads = [say(WORDS[head]) for head in ("value", "number", "weight", "product")]
    return tag("div", say(WORDS[f"by {name}"], "p"), table(heads, lines), data_block=name)


def _cell(name: str, value: float | str) -> Html:
    return tag("output", value if isinstance(value, str) else _number(value), data_cell=name, cls="mono")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _weights(seen: Seen, frames: list[Frame], steps: list[Sums]) -> Html:
    """Return the weights of every step, as a table and as curves."""
    names = list(dict.fromkeys(name for step in steps for name in step.direct or ()))
    heads = [say(WORDS["step"]), "t", tag("code", "scale_model_input"), *(tag("code", name) for name in names)]
    heads += [tag("code", "x0"), tag("code", "epsilon"), say(WORDS["gap"])]
    lines: list[list[str | int]] = []
    for frame, step in zip(frames, steps, strict=True):
        direct = [_weight(step.direct, name) for name in names]
        split = [_weight(step.split, name) for name in ("x0", "epsilon")]
        start: list[str | int] = [seen.frames.index(frame) + 1, f"{frame.t:g}", _number(step.scale)]
        lines.append([*start, *direct, *split, f"{gap(step):.1e}" if step.through else "–"])
    parts = [("x0", 1), ("epsilon", 2), ("noise", 3)]
    curves = [Series(WORDS[f"curve {name}"], _curve(seen, frames, steps, name), colour) for name, colour in parts]
    shown = [curve for curve in curves if curve.points]
    chart = Chart(WORDS["chart"], WORDS["step"], WORDS["weight"], shown).svg()
    says = [say(WORDS[f"chart {_course(curves)}"], "p")] if shown else []
    says += [say(WORDS["remembered"], "p")] if {*names} - {"x", "out", "noise"} else []
    return tag("div", chart, *says, say(WORDS["table"], "p"), table(heads, lines))


def _course(curves: list[Series]) -> str:
    """Return how the weights of x0 and epsilon go: "says" if the one grows while the other falls, "keeps" if the one
    stays, otherwise "goes"."""
    picture, noise = ([y for _, y in curve.points] for curve in curves[:2])

    def never_falls(values: list[float]) -> bool:
        return all(b >= a - NEAR for a, b in pairwise(values))

    if not picture or not never_falls(picture) or not never_falls([-y for y in noise]):
        return "goes"
    return "says" if picture[-1] > picture[0] + NEAR else "keeps"


def _curve(seen: Seen, frames: list[Frame], steps: list[Sums], name: str) -> list[tuple[float, float]]:
    pairs = ((seen.frames.index(frame) + 1, step.split) for frame, step in zip(frames, steps, strict=True))
    points = [(float(k), sum_.get(name, 0.0)) for k, sum_ in pairs if sum_ is not None]
    return points if any(y for _, y in points) else []


def _weight(sum_: Any, name: str) -> str:
    return "–" if sum_ is None or name not in sum_ else _number(sum_[name])


def gap(step: Sums) -> float:
    """Return the largest difference of the step through x0 to the direct one, both computed in float32."""
    if step.through is None or step.direct is None:
        return 0.0
    values = step.values
    return float((total(step.through, values) - total(step.direct, values)).abs().max())
