"""The loop that makes a picture: from pure noise, one model call after another, towards x0.

It is a generator: every model call yields a :class:`Step`, and whoever consumes it (the progress bar, a preview, a
recording, your own loop) may look at it, keep it, change ``step.x``, or stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import Cancelled, ConfigError
from minidiff.progress import Counter, check_progress
from minidiff.samplers.method import Draw, Sampler


class Prediction(NamedTuple):
    """What the model said: ``out`` is what the sampler takes, guided from the two others where there was guidance."""

    out: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None


Predict = Callable[[Tensor, Tensor], Prediction]


class Work:
    """What one run is to those that work for it: whether it was cancelled, and what they keep between two calls."""

    def __init__(self) -> None:
        self.kept: dict[object, Any] = {}  # by who keeps it: what approximations know of the latest step
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the run before its next call of the model. From any thread."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise :class:`Cancelled` if it was."""
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Inside, :func:`work` is this one, in the calling thread."""
        before = _now.get()
        try:
            _now.set(self)
            yield
        finally:
            _now.set(before)


_now: ContextVar[Work | None] = ContextVar("minidiff_work", default=None)  # of each thread its own


def work() -> Work | None:
    """The run that the calling thread works for."""
    return _now.get()


def check_cancelled() -> None:
    """Raise :class:`Cancelled` if the run that the calling thread works for was cancelled."""
    now = _now.get()
    if now is not None:
        now.check()


@dataclass
class Step:
    """One model call: row ``i`` of the plan at timestep ``t`` took the sample to ``x`` (B, C, H, W).

    ``x`` may be assigned to: the next step goes on from there. ``x`` is still noisy until the last step, ``x0`` is what
    the model expects to see in the end: preview that one.
    """

    i: int
    t: Tensor
    x: Tensor
    out: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None
    _x0: Callable[[], Tensor | None] = field(default=lambda: None, repr=False)
    _work: Work = field(default_factory=Work, repr=False, compare=False)

    def cancel(self) -> None:
        """End the run that this step belongs to, as :meth:`Run.cancel` does."""
        self._work.cancel()

    @property
    def x0(self) -> Tensor | None:
        """The denoised estimate of this step, computed when read; None where the method has none."""
        with torch.no_grad():
            return self._x0()


Progress = bool | None | Callable[[Step], object]


def choose_rows(
    plan: Any,
    steps: int,
    sampler: Any,
    train_steps: int,
    *,
    strength: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> range:
    """The rows of ``plan``, made for ``steps``, that a run takes: all of them by default.

    ``strength`` in 0..1: the last int(steps * strength) steps, for a run that begins with a noisy picture. ``start``
    and ``end``, fractions of the way from noise to picture: what one model leaves to another, told by the timesteps, so
    that two models with different plans meet at the same noise. Raises :class:`ConfigError` if no row is left.
    """
    n = len(plan.timesteps)
    first, stop = 0, n
    order = getattr(sampler, "order", 1)  # a method of two calls a step is entered at a whole step only
    if start is not None:
        left = int((plan.timesteps < cutoff(start, train_steps)).sum())
        first = n - left - (1 if order == 2 and left % 2 == 0 else 0)
    elif strength is not None:
        taken = min(int(steps * strength), steps)
        first = (steps - taken) * order if taken else n
    if end is not None:
        stop = first + int((plan.timesteps[first:] >= cutoff(end, train_steps)).sum())
    if first >= stop:
        given = {"strength": strength if start is None else None, "denoising_start": start, "denoising_end": end}
        shown = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ConfigError(f"{shown} of steps={steps} leaves no step to do; take more steps or another part of them")
    return range(first, stop)


def cutoff(fraction: float, train_steps: int) -> int:
    """The timestep at ``fraction`` of the way from pure noise (0) to the picture (1)."""
    return round(train_steps - fraction * train_steps)


def rows_outside(plan: Any, rows: range, low: float, high: float, train_steps: int) -> list[int]:
    """Those of ``rows`` that ``plan`` runs before ``low`` or from ``high`` on, fractions of the way from noise (0) to
    picture (1), told by the timesteps as in :func:`choose_rows`. Of 0 to 1 nothing is outside."""
    early, late = cutoff(low, train_steps), cutoff(high, train_steps)
    t = plan.timesteps
    return [i for i in rows if (low > 0 and t[i] >= early) or (high < 1 and t[i] < late)]


@torch.no_grad()
def denoise(
    predict: Predict,
    sampler: Sampler[Any, Any],
    plan: Any,
    x: Tensor,
    *,
    first: int = 0,
    stop: int | None = None,
    draw: Draw,
    instead: Mapping[int, Predict] | None = None,
    work: Work | None = None,
) -> Generator[Step, None, None]:
    """Run ``plan`` from row ``first`` up to ``stop`` on ``x`` (B, C, H, W), noise at the first row's level; yields each
    :class:`Step`. ``instead``: the rows that call another model than ``predict``, and which. ``work``: by which it may
    be cancelled.

    Gradients are off inside and as the caller has them between two steps. Raises :class:`Cancelled`.
    """
    work = work or Work()
    plan = plan.to(x.device)  # once: a host timestep would be copied, and waited for, at every step
    state = sampler.start()
    for i in range(first, len(plan.timesteps) if stop is None else stop):
        before, before_state = x, state
        model = (instead or {}).get(i, predict)
        work.check()
        with work.going_on():
            prediction = model(sampler.scale_input(plan, i, x), plan.timesteps[i])
        x, state = sampler.step(plan, i, x, prediction.out, state, draw)

        def x0(
            i: int = i, x: Tensor = before, out: Tensor = prediction.out, state: Any = before_state
        ) -> Tensor | None:
            return sampler.denoised(plan, i, x, out, state)

        step = Step(i, plan.timesteps[i], x, *prediction, x0, work)
        yield step
        x = step.x


class Run(Iterator[Step]):
    """A denoising that is ready to go: iterate over its steps, or let it run to the end.

    ``plan`` is what it will do (print it), or the ``rows`` of it if not all; ``recipes`` say, image by image, how to
    get the same again. ``again`` makes the same denoising anew, noise and all. ``work`` is what its model calls know of
    it.

    Whoever iterates and stops early calls :meth:`close`, or lets go of the run: its memory goes with it.
    """

    def __init__(
        self,
        trail: Generator[Step, None, None],
        plan: Any,
        recipes: list[dict[str, Any]],
        rows: range | None = None,
        again: Callable[[], Iterator[Step]] | None = None,
        work: Work | None = None,
    ) -> None:
        self.trail = trail
        self.plan = plan
        self.recipes = recipes
        self.rows = range(len(plan.timesteps)) if rows is None else rows
        self.again = again
        self.work = work or Work()
        self._latest: Step | None = None

    def __repr__(self) -> str:
        done = 0 if self._latest is None else self.rows.index(self._latest.i) + 1
        return f"Run: {done} of {len(self)} model calls done, {len(self.recipes)} pictures; {self.plan!r}"

    def __len__(self) -> int:
        """Model calls, in all."""
        return len(self.rows)

    def __next__(self) -> Step:
        try:
            self.work.check()
            self._latest = next(self.trail)
        except StopIteration:
            self.work.kept.clear()
            raise
        except Cancelled:
            self.close()
            self._latest = None
            raise
        return self._latest

    def cancel(self) -> None:
        """End the run, from any thread: whoever iterates over it, or waits for its pictures, gets :class:`Cancelled`
        raised as soon as the model call that is under way is done; in a decoding, the tile or the slice."""
        self.work.cancel()

    def close(self) -> None:
        """Stop where it is, and let go of what the run holds. From the thread that iterates."""
        self.trail.close()
        self.again = None
        self.work.kept.clear()

    def last(self, progress: Progress = False) -> Step:
        """Run what is left; gives the last step. ``progress``: None for a bar on a terminal or in a notebook and
        nothing elsewhere, True for a line now and then there, False for nothing, or a function of each step.

        Raises :class:`ConfigError` for a run that was closed before its first step.
        """
        check_progress(progress)
        told = progress if callable(progress) else None
        with Counter(len(self), "step", show=False if callable(progress) else progress) as counter:
            for step in self:
                if told is not None:
                    told(step)
                counter.count()
        if self._latest is None:
            raise ConfigError("the run was closed before its first step; there is no last one")
        return self._latest
