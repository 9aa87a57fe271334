"""Common mistakes, each made on purpose in a copy of the model: the picture, and the first stage at which it parts.

The stages are those of :mod:`minidiff.parity`, by which one finds such a mistake in one's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minidiff.explain.collect import Seen
from minidiff.explain.second_look import own_pipe
from minidiff.models.attention import SpatialTransformer
from minidiff.parity.difference import Difference, difference
from minidiff.parity.engine import record
from minidiff.parity.ours import Asked, Ours
from minidiff.parity.taps import Tap
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.samplers.method import Sampler

STEPS = 4  # model calls of each of the runs
PIXELS = "decode/pixels"
EULER = {"name": "euler", "spacing": "leading", "steps_offset": 1}
OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon", "sample": "epsilon"}

Pipe = StableDiffusion | Unconditional
Made = tuple[Pipe, Asked]
"""A model of its own, and what it is asked."""


@dataclass(frozen=True, eq=False)
class Result:
    """A mistake. ``stage``: the first that differs, after ``before`` equal ones; None if all are equal. ``there``: the
    difference at it. ``apart``: root mean square difference of the pictures, in levels of 255."""

    name: str
    pixels: Tensor
    stage: str | None
    before: int
    there: Difference | None
    apart: float


@torch.no_grad()
def compare(seen: Seen) -> tuple[Tensor, list[Result]]:
    """Return the picture (3, H, W) of a short run of the same request with Euler, and every mistake in it."""
    request = _short(seen)
    own = own_pipe(seen)
    tape = record(_Side(copy(own), request))
    right, found = tape[PIXELS][0], []
    for name, make in mistakes(seen).items():
        wrong = _Against(tape)
        side = _Side(*make(copy(own), request))
        side.run(wrong)
        pixels = side.pixels.nan_to_num()
        levels = float((255 * (pixels - right)).square().mean().sqrt())
        found.append(Result(name, pixels, wrong.stage, wrong.before, wrong.there, levels))
    return right, found


def mistakes(seen: Seen) -> dict[str, Callable[[Pipe, Asked], Made]]:
    """Return the mistakes that this run can make, by name."""
    found: dict[str, Callable[[Pipe, Asked], Made]] = {
        "offset": _offset,
        "unscaled": _unscaled,
        "prediction": _prediction,
        "eps": lambda _, request: _eps(own_pipe(seen), request),  # its networks are changed
    }
    if seen.guided:
        found["twice"] = _twice
    if seen.text and seen.request.prompt_embeds is None:
        found["unpadded"] = _unpadded
    return found


def _short(seen: Seen) -> Asked:
    """Return the run's request, for one picture, with Euler and few steps."""
    request = seen.request
    given = {f.name: getattr(request, f.name) for f in fields(Asked) if hasattr(request, f.name)}
    prompt = request.prompt if request.prompt is None or isinstance(request.prompt, str) else request.prompt[0]
    one = {"prompt": prompt, "num_images": 1, "seed": seen.recipe.get("seed") or 0, "generator": None, "latents": None}
    return Asked(**{**given, **one, "steps": min(STEPS, request.steps), "sampler": EULER, "like": None})


class _Against:
    """Tap that holds a run against a tape, up to the first stage that differs."""

    def __init__(self, tape: Mapping[str, Tensor]) -> None:
        self.tape, self.before = tape, 0
        self.stage: str | None = None
        self.there: Difference | None = None

    def __call__(self, stage: str, value: Tensor) -> Tensor:
        if self.stage is None and stage in self.tape:
            right, now = self.tape[stage], value.detach().cpu()
            if right.shape == now.shape and torch.equal(right, now):
                self.before += 1
            else:
                self.stage, self.there = stage, difference(right, now)
        return value


class _Side:
    """One run; its picture is kept, (3, H, W)."""

    title = "minidiff"

    def __init__(self, pipe: Pipe, request: Asked) -> None:
        self.ours = Ours(pipe, request, deep=lambda scope: scope == "step.0")
        self.pixels = torch.zeros(0)

    def run(self, tap: Tap) -> None:
        """Run from prompt to pixels."""

        def keep(stage: str, value: Tensor) -> Tensor:
            if stage == PIXELS:
                self.pixels = value[0].float().cpu()
            return tap(stage, value)

        self.ours.run(keep)

    def wide(self) -> Any:
        """Return a context in which every part is in float64."""
        return self.ours.wide()


def _offset(pipe: Pipe, request: Asked) -> Made:
    return pipe, replace(request, sampler={**EULER, "steps_offset": 0})


class _Unscaled:
    """A sampler whose input is not scaled for the model."""

    def __init__(self, inner: Sampler[Any, Any]) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def scale_input(self, plan: Any, i: int, x: Tensor) -> Tensor:
        """Return ``x`` as it is: the mistake."""
        return x


def _unscaled(pipe: Pipe, request: Asked) -> Made:
    wrong: Any = _Unscaled(pipe.sampler(EULER))
    return pipe, replace(request, sampler=wrong)


def _prediction(pipe: Pipe, request: Asked) -> Made:
    told: Any = OTHER[pipe.schedule.prediction]
    pipe.schedule = replace(pipe.schedule, prediction=told)
    return pipe, request


def _eps(pipe: Pipe, request: Asked) -> Made:
    norms = [m.norm for m in pipe.unet.modules() if isinstance(m, SpatialTransformer)]
    for norm in norms:
        norm.eps = 1e-5
    if not norms:
        for part in pipe.unet.modules():
            if isinstance(part, torch.nn.GroupNorm):
                part.eps = 1e-5 if part.eps != 1e-5 else 1e-6
    return pipe, request


def _twice(pipe: Pipe, request: Asked) -> Made:
    scale = pipe.own_scale if request.guidance_scale is None else request.guidance_scale  # type: ignore[union-attr]
    return pipe, replace(request, guidance_scale=float(scale) ** 2)  # u + s (u + s (c - u) - u)


def _unpadded(pipe: Pipe, request: Asked) -> Made:
    assert isinstance(pipe, StableDiffusion)
    encode, tokenizer = pipe.encode_prompt, pipe.encoders[0][0]
    length = min(tokenizer.length, len(tokenizer.encode(str(request.prompt))) + 2)

    def cut(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        context, pooled = encode(*args, **options)
        return context[:, :length], pooled

    pipe.encode_prompt = cut  # type: ignore[method-assign]
    return pipe, request
