"""Denoising loop: from pure noise towards x0, one model call after another.

The loop is a generator. It yields a :class:`Step` after every model call, and its consumer (the progress bar, a
preview, a recording, your own loop) may inspect the step, keep it, change ``step.x``, or stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minidiff.console.progress import Counter, check_progress
from minidiff.errors import Cancelled, ConfigError
from minidiff.pipeline.job import Job


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


def _unknown() -> None:
    """Return no estimate."""


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
    _x0: Callable[[], Tensor | None] = field(default_factory=lambda: _unknown, repr=False)
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


@torch.no_grad()
def denoise(job: Job, work: Work | None = None) -> Generator[Step, None, None]:
    """Run the rows of a job and yield a :class:`Step` for each. ``work`` allows the run to be cancelled.

    Gradients are disabled inside; between two steps the caller's setting applies. Raises :class:`Cancelled`.
    """
    work = work or Work()
    sampler, x = job.sampler, job.x
    plan = job.plan.to(x.device)  # once: copying a timestep from the host at every step would synchronize
    state = sampler.start()
    for i in job.rows:
        predict = job.instead.get(i, job.predict)
        work.check()
        with work.going_on():
            prediction = predict(sampler.scale_input(plan, i, x), plan.timesteps[i])
        before, before_state = x, state
        x, state = sampler.step(plan, i, x, prediction.out, state, job.draw)
        x = job.keep(i, x)

        def x0(
            i: int = i, x: Tensor = before, out: Tensor = prediction.out, state: Any = before_state
        ) -> Tensor | None:
            return sampler.denoised(plan, i, x, out, state)

        step = Step(i, plan.timesteps[i], x, *prediction, x0, work)
        yield step
        x = step.x


class Run(Iterator[Step]):
    """The denoising of a job: iterate over its steps, or call :meth:`last` to run it to the end.

    ``plan`` lists the model calls (print it), of which ``rows`` are executed. ``recipes`` hold, for each image, the
    settings that reproduce it. ``work`` is the state shared with the model calls.

    To stop early and free the memory, call :meth:`close` or drop the run.
    """

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job
        self.work = Work()
        self.trail = denoise(job, self.work)
        self.plan = job.plan
        self.rows = job.rows
        self.recipes = [recipe.to_json() for recipe in job.recipes]
        self._latest: Step | None = None

    def again(self) -> Iterator[Step]:
        """Return the same denoising from the start, with the same noise; nothing after :meth:`close`."""
        if self.job is None:
            return iter(())
        self.job.rewind()
        return denoise(self.job, self.work)

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
            self._end()
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
        self._end()
        self.job = None

    def _end(self) -> None:
        """Free what only the steps need."""
        self.work.kept.clear()
        if self.job is not None:
            self.job.done()

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
