"""Plans of several samplers and programs in one picture: sigma by model call, and the timesteps that each visits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from minidiff.config import check
from minidiff.page.drawing import drawing
from minidiff.page.ruler import Marks, Ruler
from minidiff.page.svg import Chart, Series

MOST = 6  # plans in one picture: the colours that the eye tells apart


def plot(plans: Mapping[str, Any], total: int, without: Collection[str] = ()) -> str:
    """Return the levels of plans, by what they are called, as an SVG file. ``total``: number of training's timesteps;
    ``without``: plans whose timesteps are not among those.

    Raises :class:`ConfigError` for more than six plans.
    """
    check(len(plans) <= MOST, f"a plot shows {MOST} plans at most, got {len(plans)}: {', '.join(plans)}")
    curves, rows = [], []
    for colour, (name, plan) in enumerate(plans.items(), 1):
        points = list(enumerate(map(float, plan.columns()["sigma"])))
        said = f"{name}: {len(plan)} model calls, x starts as noise * {float(plan.init_noise_sigma):.6g}"
        curves += [Series(said, points, colour), Series(name, points, colour, "points")]
        if name not in without:
            rows.append(Marks(name, [float(t) for t in plan.timesteps], colour))
    pictures: list[Chart | Ruler] = [
        Chart("sigma at each model call", "model call", "sigma", curves, log=True, width=760, height=300)
    ]
    if rows:
        last = max(total - 1, 1, *(t for row in rows for t in row.places))  # diffusers has a timestep 1000
        pictures.append(Ruler("timesteps visited", rows, 0, last))
    return drawing("sigma at each model call, and the timesteps visited", pictures)
