"""A run with everything that it passes through: the first stage of a page.

The job that is run is the pipeline's own. Only its functions are wrapped, the prediction, the call of the UNet and the
drawing of noise, and return what they return anyway, so the picture is that of the run without a page, bit for bit,
whatever switches of :mod:`minidiff.fast` are on. Nothing is put on the model, which other threads may be using.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from minidiff.explain.pictures import Painter
from minidiff.models.unet import UNet
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.pipeline.denoise import Run, Step
from minidiff.pipeline.job import Job, Predict, Prediction
from minidiff.pipeline.request import Request
from minidiff.samplers.method import Plan, Sampler


class Call(NamedTuple):
    """Arguments of the UNet (:meth:`UNet.forward`) for one picture with its prompt, each of batch 1."""

    x: Tensor
    t: Tensor | float
    context: Tensor | None = None
    added: tuple[Tensor, Tensor] | None = None
    guidance: Tensor | None = None
    residuals: tuple[list[Tensor], Tensor] | None = None
    features: list[Tensor] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """One model call, of the first picture alone: tensors (1, C, h, w).

    ``i``: row of the plan. ``call``: what the UNet was given, with the prompt. ``before``: the sample at the row,
    ``shown``: that sample as the model sees it, ``after``: the sample that the step leads to. ``out`` goes to the
    sampler; ``conditional`` and ``unconditional`` are the two predictions of the model, None without guidance.
    ``noise``: what the step drew, in order. ``state``: that of the sampler before the step. ``x0``: the estimates of
    the picture from ``out`` and from each prediction, None where the method has none.
    """

    i: int
    t: float
    call: Call
    before: Tensor
    shown: Tensor
    after: Tensor
    out: Tensor
    conditional: Tensor | None
    unconditional: Tensor | None
    noise: tuple[Tensor, ...]
    state: Any
    x0: Tensor | None
    x0_conditional: Tensor | None
    x0_unconditional: Tensor | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """A finished run: the model, what was asked, the plan, every model call, and the picture (3, H, W) in [0, 1].

    ``seconds``: of the run with its decoding. ``bundled``: the model is the one that ships with minidiff.
    """

    pipe: StableDiffusion | Unconditional
    request: Request
    plan: Plan[Any]
    sampler: Sampler[Any, Any]
    rows: range
    recipe: dict[str, Any]
    frames: tuple[Frame, ...]
    pixels: Tensor
    seconds: float
    bundled: bool = False
    kept: dict[str, Any] = field(default_factory=dict)  # what one panel computes and another needs as well

    @property
    def guided(self) -> bool:
        """True if the model predicted with and without the prompt."""
        return any(frame.unconditional is not None for frame in self.frames)

    @property
    def text(self) -> bool:
        """True if the model reads a prompt."""
        return isinstance(self.pipe, StableDiffusion)

    @cached_property
    def painter(self) -> Painter:
        """The function that turns samples into pictures."""
        return Painter(self.pipe, self.frames[-1].after)


def collect(
    pipe: StableDiffusion | Unconditional,
    request: Request,
    *,
    bundled: bool = False,
    progress: Callable[[Step], object] | None = None,
) -> Seen:
    """Run ``request`` and return what it passed through. ``progress`` is called with each step.

    Raises what :meth:`StableDiffusion.generate` raises.
    """
    begun = time.monotonic()
    own, spy = copy(pipe), _Spy(pipe.unet)
    own.unet = cast(UNet, spy)
    watch = _Watch(own.job(request), spy)
    run = Run(watch.job)
    steps: list[Step] = []

    def keep(step: Step) -> None:
        steps.append(replace(step, x=step.x[:1].clone()))
        watch.after()
        if progress is not None:
            progress(step)

    pixels = pipe.finish(run, progress=keep)[0].float().cpu()
    seconds = time.monotonic() - begun
    return Seen(
        pipe=pipe,
        request=request,
        plan=watch.job.plan,
        sampler=watch.job.sampler,
        rows=watch.job.rows,
        recipe=run.recipes[0],
        frames=tuple(_frames(watch, steps)),
        pixels=pixels,
        seconds=seconds,
        bundled=bundled,
    )


class _Spy:
    """A UNet, called as itself: the arguments of the latest call are kept. ``count``: pictures of the run."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.count = unet, 1
        self.latest: Call | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(self, x: Tensor, t: Tensor | float, *more: Any) -> Tensor:
        if len(more) > 3 and more[3] is not None:  # a control's, which may be read once only
            more = (*more[:3], ([*more[3][0]], more[3][1]), *more[4:])
        k = 0 if len(x) == self.count else self.count  # with guidance, the pictures without the prompt come first
        one = Call(x, t, *more)
        self.latest = Call(x[k : k + 1].clone(), t, *(_one(part, k, len(x)) for part in one[2:]))
        out: Tensor = self.unet(x, t, *more)
        return out


def _one(part: Any, k: int, count: int) -> Any:
    """Return row ``k`` of tensors with ``count`` rows, also of those inside tuples and lists."""
    if isinstance(part, (tuple, list)):
        return type(part)(_one(each, k, count) for each in part)
    return part[k : k + 1] if isinstance(part, Tensor) and len(part) == count else part


class _Watch:
    """A job whose predictions and draws are kept: for each model call its input, its result and the noise behind it."""

    def __init__(self, job: Job, spy: _Spy) -> None:
        self.spy, spy.count = spy, len(job.x)
        self.first = job.x[:1].clone()
        self.calls: list[Call] = []
        self.shown: list[Tensor] = []
        self.predicted: list[Prediction] = []
        self.drawn: list[list[Tensor]] = []
        self._now: list[Tensor] = []
        instead = {i: self._predict(predict) for i, predict in job.instead.items()}
        self.job = replace(job, predict=self._predict(job.predict), instead=instead, draw=self._draw(job))

    def _predict(self, predict: Predict) -> Predict:
        def watched(x: Tensor, t: Tensor) -> Prediction:
            found = predict(x, t)
            assert self.spy.latest is not None  # whatever predicts calls the UNet
            self.calls.append(self.spy.latest)
            self.shown.append(x[:1].clone())
            self.predicted.append(Prediction(*(None if p is None else p[:1].clone() for p in found)))  # type: ignore[arg-type]
            return found

        return watched

    def _draw(self, job: Job) -> Callable[[Tensor], Tensor]:
        def watched(like: Tensor) -> Tensor:
            noise = job.draw(like)
            self._now.append(noise[:1].clone())
            return noise

        return watched

    def after(self) -> None:
        """Note that a step is done: what was drawn belongs to it."""
        self.drawn.append(self._now.copy())
        self._now.clear()


@torch.no_grad()
def _frames(watch: _Watch, steps: list[Step]) -> list[Frame]:
    """Return every model call. The sampler's states are those of the same steps, taken again from what was kept."""
    job, found = watch.job, []
    plan, x, state = job.plan.to(watch.first.device), watch.first, job.sampler.start()
    each = zip(steps, watch.calls, watch.shown, watch.predicted, watch.drawn, strict=True)
    for step, call, shown, prediction, drawn in each:

        def x0(out: Tensor | None, i: int = step.i, x: Tensor = x, state: Any = state) -> Tensor | None:
            return None if out is None else job.sampler.denoised(plan, i, x, out, state)

        both = prediction.unconditional is not None
        found.append(
            Frame(
                i=step.i,
                t=float(step.t),
                call=call,
                before=x,
                shown=shown,
                after=step.x,
                **prediction._asdict(),
                noise=tuple(drawn),
                state=state,
                x0=x0(prediction.out),
                x0_conditional=x0(prediction.conditional) if both else None,
                x0_unconditional=x0(prediction.unconditional),
            )
        )
        again = iter(drawn)
        _, state = job.sampler.step(plan, step.i, x, prediction.out, state, lambda like, again=again: next(again))  # type: ignore[misc]
        x = step.x
    return found
