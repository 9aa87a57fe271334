"""Panel: the UNet. Its diagram from the config, the cost of its parts, where time and text enter, and its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minidiff.explain.collect import Seen
from minidiff.explain.panel import Panel, answer, line
from minidiff.explain.pictures import img
from minidiff.explain.second_look import Look, looks
from minidiff.models.attention import SpatialTransformer
from minidiff.models.blocks import ResBlock, sinusoid
from minidiff.models.unet import DownLevel, UNet, UpLevel, WayDown
from minidiff.page.html import Html, flat, table, tag
from minidiff.page.languages import Text, label, say, words
from minidiff.page.svg import Chart, Series
from minidiff.pipeline.png import to_unit

WORDS = words(__package__, "unet.json")
WIDE, BOX, HIGH, STEP = 760, 250, 62, 92  # of the diagram, in pixels: all of it, a box, and from box to box
COLOURS = 6


@dataclass(frozen=True)
class Part:
    """One part of the UNet: its name in minidiff, what it holds, parameters and floating-point operations of a call.

    ``size``: (C, h, w) at which it works.
    """

    name: str
    res: int
    transformers: int
    attentions: int
    size: tuple[int, ...]
    parameters: int
    operations: int


def build(seen: Seen) -> Panel:
    """Return the panel."""
    found = looks(seen)
    unet, config = seen.pipe.unet, seen.pipe.config.unet
    parts = parts_of(seen, found[0])
    total, work = sum(p.numel() for p in unet.parameters()), sum(part.operations for part in parts)
    blocks = sum(part.res for part in parts)
    intro = say(
        WORDS["intro"], "p", levels=len(config.levels), m=f"{total / 1e6:.4g}", g=f"{work / 1e9:.3g}", res=blocks
    )
    body = tag(
        "div",
        intro,
        _diagram(parts, len(config.levels)),
        _table(parts, total, work),
        _time(seen, found),
        _features(found),
    )
    return Panel(
        anchor="unet",
        title=WORDS["title"],
        body=body,
        code=(
            line(UNet.forward, "temb ="),
            line(WayDown.embed_time, "sinusoid"),
            line(ResBlock.forward, "self.time(F.silu"),
            line(DownLevel.forward, "skips.append"),
            line(UpLevel.forward, "skips.pop"),
            line(SpatialTransformer.forward, "block(h, context)"),
        ),
        data={
            "parts": [[p.name, *p.size, p.parameters, p.operations] for p in parts],
            "features": [[look.frame.i, look.features] for look in found],
            "shifts": [[look.frame.i, look.shifts] for look in found],
        },
    )


def parts_of(seen: Seen, look: Look) -> list[Part]:
    """Return the parts in the order of the forward pass, those that are outside of levels with conv_out."""
    unet = seen.pipe.unet
    names = ["conv_in", *(f"down.{i}" for i in range(len(unet.down))), "mid"]
    names += [*(f"up.{i}" for i in range(len(unet.up))), "conv_out"]
    found = []
    for name in names:
        module = unet.get_submodule(name)
        inside = [type(m).__name__ for m in module.modules()]
        first = next((k for k in look.shapes if k.startswith(f"{name}.res")), name)
        if name not in look.shapes:
            continue  # a reduced model without a middle
        found.append(
            Part(
                name,
                inside.count("ResBlock"),
                inside.count("SpatialTransformer"),
                inside.count("SpatialSelfAttention"),
                look.shapes[first],
                sum(p.numel() for p in module.parameters()),
                look.operations[name],
            )
        )
    return found


def _diagram(parts: Sequence[Part], levels: int) -> Html:
    """Draw the U: the way down at the left, the way up at the right, the middle below."""
    drawn, right = [], WIDE - BOX
    for part in parts:
        way, _, number = part.name.partition(".")
        if way == "conv_in":
            x, y = 0, 0
        elif way == "down":
            x, y = 0, (int(number) + 1) * STEP
        elif way == "mid":
            x, y = (WIDE - BOX) // 2, (levels + 1) * STEP
        elif way == "up":
            x, y = right, (levels - int(number)) * STEP
        else:
            x, y = right, 0
        drawn.append(_box(part, x, y))
        if way == "down":
            drawn.append(_arrow(x + BOX, y + HIGH / 2, right, y + HIGH / 2, "skip"))
            drawn.append(say(WORDS["skips"], "text", {"x": WIDE / 2, "y": y + HIGH / 2 - 6, "text_anchor": "middle"}))
    for k in range(levels):
        drawn.append(_arrow(BOX / 2, k * STEP + HIGH, BOX / 2, (k + 1) * STEP, "way"))
        drawn.append(_arrow(right + BOX / 2, (k + 1) * STEP, right + BOX / 2, k * STEP + HIGH, "way"))
    low = levels * STEP + HIGH
    drawn.append(_arrow(BOX / 2, low, (WIDE - BOX) / 2, (levels + 1) * STEP + HIGH / 2, "way"))
    drawn.append(_arrow((WIDE + BOX) / 2, (levels + 1) * STEP + HIGH / 2, right + BOX / 2, low, "way"))
    names = label(WORDS["diagram"])
    head = tag("marker", tag("path", d="M0 0 8 4 0 8z"), id="arrow", viewBox="0 0 8 8", refX=8, refY=4,
               markerWidth=7, markerHeight=7, orient="auto")  # fmt: skip
    picture = tag(
        "svg",
        tag("title", names),
        tag("defs", head),
        *drawn,
        viewBox=f"-2 -2 {WIDE + 4} {(levels + 1) * STEP + HIGH + 4}",
        role="img",
        aria_label=names,
        cls="unet",
    )
    keys = [tag("span", tag("i", cls=f"key {c}"), say(WORDS[name])) for c, name in (("c4", "time"), ("c2", "text"))]
    return tag("figure", tag("div", picture, cls="wide", tabindex=0, role="region"), tag("p", keys, cls="legend"))


def _box(part: Part, x: float, y: float) -> Html:
    c, h, w = part.size
    held = [f"{n} × {kind}" for n, kind in ((part.res, "ResBlock"), (part.transformers, "transformer"),
            (part.attentions, "self-attention")) if n] or ["convolution"]  # fmt: skip
    lines = (
        f"{part.name}: {c} × {h} × {w}",
        ", ".join(held),
        f"{part.parameters / 1e6:.3g} M, {part.operations / 1e9:.3g} GFLOP",
    )
    texts = [
        tag("text", text, x=x + 10, y=y + 18 + 17 * k, cls="name" if k == 0 else None) for k, text in enumerate(lines)
    ]
    marks = [("c4", part.res), ("c2", part.transformers)]
    dots = [
        tag("circle", cx=x + BOX - 12 - 14 * k, cy=y + 12, r=4.5, cls=f"dot {c}") for k, (c, n) in enumerate(marks) if n
    ]
    return flat([tag("rect", x=x, y=y, width=BOX, height=HIGH, rx=6, cls="box"), *texts, *dots])


def _arrow(x1: float, y1: float, x2: float, y2: float, cls: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls, marker_end="url(#arrow)")


def _table(parts: Sequence[Part], total: int, work: int) -> Html:
    def share(n: int, of: int) -> str:
        return f"{100 * n / max(of, 1):.1f} %"

    names = [say(WORDS[name]) for name in ("part", "size", "parameters", "share", "operations", "share")]
    lines = []
    for p in parts:
        size, giga = " × ".join(map(str, p.size)), f"{p.operations / 1e9:.3f}"
        lines.append((p.name, size, f"{p.parameters:,}", share(p.parameters, total), giga, share(p.operations, work)))
    return tag("div", table(names, lines), say(WORDS["rest"], "p"))


def _time(seen: Seen, found: list[Look]) -> Html:
    config = seen.pipe.config.unet
    t = torch.tensor([look.frame.t for look in found])
    code = sinusoid(t, config.levels[0].channels, sin_first=config.sin_first, freq_shift=config.freq_shift)
    tall, wide = max(1, 128 // len(code)), max(1, 384 // code.shape[1])
    picture = to_unit(code)[None].repeat(3, 1, 1).repeat_interleave(tall, 1).repeat_interleave(wide, 2)
    figure = tag(
        "figure", tag("figcaption", say(WORDS["code"])), img(picture, WORDS["code"], cls="code-picture", side=512)
    )
    first, last = found[0], found[-1]
    names = [say(WORDS["block"]), *(say(WORDS["shift"], "span", None, t=f"{look.frame.t:g}") for look in (first, last))]
    lines = [
        (name, *(f"{look.shifts[name][0]:.3f} / {look.shifts[name][1]:.3f}" for look in (first, last)))
        for name in first.shifts
    ]
    said = say(WORDS["how"], "p", dim=code.shape[1], out=config.time_dim, blocks=len(lines))
    return answer("q-time-enters", WORDS["how?"], said, figure, table(names, lines))


def _features(found: list[Look]) -> Html:
    names = list(found[0].features)
    some = [
        names[round(k * (len(names) - 1) / (min(COLOURS, len(names)) - 1))] for k in range(min(COLOURS, len(names)))
    ]
    series = [
        Series(Text(name, name), [(look.frame.i, look.features[name][1]) for look in found], k)
        for k, name in enumerate(some, start=1)
    ]
    means = [(name, *(f"{v:.3f}" for look in (found[0], found[-1]) for v in look.features[name])) for name in names]
    heads = [say(WORDS["part"])]
    for look in (found[0], found[-1]):
        heads += [say(WORDS[name], "span", None, t=f"{look.frame.t:g}") for name in ("mean", "std")]
    chart = Chart(WORDS["spread"], WORDS["row"], WORDS["deviation"], series, log=True)
    return tag(
        "div", tag("h3", say(WORDS["features"])), say(WORDS["features told"], "p"), chart.svg(), table(heads, means)
    )
