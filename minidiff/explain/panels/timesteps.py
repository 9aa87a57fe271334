"""Panel: timesteps. The noise levels of training, those that the run visited, and those that others would have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minidiff.explain.collect import Seen
from minidiff.explain.panel import Left, Panel, line
from minidiff.explain.panels import timesteps_answers as answers
from minidiff.explain.panels.guidance import packed
from minidiff.explain.visits import GRIDS, Habit, grids, habits, planned, steps_of, strengths
from minidiff.page.html import Child, Html, table, tag
from minidiff.page.languages import say, words
from minidiff.page.ruler import Marks, Ruler
from minidiff.page.svg import Chart, Series
from minidiff.samplers.ddim import DDIM
from minidiff.samplers.levels import Timesteps, alpha_bar_at
from minidiff.samplers.pndm import PNDM
from minidiff.schedule import NoiseSchedule, spaced

CURVE = 200  # points of a curve over all timesteps
TRIED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100)  # numbers of steps of the slider
WORDS = words(__package__, "timesteps.json")


def build(seen: Seen) -> Panel | Left:
    """Return the panel; none for samplers that define their own noise levels and use no schedule."""
    if getattr(seen.sampler, "own_levels", False):
        return Left(anchor="timesteps", title=WORDS["title"], why=WORDS["own levels"])
    schedule, total = seen.pipe.schedule.to("cpu"), len(seen.pipe.schedule)
    n, others = steps_of(seen), habits(seen)
    starts = strengths(seen)
    visited = [float(frame.t) for frame in seen.frames]
    skipped = [float(t) for i, t in enumerate(seen.plan.timesteps) if i not in seen.rows]
    said = {"total": total, "last": total - 1, "n": n, "calls": len(visited)}
    body = tag(
        "div",
        say(WORDS["intro"], "p", None, first=f"{visited[0]:g}", end=f"{visited[-1]:g}", **said),
        ruler(total, n, visited, skipped, others).svg(),
        *([say(WORDS["pale"], "p")] if skipped else []),
        tag("div", cls="tool needs-script", data_spacings=True),
        say(WORDS["grids"], "p", None, **said),
        _grids(total, n),
        *answers.first(seen),
        *answers.twice(seen),
        *_curves(seen, schedule),
        tag("div", cls="tool needs-script", data_levels=True),
        *answers.names(seen),
        *answers.after(seen),
        *answers.habits(seen, others),
        *answers.strength(seen, starts),
        *answers.elsewhere(seen),
    )
    return Panel(
        anchor="timesteps",
        title=WORDS["title"],
        body=body,
        code=(
            line(spaced, "np.arange(n)["),
            line(spaced, "train_steps, 0"),
            line(spaced, "np.linspace(0"),
            line(Timesteps.visited, "self.grid.spaced"),
            line(PNDM.levels, "grid[:2], grid[1:]"),
            line(DDIM.levels, "grid.landing"),
            line(alpha_bar_at, "clamp(min=0)"),
        ),
        data=_data(seen, schedule, others, starts),
    )


def ruler(total: int, n: int, visited: list[float], skipped: list[float], others: dict[str, Habit]) -> Ruler:
    """Return the rows of marks: this run, every way to space ``n`` steps, and every program that has the sampler."""
    rows = [Marks(WORDS["this run"], visited, 2, skipped)]
    found = grids(total, n)
    rows += [Marks(WORDS[name], found[name], 1) for name, _, _ in GRIDS]
    rows += [
        Marks(f"--like {name}", habit.timesteps, 3)
        for name, habit in others.items()
        if habit.timesteps and name != "minidiff"
    ]
    return Ruler(WORDS["ruler"], rows, 0, total - 1, id_="timesteps-ruler")


def _grids(total: int, n: int) -> Html:
    found = grids(total, n)
    lines: list[list[Child]] = []
    for name, _, _ in GRIDS:
        t = found[name]
        shown = [str(v) for v in t] if len(t) <= 6 else [*map(str, t[:3]), "…", *map(str, t[-2:])]
        lines.append([say(WORDS[name]), ", ".join(shown), say(WORDS[f"{name} is"])])
    return table([say(WORDS["spacing"]), say(WORDS["visits"]), say(WORDS["what it is"])], lines, cls="texts")


def _curves(seen: Seen, schedule: NoiseSchedule) -> list[Html]:
    """Curves over all timesteps, with the levels of the run on them."""
    alpha_bar = schedule.alphas_cumprod.double()
    t = sorted({round(k * (len(alpha_bar) - 1) / CURVE) for k in range(CURVE + 1)})
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5

    def curve(values: Tensor) -> list[tuple[float, float]]:
        return [(k, float(values[k])) for k in t]

    def dots(values: Tensor) -> list[tuple[float, float]]:
        return [(frame.t, float(values[frame.i])) for frame in seen.frames]

    levels = seen.plan.alpha_bars.double()
    run = ((1 - levels) / levels) ** 0.5
    shares = Chart(
        WORDS["shares"],
        WORDS["timestep"],
        WORDS["share"],
        [
            Series(WORDS["alpha_bar"], curve(alpha_bar), 1),
            Series(WORDS["signal"], curve(alpha_bar**0.5), 3),
            Series(WORDS["noise"], curve((1 - alpha_bar) ** 0.5), 2),
            Series(WORDS["run alpha_bar"], dots(levels), 1, "points"),
        ],
    )
    sizes = Chart(
        WORDS["sizes"],
        WORDS["timestep"],
        WORDS["size"],
        [
            Series(WORDS["sigma"], curve(sigma), 4),
            Series(WORDS["snr"], curve(1 / sigma**2), 5),
            Series(WORDS["run sigma"], dots(run), 4, "points"),
            Series(WORDS["run snr"], dots(1 / run**2), 5, "points"),
        ],
        log=True,
    )
    return [say(WORDS["curves"], "p"), shares.svg(), sizes.svg()]


def _data(seen: Seen, schedule: NoiseSchedule, others: dict[str, Habit], starts: Any) -> dict[str, Any]:
    total, n = len(schedule), steps_of(seen)
    found = {
        "total": total,
        "steps": n,
        "visited": [frame.t for frame in seen.frames],
        "alpha_bar": packed(schedule.alphas_cumprod),
        "spacings": [name for name, _, _ in GRIDS],
        "grids": {k: [*grids(total, k).values()] for k in sorted({*TRIED, n}) if k <= total},
        "programs": {
            name: {"timesteps": habit.timesteps, "sigmas": finite(habit.sigmas)} for name, habit in others.items()
        },
        "strengths": {name: [[entry.calls, entry.first] for entry in row] for name, row in starts.items()},
    }
    twice = planned(seen, "pndm")
    return found if twice is None else found | {"pndm": [float(t) for t in twice.timesteps]}


def finite(values: Sequence[float]) -> list[float | None]:
    """Return ``values`` as JSON has them: None for the infinite sigma of a schedule that ends in pure noise."""
    return [value if math.isfinite(value) else None for value in values]
