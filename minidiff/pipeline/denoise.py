"""Denoising loop: from pure noise towards x0, one model call after another.

The loop is a generator. It yields a :class:`Step` after every model call, and its consumer (the progress bar, a
preview, a recording, your own loop) may inspect the step, keep it, change ``step.x``, or stop.
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

from minidiff.console.progress import Counter, check_progress
from minidiff.errors import Cancelled, ConfigError
from minidiff.samplers.method import Draw, Sampler


class Prediction(NamedTuple):
    """Model output: ``out`` goes to the sampler. With guidance it is computed from the two other fields."""

    out: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None


Predict = Callable[[Tensor, Tensor], Prediction]


class Work:
    """Shared state of one run: its cancellation flag, and data that model calls keep from one step to the next."""

    def __init__(self) -> None:
        self.kept: dict[object, Any] = {}  # key: the owner; data that approximations keep of the latest step
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the run before its next model call. May be called from any thread."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise :class:`Cancelled` if the run was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Context manager: inside it, :func:`work` returns this object in the calling thread."""
        before = _now.get()
        try:
            _now.set(self)
            yield
        finally:
            _now.set(before)


_now: ContextVar[Work | None] = ContextVar("minidiff_work", default=None)  # one per thread


def work() -> Work | None:
    """Return the :class:`Work` of the run that the calling thread computes, or None."""
    return _now.get()


def check_cancelled() -> None:
    """Raise :class:`Cancelled` if the run that the calling thread computes was cancelled."""
    now = _now.get()
    if now is not None:
        now.check()


@dataclass
class Step:
    """Result of one model call: row ``i`` of the plan, at timestep ``t``, took the sample to ``x`` (B, C, H, W).

    ``x`` may be assigned to; the next step continues from the new value. ``x`` is noisy until the last step. For
    previews use ``x0``, the model's current estimate of the result.
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
        """Denoised estimate of this step, computed on access; None if the method has no such estimate."""
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
    """Select the rows of ``plan``, made for ``steps``, that a run executes; all of them by default.

    ``strength`` in 0..1 selects the last int(steps * strength) steps, for a run that begins with a noisy picture.
    ``start`` and ``end`` are fractions of the way from noise to picture, for handing over from one model to another.
    They are compared by timestep, so that two models with different plans meet at the same noise level. Raises
    :class:`ConfigError` if no row is left.
    """
    n = len(plan.timesteps)
    first, stop = 0, n
    order = getattr(sampler, "order", 1)  # a method with two calls per step can only be entered at the first
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
    """Return the timestep at ``fraction`` of the way from pure noise (0) to the picture (1)."""
    return round(train_steps - fraction * train_steps)


def rows_outside(plan: Any, rows: range, low: float, high: float, train_steps: int) -> list[int]:
    """Return the ``rows`` of ``plan`` that lie before ``low`` or from ``high`` on.

    ``low`` and ``high`` are fractions of the way from noise (0) to picture (1), compared by timestep as in
    :func:`choose_rows`. No row lies outside 0 to 1.
    """
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
    """Run ``plan`` from row ``first`` up to, not including, ``stop``, and yield a :class:`Step` for each row.

    ``x`` (B, C, H, W) has the noise level of the first row. ``instead`` maps rows to a model that is called there
    in place of ``predict``. ``work`` allows the run to be cancelled.

    Gradients are disabled inside; between two steps the caller's setting applies. Raises :class:`Cancelled`.
    """
    work = work or Work()
    plan = plan.to(x.device)  # once: copying a timestep from the host at every step would synchronize
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
    """A prepared denoising run: iterate over its steps, or call :meth:`last` to run it to the end.

    ``plan`` lists the model calls (print it), of which ``rows`` are executed. ``recipes`` hold, for each image, the
    settings that reproduce it. ``again`` starts the same denoising over, with the same noise. ``work`` is the state
    shared with the model calls.

    To stop early and free the memory, call :meth:`close` or drop the run.
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
        """Total number of model calls."""
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
        """Cancel the run. May be called from any thread.

        The thread that iterates over the run, or waits for its pictures, gets :class:`Cancelled` as soon as the current
        model call is done; during decoding, as soon as the current tile or slice is.
        """
        self.work.cancel()

    def close(self) -> None:
        """Stop the run and free its memory. Call it from the thread that iterates."""
        self.trail.close()
        self.again = None
        self.work.kept.clear()

    def last(self, progress: Progress = False) -> Step:
        """Run the remaining steps and return the last one.

        ``progress``: None shows a bar on a terminal or in a notebook and nothing elsewhere; True also prints a line
        now and then elsewhere; False shows nothing; a function is called with each step. Raises :class:`ConfigError`
        if the run was closed before its first step.
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
