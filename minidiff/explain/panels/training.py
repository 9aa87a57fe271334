"""Panel: training. One picture at several timesteps, the loss by timestep, and what each line of the loop does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import minidiff
from minidiff.errors import MinidiffError
from minidiff.explain import lesson
from minidiff.explain.collect import Seen
from minidiff.explain.lesson import Answers
from minidiff.explain.panel import Left, Line, Panel, answer, line
from minidiff.explain.pictures import Painter, false_colours, img
from minidiff.page.html import Html, table, tag
from minidiff.page.languages import Text, say, words
from minidiff.page.svg import Chart, Series
from minidiff.schedule import v_from_x0
from minidiff.training.loop import Report, Trainer
from minidiff.training.objective import target, weighted_mse
from minidiff.training.task import Denoising

WORDS = words(__package__, "training.json")
TARGETS = ("epsilon", "sample", "v_prediction")
CODE: tuple[tuple[str, Any, str], ...] = (
    ("t", Denoising.forward, "draw_timesteps"),
    ("clean", Denoising.forward, "self.clean"),
    ("drop", Denoising.context, "drop_prompts("),
    ("noise", Denoising.forward, "draw_noise"),
    ("mix", Denoising.forward, "add_noise"),
    ("ask", Denoising.forward, "self.pipe.unet("),
    ("loss", Denoising.forward, "weighted_mse"),
    ("backward", Trainer.step, "backward()"),
    ("clip", Trainer.step, "clip_grad_norm_"),
    ("rate", Trainer.step, '["lr"]'),
    ("step", Trainer.step, "self.scaler.step"),
    ("zero", Trainer.step, "optimizer.zero_grad()"),
    ("ema", Trainer.step, "self.ema.update"),
)
"""The lines of the training loop that are explained: name of the text, function, and what the line holds."""


def build(seen: Seen) -> Panel | Left:
    """Return the panel, made with a copy of the bundled model."""
    try:
        pipe = minidiff.bundled()
    except MinidiffError:
        return Left(anchor="training", title=WORDS["title"], why=WORDS["none bundled"])
    length = len(pipe.schedule)
    one, captions = lesson.answered(pipe, 0, 1, lesson.spread_times(length, lesson.LEVELS))
    many, _ = lesson.answered(pipe, 1, lesson.EXAMPLES, lesson.spread_times(length, lesson.TIMES))
    painter = Painter(pipe, one.x0)
    reels = _reels(painter, one, pipe.schedule.prediction)
    reports = lesson.trained(pipe)  # last: it changes the weights
    body = tag(
        "div",
        say(WORDS["whose" if seen.bundled else "whose else"], "p"),
        say(WORDS["picture"], "p", caption=captions[0]),
        say(WORDS["targets"], "p"),
        tag("div", *reels, cls="film", data_film=True),
        _levels(one),
        answer("q-loss-does-not-fall", WORDS["fall?"], say(WORDS["fall"], "p"), *_fall(many, reports)),
        answer("q-training-loop", WORDS["loop?"], say(WORDS["loop"], "p"), *_loop(reports)),
    )
    code = (line(Denoising.forward, "add_noise"), line(target), line(weighted_mse), line(Trainer.step, "for part"))
    return Panel(
        anchor="training", title=WORDS["title"], body=body, code=code, data=data(one, many, reports), uses=("film",)
    )


def data(one: Answers, many: Answers, reports: list[Report]) -> dict[str, Any]:
    """Return the losses of the picture, those by timestep, and the optimiser steps."""
    return {
        "picture": {"t": one.t.tolist(), **{name: losses.tolist() for name, losses in one.losses.items()}},
        "signal": one.signal.flatten().tolist(),
        "noise": one.noise.flatten().tolist(),
        "prediction": one.prediction,
        "by t": {"t": by_time(many, many.t.float()), **{k: by_time(many, v) for k, v in many.losses.items()}},
        "nothing": by_time(many, many.nothing),
        "steps": [{**vars(report), "clipped": lesson.clipped(report)} for report in reports],
        "clip": lesson.CONFIG.clip,
    }


def by_time(many: Answers, values: Tensor) -> list[float]:
    """Return the mean over the examples of ``values`` (B,), at each timestep."""
    return values.reshape(-1, lesson.TIMES).mean(dim=0).tolist()


def _reels(painter: Painter, one: Answers, prediction: str) -> list[Html]:
    """Return rows of pictures, one a timestep: what the model sees, the three targets, its answer, and what follows."""

    def colours(values: Tensor) -> list[Tensor]:
        return [false_colours(x[None]) for x in values]

    v = v_from_x0(one.x0, one.epsilon, one.signal, one.noise)
    clean = painter(one.x0[:1])
    targets = {"epsilon": colours(one.epsilon), "sample": [clean] * len(one.t), "v_prediction": colours(v)}
    rows = [(WORDS["row x"], painter.each(torch.split(one.x, 1)))]
    for kind in TARGETS:
        asked = zip(WORDS["row wanted"], WORDS[f"is {kind}"], strict=True)
        wanted = Text(*(text.format(kind=each) for text, each in asked))
        rows.append((wanted if kind == prediction else WORDS[f"other {kind}"], targets[kind]))
    rows.append((WORDS["row out"], colours(one.out)))
    rows.append((WORDS["row x0"], painter.each(torch.split(one.found["x0"], 1))))
    losses, reels = one.losses["loss"].tolist(), []
    for title, pictures in rows:
        figures = []
        for k, picture in enumerate(pictures):
            said = {"t": int(one.t[k]), "loss": f"{losses[k]:.4f}"}
            alt = Text(*(f"{a}: {b.format(**said)}" for a, b in zip(title, WORDS["at"], strict=True)))
            figures.append(tag("figure", img(picture, alt), tag("figcaption", say(WORDS["at"], "span", None, **said))))
        reels.append(tag("div", say(title, "p", {"cls": "name"}), tag("div", *figures, cls="strip"), cls="reel"))
    return reels


def _levels(one: Answers) -> Html:
    columns = {"signal": one.signal.flatten(), "noise": one.noise.flatten(), **one.losses}
    heads = [say(WORDS[head]) for head in ("t", "signal", "noise", "loss", "as x0", "as epsilon", "as v")]
    lines = zip(one.t.tolist(), *(column.tolist() for column in columns.values()), strict=True)
    return table(heads, ([t, *(f"{value:.4g}" for value in values)] for t, *values in lines))


def _fall(many: Answers, reports: list[Report]) -> list[Html]:
    times = by_time(many, many.t.float())
    colours = (("loss", 1), ("x0", 2), ("epsilon", 3), ("v", 5))
    curves = [
        Series(WORDS[f"curve {name}"], list(zip(times, by_time(many, many.losses[name]), strict=True)), colour)
        for name, colour in colours
        if name != "v" or many.prediction != "v_prediction"
    ]
    curves.append(Series(WORDS["curve nothing"], list(zip(times, by_time(many, many.nothing), strict=True)), 4))
    each = many.losses["loss"]
    wobble = float(each.std())
    losses = [report.loss for report in reports]
    numbers = {"mean": f"{float(each.mean()):.4f}", "nothing": f"{float(many.nothing.mean()):.3f}"}
    numbers |= {"low": f"{float(each.min()):.4f}", "high": f"{float(each.max()):.4f}", "n": str(len(each))}
    numbers |= {"std": f"{wobble:.4f}", "batch": str(lesson.CONFIG.batch)}
    numbers |= {"least": f"{min(losses):.4f}", "most": f"{max(losses):.4f}", "k": str(len(losses))}
    chart = Chart(WORDS["chart loss"], WORDS["t"], WORDS["error"], curves, log=True)
    return [say(WORDS["fall here"], "p", None, **numbers), chart.svg(), say(WORDS["fall says"], "p")]


def _loop(reports: list[Report]) -> list[Html]:
    """Return the lines of the loop, with the numbers of one step, and curves of all."""
    one = max(reports, key=lambda report: report.norm)  # so that the clipping shows
    numbers = {"loss": f"{one.loss:.4f}", "norm": f"{one.norm:.4f}", "after": f"{lesson.clipped(one):.4f}"}
    numbers |= {"clip": f"{lesson.CONFIG.clip:g}", "rate": f"{one.rate:.2e}", "step": str(one.step)}
    numbers |= {"drop": f"{100 * lesson.CONFIG.drop_prompt:g}", "ema": f"{lesson.CONFIG.ema:g}"}
    numbers |= {"batch": str(lesson.CONFIG.batch)}
    lines = []
    for name, function, holding in CODE:
        known: Line = line(function, holding)
        lines.append(tag("dt", tag("code", known.text)))
        place = tag("code", f"{known.file}:{known.number}", cls="place")
        lines.append(tag("dd", say(WORDS[f"line {name}"], "span", None, **numbers), " ", place))
    charts = [
        _steps("chart steps", [("loss", [report.loss for report in reports])]),
        _steps("chart norm", [("norm", [r.norm for r in reports]), ("after", [lesson.clipped(r) for r in reports])]),
        _steps("chart rate", [("rate", [report.rate for report in reports])]),
    ]
    return [
        tag("dl", *lines, cls="lines"),
        say(WORDS["steps"], "p", None, **numbers),
        tag("div", *charts, cls="charts"),
    ]


def _steps(title: str, curves: list[tuple[str, list[float]]]) -> Html:
    series = [
        Series(WORDS[f"curve {name}"], [(k + 1.0, value) for k, value in enumerate(values)], colour + 1)
        for colour, (name, values) in enumerate(curves)
    ]
    return Chart(WORDS[title], WORDS["step"], WORDS["value"], series, width=420).svg()
