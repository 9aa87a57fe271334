"""Options that the solvers in lambda share, and the runs that hold each of them against diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from minidiff.samplers import Scheduler
from tests.parity.axes import Config
from tests.parity.sampler_twins import DTYPES, compare, reference

LARGEST_IN_HALF = 2000.0  # x0 is noise of up to 5 standard deviations times sigma: beyond 65504 float16 is infinite

T = TypeVar("T")


def turn(values: Sequence[T], i: int) -> T:
    """The i-th of ``values``, beginning again at the end."""
    return values[i % len(values)]


def chains(c: Config, steps: Sequence[int] = (1, 2, 3, 5, 20)) -> None:
    """Whole trajectories: all in float32, and some of each length class in half precision."""
    twin = reference(c)
    for n in steps:
        compare(c, n, twin=twin)
    for n, dtype in ((2, DTYPES[1]), (5, DTYPES[2]), (16, DTYPES[1])):
        if dtype != torch.float16 or fits_in_half(c):
            compare(c, n, dtype, twin=twin)


def starts(c: Config, steps: int = 20) -> None:
    """A run of ``steps``, started at every one of its rows."""
    twin = reference(c)
    for first in range(steps):
        dtype = DTYPES[first % 3]
        compare(c, steps, dtype if fits_in_half(c) else DTYPES[0], first=first, twin=twin)


def fits_in_half(c: Config) -> bool:
    s = Scheduler.from_diffusers(c)
    s.set_timesteps(20)
    return bool(s.sigmas.max() < LARGEST_IN_HALF)


def refuses_to_step(c: Config, steps: int) -> bool:
    """Whether the reference gives NaN, or raises, in ``steps`` steps on zeros and ones."""
    ref: Any = reference(c)
    ref.set_timesteps(steps)
    x = torch.ones(1, 4, 2, 2)
    for i, t in enumerate(ref.timesteps):
        x = ref.step(torch.full_like(x, i % 3), t, x).prev_sample
    return not bool(x.isfinite().all())
