"""Answers beside the panel of a step: each in words, and in numbers of the run or of another sampler's plan for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from minidiff.errors import MinidiffError
from minidiff.explain.arithmetic import Sums, total
from minidiff.explain.collect import Frame, Seen
from minidiff.explain.panel import answer
from minidiff.page.html import Child, Html, flat, table, tag
from minidiff.page.languages import say, words
from minidiff.page.svg import Chart, Series
from minidiff.samplers import SAMPLERS
from minidiff.samplers.linear import row_at
from minidiff.samplers.method import Plan
from minidiff.schedule import v_from_x0

MOST = 100  # steps of the plans that are compared

WORDS = words(__package__, "step_answers.json")
SWAPPED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}),
    ("pndm", {}),
    ("ddpm", {}),
    ("euler", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"sigma_spacing": "karras"}),
)


def answers(seen: Seen, frame: Frame, step: Sums, pixel: tuple[int, int, int]) -> Html:
    """Return the questions that the panel answers."""
    found = [
        _one("scale", _scale(seen)),
        _one("part", _part(seen)),
        _one("again", _again(seen)),
        _one("forms", _forms(seen, frame, step)),
        _one("posterior", _posterior(seen)),
        _one("zero", _zero(seen)),
        _one("why noise", _why_noise(seen)),
        _one("which", _which(seen, step, pixel)),
        _one("clamp", _clamp(seen)),
        _one("swap", _swap(seen)),
    ]
    return flat(found)


ANCHORS = {
    "scale": "q-scale-model-input",
    "part": "q-only-a-part",
    "again": "q-noise-again",
    "forms": "q-two-forms",
    "posterior": "q-posterior-or-beta",
    "zero": "q-sigma-zero",
    "why noise": "q-why-the-noise",
    "which": "q-epsilon-x0-v",
    "clamp": "q-clamp-x0",
    "swap": "q-swap-sampler",
}


def _one(name: str, shown: Iterator[Child]) -> Html:
    return answer(ANCHORS[name], WORDS[f"{name}?"], say(WORDS[name], "p"), list(shown))


def _here(name: str, **values: object) -> Html:
    return say(WORDS[f"{name} here"], "p", None, **{key: _shown(value) for key, value in values.items()})


def _shown(value: object) -> object:
    """Return a number in four digits; infinity, the sigma of pure noise, as its sign."""
    return value if not isinstance(value, float) else f"{value:.4g}" if math.isfinite(value) else "∞"


def plan_of(seen: Seen, name: str, **options: Any) -> Plan[Any] | None:
    """Return another sampler's plan for this model and number of steps; None if it can't run them."""
    try:
        return SAMPLERS[name](**options).plan(seen.pipe.schedule, min(seen.request.steps, MOST))
    except MinidiffError:
        return None


def _scale(seen: Seen) -> Iterator[Child]:
    ones = torch.ones(1, 1, 1, 1)
    own = [float(seen.sampler.scale_input(seen.plan, frame.i, ones)) for frame in seen.frames]
    yield _here("scale", first=own[0], last=own[-1])
    plan = plan_of(seen, "euler")
    if plan is not None:
        euler = [float(SAMPLERS["euler"]().scale_input(plan, i, ones)) for i in (0, len(plan) - 1)]
        yield _here("scale euler", first=euler[0], last=euler[1], sigma=float(plan.levels.here[0]))


def _part(seen: Seen) -> Iterator[Child]:
    result = seen.frames[-1].after.float()
    known = [(k, frame.x0.float()) for k, frame in enumerate(seen.frames) if frame.x0 is not None]
    if not known:
        return
    points = [(k + 1.0, float((x0 - result).square().mean().sqrt())) for k, x0 in known]
    middle = points[len(points) // 2]
    yield _here("part", first=points[0][1], k=int(middle[0]), middle=middle[1], spread=float(result.std()))
    yield Chart(WORDS["part chart"], WORDS["step"], WORDS["distance"], [Series(WORDS["part chart"], points)]).svg()


def _again(seen: Seen) -> Iterator[Child]:
    drew = sum(bool(frame.noise) for frame in seen.frames)
    yield _here("again", drew=drew, n=len(seen.frames))
    plan = plan_of(seen, "ddpm")
    if plan is not None and len(plan) > 1:
        stds = _ddpm_stds(plan)
        yield _here("again ddpm", n=len(plan), first=stds[0], before=stds[-2], last=stds[-1])


def _ddpm_stds(plan: Plan[Any]) -> list[float]:
    rows = (plan.at(i) for i in range(len(plan)))
    return [float(row.std) if row.noisy else 0.0 for row in rows]


def _forms(seen: Seen, frame: Frame, step: Sums) -> Iterator[Child]:
    """Take one DDPM step from the recorded sample in both ways."""
    sampler = SAMPLERS["ddpm"]()
    plan = plan_of(seen, "ddpm")
    values = step.values
    if plan is None or "epsilon" not in values or len(plan) < 2:
        return
    plan = sampler.plan_at(plan.levels, "epsilon")  # the model's output as noise, whatever it predicts
    i = len(plan) // 2
    at = plan.at(i)
    ab, to = (float(v[i]) for v in (plan.levels.here, plan.levels.to))
    alpha, rest = ab / to, (1 - ab) ** 0.5
    direct = {"x": alpha**-0.5, "epsilon": -(1 - alpha) / rest * alpha**-0.5}
    x, epsilon = frame.shown[0, : len(values["epsilon"])].float().cpu(), values["epsilon"]
    x0 = (x - rest * epsilon) / ab**0.5
    through = float(at.x0_coef) * x0 + float(at.x_coef) * x
    apart = float((through - total(direct, {"x": x, "epsilon": epsilon})).abs().max())
    probed = row_at(sampler, plan, i, sampler.start()).x
    yield _here(
        "forms",
        t=f"{float(plan.timesteps[i]):g}",
        c0=float(at.x0_coef),
        cx=float(at.x_coef),
        dx=direct["x"],
        de=direct["epsilon"],
        px=probed.get("x", 0.0),
        pe=probed.get("out", 0.0),
        apart=f"{apart:.1e}",
    )


def _posterior(seen: Seen) -> Iterator[Child]:
    small, large = plan_of(seen, "ddpm"), plan_of(seen, "ddpm", variance="fixed_large")
    if small is None or large is None or len(small) < 2:
        return
    curves = [[(float(i + 1), y) for i, y in enumerate(_ddpm_stds(plan))] for plan in (small, large)]
    i = len(small) // 2
    yield _here("posterior", n=len(small), k=i + 1, small=curves[0][i][1], large=curves[1][i][1])
    yield _here("posterior end", k=len(small) - 1, small=curves[0][-2][1], large=curves[1][-2][1])
    series = [Series(WORDS["posterior curve"], curves[0], 1), Series(WORDS["beta curve"], curves[1], 2)]
    yield Chart(WORDS["posterior chart"], WORDS["step"], WORDS["std"], series).svg()


def _zero(seen: Seen) -> Iterator[Child]:
    plain, full = (plan_of(seen, "ddim", eta=eta, steps_offset=0, set_alpha_to_one=True) for eta in (0.0, 1.0))
    ddpm = plan_of(seen, "ddpm")
    if plain is None or full is None or ddpm is None:
        return
    i = len(full) // 2
    yield _here(
        "zero", k=i + 1, zero=float(plain.at(i).std), full=float(full.at(i).std), ddpm=float(ddpm.at(i).std), eta="1"
    )


def _why_noise(seen: Seen) -> Iterator[Child]:
    sigmas = [
        float(noise / signal) if signal else float("inf")
        for signal, noise in ((seen.plan.signal[f.i], seen.plan.noise[f.i]) for f in seen.frames)
    ]
    yield _here("why noise", first=sigmas[0], last=sigmas[-1])


def _which(seen: Seen, step: Sums, pixel: tuple[int, int, int]) -> Iterator[Child]:
    values = step.values
    if "epsilon" not in values:
        return
    c, y, x = pixel
    share = (step.signal**2 + step.noise**2) ** 0.5  # 1 if x has unit variance
    signal, noise = (torch.tensor(v / share) for v in (step.signal, step.noise))
    x0, epsilon = values["x0"], values["epsilon"]
    v = v_from_x0(x0, epsilon, signal, noise)
    numbers = {"x0": x0, "epsilon": epsilon, "v": v}
    said = {name: float(value[c, y, x]) for name, value in numbers.items()}
    yield _here("which", kind=WORDS[f"is {seen.plan.prediction}"], out=float(values["out"][c, y, x]), **said)


def _clamp(seen: Seen) -> Iterator[Child]:
    result = seen.frames[-1].after.float()
    share = float((result.abs() > 1).float().mean())
    limits = [getattr(seen.sampler, name, None) for name in ("clip", "threshold")]
    on = any(limit is not None for limit in limits)
    yield _here("clamp", share=f"{100 * share:.0f}", largest=float(result.abs().max()), on=WORDS["on" if on else "off"])


def _swap(seen: Seen) -> Iterator[Child]:
    lines: list[list[Child]] = [_swapped(say(WORDS["this run"]), seen.plan)]
    for name, options in SWAPPED:
        plan = plan_of(seen, name, **options)
        if plan is not None:
            lines.append(_swapped(tag("code", " ".join([name, *map(str, options.values())])), plan))
    heads = [say(WORDS[key]) for key in ("sampler", "calls", "first t", "last t", "largest sigma")]
    yield table([*heads, tag("code", "init_noise_sigma")], lines)


def _swapped(name: Html, plan: Plan[Any]) -> list[Child]:
    t = plan.timesteps
    sigma = float(plan.noise[0] / plan.signal[0])
    return [
        name,
        len(plan),
        f"{float(t[0]):g}",
        f"{float(t[-1]):g}",
        f"{sigma:.4g}",
        f"{float(plan.init_noise_sigma):.4g}",
    ]
