"""Panel: the film of a run. The sample, the estimate of the picture and the noise that the model sees, at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minidiff.explain.collect import Frame, Seen
from minidiff.explain.panel import Panel, answer, line
from minidiff.explain.pictures import false_colours, img
from minidiff.page.html import Html, tag
from minidiff.page.languages import Text, say, words
from minidiff.page.svg import Chart, Series
from minidiff.pipeline.denoise import denoise
from minidiff.samplers.method import Method, Plan
from minidiff.schedule import to_x0

MOST = 25  # steps of a long run that are shown

ROWS = ("x", "x0", "epsilon")
WORDS = words(__package__, "film.json")


def build(seen: Seen) -> Panel:
    """Return the panel."""
    frames = thinned(seen.frames, MOST)
    columns = [_column(seen, *one) for one in zip(frames, _pictures(seen, frames), strict=True)]
    rows = [_row(name, [column[name] for column in columns]) for name in ROWS]
    planned, measured = leftover(seen)
    words = [say(WORDS["intro"], "p", {"cls": "needs-script"})]
    if len(frames) < len(seen.frames):
        words.append(say(WORDS["thinned"], "p", n=len(seen.frames), k=len(frames)))
    if not seen.painter.exact:
        words.append(say(WORDS["fitted"], "p"))
    middle = seen.frames[len(seen.frames) // 2]
    signal, noise = (f"{float(v[middle.i]):.4f}" for v in (seen.plan.signal, seen.plan.noise))
    body = tag(
        "div",
        *words,
        tag("div", *rows, cls="film", data_film=True),
        answer(
            "q-noisy-previews", WORDS["noisy?"], say(WORDS["noisy"], "p", t=f"{middle.t:g}", signal=signal, noise=noise)
        ),
        answer("q-x0-in-the-middle", WORDS["middle?"], say(WORDS["middle"], "p")),
        Chart(
            WORDS["left"],
            WORDS["call"],
            WORDS["share"],
            [Series(WORDS["planned"], planned, 1), Series(WORDS["measured"], measured, 2, "points")],
        ).svg(),
        say(WORDS["leftover"], "p"),
    )
    return Panel(
        anchor="film",
        title=WORDS["title"],
        body=body,
        code=(line(to_x0, "x"), line(Method.denoised), line(denoise, "sampler.step")),
        data={"steps": [frame.i for frame in frames], "planned": planned, "measured": measured},
    )


def thinned(frames: tuple[Frame, ...], most: int) -> list[Frame]:
    """Return at most ``most`` of the frames, at equal distances, the last one among them."""
    n = min(most, len(frames))
    return [frames[(k + 1) * len(frames) // n - 1] for k in range(n)]


def leftover(seen: Seen) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the share of noise in what the model sees at every call: planned, and measured against the result."""
    result = seen.frames[-1].after.float()
    planned, measured = [], []
    for k, frame in enumerate(seen.frames, start=1):
        signal, noise = float(seen.plan.signal[frame.i]), float(seen.plan.noise[frame.i])
        planned.append((k, noise / (signal**2 + noise**2) ** 0.5))
        apart = frame.shown[:, : result.shape[1]].float() - signal * result
        measured.append((k, float(apart.square().mean().sqrt())))
    return planned, measured


def _pictures(seen: Seen, frames: list[Frame]) -> list[dict[str, Tensor]]:
    """Return the pictures of each row, by step."""
    x = seen.painter.each([frame.shown[:, : frame.after.shape[1]] for frame in frames])
    x0 = seen.painter.each([frame.after if frame.x0 is None else frame.x0 for frame in frames])
    epsilon = [false_colours(_epsilon(seen.plan, frame)) for frame in frames]
    return [dict(zip(ROWS, each, strict=True)) for each in zip(x, x0, epsilon, strict=True)]


def _column(seen: Seen, frame: Frame, pictures: dict[str, Tensor]) -> dict[str, Html]:
    number = seen.frames.index(frame) + 1
    said: dict[str, object] = {"k": number, "n": len(seen.frames), "t": f"{frame.t:g}"}
    found = {}
    for name, picture in pictures.items():
        alt = Text(
            *(f"{row}: {step}".format(**said) for row, step in zip(WORDS[f"row {name}"], WORDS["step"], strict=True))
        )
        caption = tag("figcaption", say(WORDS["step"], "span", None, **said))
        found[name] = tag("figure", img(picture, alt), caption)
    return found


@torch.no_grad()
def _epsilon(plan: Plan[Any], frame: Frame) -> Tensor:
    """Return the noise that the model sees in its input, from the picture that it sees there."""
    x, x0 = frame.shown[:, : frame.after.shape[1]].float(), frame.x0
    if x0 is None:
        return x
    signal, noise = float(plan.signal[frame.i]), float(plan.noise[frame.i])
    return (x - signal * x0.float()) / noise if noise else torch.zeros_like(x)


def _row(name: str, figures: list[Html]) -> Html:
    return tag("div", say(WORDS[f"row {name}"], "p", {"cls": "name"}), tag("div", *figures, cls="strip"), cls="reel")
