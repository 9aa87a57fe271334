"""Panel: a quiz of eight questions, whose answers are computed from this run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from minidiff.explain.collect import Frame, Seen
from minidiff.explain.panel import Panel, line
from minidiff.explain.panels import words as attention
from minidiff.explain.second_look import looks
from minidiff.models.unet import UNet
from minidiff.page.html import Html, tag
from minidiff.page.languages import Text, say, words
from minidiff.pipeline.denoise import denoise
from minidiff.pipeline.guidance import guide

WORDS = words(__package__, "quiz.json")
MOST, CHOICES = 8, 3


@dataclass(frozen=True)
class Question:
    """``name``: of its texts. ``options``: three, of which number ``right`` is. ``values`` fill the texts."""

    name: str
    options: tuple[Text, ...]
    right: int
    values: dict[str, object]


def build(seen: Seen) -> Panel:
    """Return the panel."""
    asked = questions(seen)
    intro = say(WORDS["intro"], "p", n=len(asked))
    items = [tag("li", _item(k, question), cls="question", data_question=k) for k, question in enumerate(asked)]
    return Panel(
        anchor="quiz",
        title=WORDS["title"],
        body=tag("div", intro, tag("ol", *items, cls="quiz", data_quiz=True)),
        code=(line(denoise, "predict("), line(guide, "return"), line(UNet.forward, "temb =")),
        data=[[question.name, question.right] for question in asked],
    )


def questions(seen: Seen) -> list[Question]:
    """Return the first eight of the questions that this run can answer."""
    found: list[Question] = []
    for name, answer, others, values in _each(seen):
        wrong = list(dict.fromkeys(other for other in others if other != answer))[: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            right = (2 * len(found) + 1) % CHOICES
            options = (*wrong[:right], answer, *wrong[right:])
            found.append(Question(name, options, right, {**values, "answer": answer}))
    return found[:MOST]


Raw = tuple[str, Text, list[Text], dict[str, object]]


def _each(seen: Seen) -> Iterator[Raw]:
    """Yield name, right answer, wrong ones and further values of every question that fits the run."""
    frames, plan, total = seen.frames, seen.plan, len(seen.pipe.schedule)
    calls, first, middle = len(frames), frames[0], frames[len(frames) // 2]
    yield "first", _n(first.t), [_n(total - 1), _n(total), _n(total // 2)], {"total": total}
    if getattr(seen.request, "prompt_style", None) is None:  # another syntax can join several prompts
        count = sum(1 if frame.unconditional is None else 2 for frame in frames)
        yield "calls", _n(count), [_n(calls), _n(2 * calls), _n(calls + 1), _n(4 * calls)], {"calls": calls}
    if seen.request.image is None:
        initial = float(plan.init_noise_sigma)
        yield "initial", _n(initial), [_n(1), _n(14.6146), _n(0.18215)], {}
    signal, noise = float(plan.signal[middle.i]), float(plan.noise[middle.i])
    share = 100 * noise**2 / (signal**2 + noise**2)
    far = 20.0 if share > 45 else 90.0
    yield "variance", _percent(share), [_percent(50), _percent(far), _percent(5)], {"t": f"{middle.t:g}"}
    yield from _text(seen)
    yield from _network(seen)
    yield from _picture(seen)
    drawn = sum(len(frame.noise) for frame in frames)
    yield "drawn", _n(drawn), [_n(0), _n(calls), _n(calls - 1), _n(1)], {"sampler": seen.sampler.__class__.__name__}


def _text(seen: Seen) -> Iterator[Raw]:
    middle = seen.frames[len(seen.frames) // 2]
    scale = _scale(middle)
    if scale is not None and not seen.request.guidance_rescale:
        yield "scale", _n(scale), [_n(1), _n(0.5), _n(scale**2)], {"t": f"{middle.t:g}"}
    if attention.missing(seen) is None:
        tokens, share = attention.tokens_of(seen), attention.shares(looks(seen)).mean(dim=0)
        sums = {k: sum(float(share[t.k]) for t in tokens if t.kind == k) for k in attention.KINDS}
        best = max(sums, key=lambda k: sums[k])
        names = {k: attention.WORDS[f"kind {k}"] for k in sums}
        yield "attended", names[best], [names[k] for k in sums if k != best], {"share": f"{100 * sums[best]:.0f}"}


def _scale(frame: Frame) -> float | None:
    """Return how far guidance went, in differences of both predictions; None if there is no difference."""
    if frame.unconditional is None or frame.conditional is None:
        return None
    apart = (frame.conditional - frame.unconditional).double()
    size = float(apart.square().sum())
    return float(((frame.out - frame.unconditional).double() * apart).sum()) / size if size else None


def _network(seen: Seen) -> Iterator[Raw]:
    unet = seen.pipe.unet
    sizes = {way: sum(p.numel() for p in unet.get_submodule(way).parameters()) for way in ("down", "mid", "up")}
    best = max(sizes, key=lambda way: sizes[way])
    share = f"{100 * sizes[best] / sum(p.numel() for p in unet.parameters()):.0f}"
    yield "weights", WORDS[best], [WORDS[way] for way in sizes if way != best], {"share": share}


def _picture(seen: Seen) -> Iterator[Raw]:
    result, pixels = seen.frames[-1].after, seen.pixels
    ratio = pixels.numel() / result[0].numel()
    if ratio > 1:
        yield "fewer", _n(ratio), [_n(pixels.shape[-1] / result.shape[-1]), _n(2 * ratio), _n(3)], {}
    x0 = [frame.x0 for frame in seen.frames if frame.x0 is not None]
    if len(x0) > 3:
        moves = torch.stack([(b - a).float().norm() for a, b in pairwise(x0)])
        third = min(2, 3 * int(moves.argmax()) // len(moves))
        thirds = [WORDS[f"third {k}"] for k in range(3)]
        yield "moves", thirds[third], [t for t in thirds if t is not thirds[third]], {"k": int(moves.argmax()) + 2}


def _n(value: float) -> Text:
    return Text(f"{value:.5g}", f"{value:.5g}")


def _percent(value: float) -> Text:
    return Text(f"{value:.0f} %", f"{value:.0f} %")


def _item(k: int, question: Question) -> Html:
    options = [tag("li", say(text), data_option=n) for n, text in enumerate(question.options)]
    why = say(WORDS[f"why {question.name}"], "p", None, **question.values)
    return tag(
        "div",
        say(WORDS[f"ask {question.name}"], "p", None, **question.values),
        tag("ul", *options, cls="options"),
        tag("details", tag("summary", say(WORDS["answer"])), why),
    )
