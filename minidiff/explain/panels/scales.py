"""Panel: scales. Histograms of the first noise, of what the UNet sees and of the latents, and where the constants come
from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidiff.explain.collect import Seen
from minidiff.explain.panel import Panel, answer, line
from minidiff.explain.panels.step_answers import plan_of
from minidiff.page.html import Child, Html, table, tag
from minidiff.page.languages import Text, say, words
from minidiff.page.svg import Chart, Series
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.latents import FirstSample
from minidiff.samplers.method import Levels, Method
from minidiff.training.batch import Batch
from minidiff.training.data import ShapesStream
from minidiff.training.task import Denoising, latent_scale

BINS = 60
PICTURES = 32  # of the bundled model's data that are encoded to measure its scaling factor

WORDS = words(__package__, "scales.json")


def build(seen: Seen) -> Panel:
    """Return the panel."""
    noise, factor = _noise(seen)
    euler = plan_of(seen, "euler")
    ends = (0, len(seen.frames) // 2, len(seen.frames) - 1)
    looks = {f"look {k + 1}": seen.frames[k].shown.float() for k in dict.fromkeys(ends)}
    result = seen.frames[-1].after.float()
    data: dict[str, Any] = {"factor": factor, "spread": _spread(seen)}
    parts: list[Child] = [say(WORDS["intro"], "p")]

    begins: list[tuple[Text, Tensor]] = []
    if noise is not None:
        begins = [] if factor == 1 else [(WORDS["noise"], noise)]
        begins.append((_filled("times", factor=f"{factor:.6g}"), noise * factor))
        if euler is not None and abs(float(euler.init_noise_sigma) - factor) > 1e-3:
            first = float(euler.init_noise_sigma)
            begins.append((_filled("euler", factor=f"{first:.6g}"), noise * first))
        parts.append(_chart("begins", begins))
    first_answer = _why_first(seen, factor, None if euler is None else float(euler.init_noise_sigma))
    parts.append(answer("q-init-noise-sigma", WORDS["first?"], say(WORDS["first"], "p"), first_answer))

    seen_by = [(_filled("look", k=name.split()[1], n=len(seen.frames)), x) for name, x in looks.items()]
    parts += [_chart("sees", seen_by), _range(data["spread"]), _by_step(data["spread"])]

    scaled = [] if not isinstance(seen.pipe, StableDiffusion) else _latents(seen, result)
    if scaled:
        parts.append(_chart("latents", scaled))
    parts.append(answer("q-scaling-factor", WORDS["scaling?"], say(WORDS["scaling"], "p"), *_why_scaling(seen, data)))
    every = [*begins, *seen_by, *scaled] if scaled else [*begins, *seen_by, (WORDS["result"], result)]
    parts.append(_table(every))
    data["measured"] = [_measures(x) for _, x in every]
    code = [line(FirstSample.from_noise, "init_noise_sigma"), line(Method.scale_input, "return x"), line(Levels)]
    if isinstance(seen.pipe, StableDiffusion):
        code += [line(Denoising.clean, "scaling_factor"), line(latent_scale, "std()")]
    return Panel(anchor="scales", title=WORDS["title"], body=tag("div", *parts), code=tuple(code), data=data)


def _noise(seen: Seen) -> tuple[Tensor | None, float]:
    """Return the standard normal noise of the first sample and its factor; no noise for a run from a picture."""
    factor = float(seen.plan.init_noise_sigma)
    return (None if seen.request.image is not None else seen.frames[0].before.float() / factor), factor


def _filled(name: str, **values: object) -> Text:
    return Text(*(text.format(**values) for text in WORDS[name]))


def histogram(x: Tensor, reach: float) -> list[tuple[float, float]]:
    """Return the share of numbers in each of ``BINS`` equal parts of -reach..reach: (middle, share)."""
    counts = torch.histc(x.flatten().cpu(), BINS, -reach, reach)
    width = 2 * reach / BINS
    shares = (counts / x.numel()).tolist()
    return [(round(-reach + (k + 0.5) * width, 6), share) for k, share in enumerate(shares)]


def _chart(name: str, parts: list[tuple[Text, Tensor]]) -> Html:
    reach = max(float(x.abs().max()) for _, x in parts) or 1.0
    curves = [Series(title, histogram(x, reach), k + 1) for k, (title, x) in enumerate(parts)]
    return Chart(WORDS[f"chart {name}"], WORDS["number"], WORDS["share"], curves).svg()


def _spread(seen: Seen) -> list[dict[str, float]]:
    """Return, for each call, the standard deviation of x and of what the model sees."""
    return [
        {"t": frame.t, "x": float(frame.before.float().std()), "seen": float(frame.shown.float().std())}
        for frame in seen.frames
    ]


def _range(spread: list[dict[str, float]]) -> Html:
    low, high = (f"{choose(each['seen'] for each in spread):.4g}" for choose in (min, max))
    return say(WORDS["sees says"], "p", low=low, high=high)


def _by_step(spread: list[dict[str, float]]) -> Html:
    curves = [
        Series(WORDS[f"std {name}"], [(k + 1.0, each[name]) for k, each in enumerate(spread)], colour)
        for name, colour in (("x", 1), ("seen", 2))
    ]
    large = max(each["x"] for each in spread) > 4
    return Chart(WORDS["chart std"], WORDS["step"], WORDS["std"], curves, log=large).svg()


def _why_first(seen: Seen, factor: float, euler: float | None) -> list[Html]:
    last = float(seen.pipe.schedule.alphas_cumprod[-1])
    noise, signal = (1 - last) ** 0.5, last**0.5
    sigma = f"{noise / signal:.6g}" if signal else "∞"
    numbers = {"t": len(seen.pipe.schedule) - 1, "alpha_bar": f"{last:.6g}", "sigma": sigma}
    said = [say(WORDS["first here"], "p", None, **numbers, noise=f"{noise:.5g}", factor=f"{factor:.6g}")]
    if euler is not None:
        said.append(say(WORDS["first euler"], "p", euler=f"{euler:.6g}"))
    return said


def _latents(seen: Seen, result: Tensor) -> list[tuple[Text, Tensor]]:
    factor = _factor(seen)
    return [(WORDS["result"], result), (_filled("decoded", factor=f"{factor:.6g}"), result / factor)]


def _factor(seen: Seen) -> float:
    vae = seen.pipe.config.vae
    return 1.0 if vae is None else float(vae.scaling_factor)


def _why_scaling(seen: Seen, data: dict[str, Any]) -> list[Html]:
    if not isinstance(seen.pipe, StableDiffusion):
        return [say(WORDS["pixels"], "p")]
    factor = data["scaling"] = _factor(seen)
    result = float(seen.frames[-1].after.float().std())
    numbers = {"factor": f"{factor:.6g}", "own": f"{1 / factor:.4g}", "result": f"{result:.4g}"}
    said = [say(WORDS["scaling here"], "p", None, **numbers, before=f"{result / factor:.4g}")]
    if not seen.bundled:
        return [*said, say(WORDS["one picture"], "p")]
    batch = Batch(*ShapesStream(0).batch(0, PICTURES))
    measured = data["measured scaling"] = latent_scale(seen.pipe, batch)
    found = {"n": PICTURES, "std": f"{1 / measured:.4g}", "scale": f"{measured:.4g}", "factor": f"{factor:.4g}"}
    return [*said, say(WORDS["scaling measured"], "p", None, **found)]


def _measures(x: Tensor) -> dict[str, float]:
    return {"mean": float(x.mean()), "std": float(x.std()), "low": float(x.min()), "high": float(x.max())}


def _table(parts: list[tuple[Text, Tensor]]) -> Html:
    heads = [say(WORDS[head]) for head in ("what", "mean", "std", "low", "high")]
    lines = [[say(title), *(f"{value:.4g}" for value in _measures(x).values())] for title, x in parts]
    return table(heads, lines, cls="named")
