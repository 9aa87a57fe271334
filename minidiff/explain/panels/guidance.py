"""Panel: guidance. The prediction with the prompt and the one without, and what the guidance scale makes of the two.

The estimate of the picture is linear in the model's output, so the two recorded estimates give that of every scale.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minidiff.explain.collect import Frame, Seen
from minidiff.explain.colours import Colours
from minidiff.explain.panel import Left, Panel, answer, line
from minidiff.explain.panels.film import thinned
from minidiff.explain.pictures import img
from minidiff.page.html import Child, Html, table, tag
from minidiff.page.languages import Text, say, words
from minidiff.page.svg import Chart, Series
from minidiff.pipeline.guidance import guide, predictor
from minidiff.pipeline.stable_diffusion import StableDiffusion
from minidiff.programs import Program

SHOWN = 7  # steps whose pictures are in the page
MOST = 25  # steps whose numbers are, for small samples
SMALL = 64 * 64  # numbers of a sample up to which that many are
ROWS = ("conditional", "unconditional", "difference", "guided")
GREY = 0.5  # of a difference of nothing
WORDS = words(__package__, "guidance.json")


@dataclass(frozen=True, eq=False)
class Place:
    """One number of a sample: channel, row, column."""

    c: int
    y: int
    x: int

    def of(self, sample: Tensor) -> float:
        """Return the number there in (1, C, h, w)."""
        return float(sample[0, self.c, self.y, self.x])


def build(seen: Seen) -> Panel | Left:
    """Return the panel, or why a run has none: its model calls made one prediction only."""
    both = tuple(f for f in seen.frames if f.x0_conditional is not None and f.x0_unconditional is not None)
    if not both:
        return Left(anchor="guidance", title=WORDS["title"], why=reason(seen))
    scale = float(seen.recipe["guidance_scale"])
    shown = early(both, SHOWN)
    pictures = _pictures(seen, shown)
    written = thinned(both, MOST) if both[0].out.numel() <= SMALL else shown
    one = shown[len(shown) // 3]
    colours = Colours.fitted(
        [x for f in shown for x in (_x0(f, True), _x0(f, False))],
        [p for pair in zip(pictures["conditional"], pictures["unconditional"], strict=True) for p in pair],
    )
    place = widest(one)
    body = tag(
        "div",
        say(WORDS["intro"], "p"),
        tag("div", *(_row(seen, row, shown, pictures[row]) for row in ROWS), cls="film"),
        _apart(seen, both, written, shown),
        tag("div", cls="mixer needs-script", data_guidance=True),
        say(WORDS["mixer"], "p", {"cls": "needs-script"}),
        answer("q-guidance-formula", WORDS["formula?"], *_formulas(shown, place, scale, one, seen)),
        answer("q-scale-1-and-0", WORDS["scales?"], *_scales(seen, one, scale)),
        answer("q-negative-prompt", WORDS["negative?"], *_negative(seen)),
        _size(seen, both),
    )
    return Panel(
        anchor="guidance",
        title=WORDS["title"],
        body=body,
        code=(
            line(guide, "scale * (conditional"),
            line(predictor, "chunk(len(batches))"),
            line(StableDiffusion._negative, 'prompts.texts_of(""'),
            line(Program.guided, "scale == 1"),
        ),
        data={
            "scale": scale,
            "shape": list(one.out.shape[1:]),
            "place": [place.c, place.y, place.x],
            "begin": written.index(min(written, key=lambda frame: abs(frame.i - one.i))),
            "colours": {"side": colours.side, "block": colours.block, "map": packed(colours.map)},
            "steps": [_numbers(seen, frame) for frame in written],
        },
    )


def reason(seen: Seen) -> Text:
    """Return why there are not two predictions."""
    if not seen.text:
        return WORDS["no text"]
    if seen.pipe.unet.config.guidance_dim is not None:
        return WORDS["distilled"]
    if any(frame.unconditional is not None for frame in seen.frames):
        return WORDS["no estimate"]
    return WORDS["off"]


def early(frames: tuple[Frame, ...], most: int) -> list[Frame]:
    """Return at most ``most`` of the frames, the first and the last among them, and more from the beginning, where the
    two predictions differ most."""
    n, last = min(most, len(frames)), len(frames) - 1
    picked = {round(last * (k / max(n - 1, 1)) ** 1.6) for k in range(n)} | ({last} if n else set())
    return [frames[k] for k in sorted(picked)]


def widest(frame: Frame) -> Place:
    """Return the number on which the two predictions of a step differ most."""
    apart = (_both(frame)[1] - _both(frame)[0]).abs()[0]
    _, height, width = apart.shape
    k = int(apart.flatten().argmax())
    return Place(k // (height * width), k // width % height, k % width)


def _both(frame: Frame) -> tuple[Tensor, Tensor]:
    assert frame.unconditional is not None
    assert frame.conditional is not None
    return frame.unconditional.float(), frame.conditional.float()


def _x0(frame: Frame, conditional: bool) -> Tensor:
    x0 = frame.x0_conditional if conditional else frame.x0_unconditional
    assert x0 is not None
    return x0


def mixed(frame: Frame, scale: float) -> Tensor:
    """Return the estimate of the picture that a step would have made with another scale."""
    return guide(_x0(frame, False), _x0(frame, True), scale)


def _pictures(seen: Seen, frames: list[Frame]) -> dict[str, list[Tensor]]:
    """Return the pictures of the frames, by row."""
    found = {
        "conditional": seen.painter.each([_x0(frame, True) for frame in frames]),
        "unconditional": seen.painter.each([_x0(frame, False) for frame in frames]),
        "guided": seen.painter.each([frame.after if frame.x0 is None else frame.x0 for frame in frames]),
    }
    both = zip(found["conditional"], found["unconditional"], strict=True)
    found["difference"] = [(GREY + (a - b) / 2).clamp(0, 1) for a, b in both]
    return found


def _row(seen: Seen, row: str, frames: list[Frame], pictures: list[Tensor]) -> Html:
    figures = []
    for frame, picture in zip(frames, pictures, strict=True):
        step = _step(seen, frame)
        alt = Text(*(f"{name}: {which}" for name, which in zip(WORDS[f"row {row}"], step, strict=True)))
        figures.append(tag("figure", img(picture, alt), tag("figcaption", say(step))))
    return tag("div", say(WORDS[f"row {row}"], "p", {"cls": "name"}), tag("div", *figures, cls="strip"), cls="reel")


def _step(seen: Seen, frame: Frame) -> Text:
    number = seen.frames.index(frame) + 1
    return Text(*(text.format(k=number, n=len(seen.frames), t=f"{frame.t:g}") for text in WORDS["step"]))


def _apart(seen: Seen, both: tuple[Frame, ...], written: list[Frame], shown: list[Frame]) -> Html:
    """Say how far the recombined estimates are from those of the run, and what the page leaves out."""
    scale = float(seen.recipe["guidance_scale"])
    worst = max(float((mixed(f, scale) - f.x0).abs().max()) for f in both if f.x0 is not None)
    reach = max(float(f.x0.abs().max()) for f in both if f.x0 is not None)
    said = WORDS["exact"] if worst <= 1e-4 * reach else WORDS["not linear"]
    parts = [say(said, "p", worst=f"{worst:.2g}", reach=f"{reach:.3g}", scale=f"{scale:g}")]
    if len(both) < len(seen.frames):
        parts.append(say(WORDS["interval"], "p", n=len(seen.frames), k=len(both)))
    parts.append(say(WORDS["thinned"], "p", shown=len(shown), written=len(written), n=len(both)))
    return tag("div", *parts)


def _formulas(frames: list[Frame], place: Place, scale: float, one: Frame, seen: Seen) -> list[Html]:
    """Both formulas with the numbers of one place in a sample, at several steps."""
    w = scale - 1
    lines: list[list[Child]] = []
    for frame in frames:
        before, after = (place.of(each) for each in _both(frame))
        first, second = before + scale * (after - before), (1 + w) * after - w * before
        numbers = (before, after, first, second, place.of(frame.out.float()))
        lines.append([f"{frame.t:g}", *(f"{value:.6f}" for value in numbers)])
    names = ["t", "u", "c", f"u + {scale:g} (c − u)", f"(1 + {w:g}) c − {w:g} u", say(WORDS["recorded"])]
    where = {"c": place.c, "y": place.y, "x": place.x, "t": f"{one.t:g}", "kind": seen.plan.prediction}
    parts = [
        say(WORDS["formula"], "p", scale=f"{scale:g}", w=f"{w:g}"),
        say(WORDS["place"], "p", None, **where),
        table(names, lines),
    ]
    if seen.recipe.get("guidance_rescale"):
        parts.append(say(WORDS["rescaled"], "p", amount=f"{seen.recipe['guidance_rescale']:g}"))
    return parts


def _scales(seen: Seen, frame: Frame, scale: float) -> list[Html]:
    """Pictures of one step at several scales."""
    figures = []
    scales = sorted({0.0, 1.0, scale, 2 * scale, 4 * scale})
    pictures = seen.painter.each([mixed(frame, each) for each in scales])
    for each, picture in zip(scales, pictures, strict=True):
        alt = Text(*(text.format(scale=f"{each:g}", t=f"{frame.t:g}") for text in WORDS["at scale"]))
        caption = tag("figcaption", say(WORDS["at scale"], "span", None, scale=f"{each:g}", t=f"{frame.t:g}"))
        figures.append(tag("figure", img(picture, alt), caption))
    return [say(WORDS["scales"], "p"), tag("div", *figures, cls="strip"), say(WORDS["later"], "p")]


def _negative(seen: Seen) -> list[Html]:
    negative, zeros = seen.recipe.get("negative_prompt"), getattr(seen.pipe.config, "zero_empty", False)
    if negative:
        here = say(WORDS["negative here"], "p", negative=negative)
    elif negative is None and zeros:
        here = say(WORDS["zeros here"], "p")
    else:
        here = say(WORDS["empty here"], "p")
    return [say(WORDS["negative"], "p"), here]


def _size(seen: Seen, both: tuple[Frame, ...]) -> Html:
    """Return the chart of how much the prompt changes, step by step."""

    def size(x: Tensor) -> float:
        return float(x.float().square().mean().sqrt())

    apart = [(seen.frames.index(f) + 1, size(_both(f)[1] - _both(f)[0])) for f in both]
    x0 = [(seen.frames.index(f) + 1, size(_x0(f, True) - _x0(f, False))) for f in both]
    chart = Chart(
        WORDS["size"],
        WORDS["call"],
        WORDS["rms"],
        [Series(WORDS["of outputs"], apart, 1), Series(WORDS["of estimates"], x0, 2)],
        log=True,
    ).svg()
    k, largest = max(apart, key=lambda point: point[1])
    return tag("div", chart, say(WORDS["sizes"], "p", k=k, largest=f"{largest:.3g}", last=f"{apart[-1][1]:.3g}"))


def _numbers(seen: Seen, frame: Frame) -> dict[str, Any]:
    before, after = _both(frame)
    said = zip(("en", "zh"), _step(seen, frame), strict=True)
    found: dict[str, Any] = {"i": frame.i, "t": frame.t, "label": dict(said)}
    every = {"u": before, "c": after, "out": frame.out, "x0_u": _x0(frame, False), "x0_c": _x0(frame, True)}
    return found | {name: packed(x) for name, x in every.items()}


def packed(x: Tensor) -> str:
    """Return the numbers of a tensor, base64 of little-endian float32."""
    return base64.b64encode(x.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).decode("ascii")
