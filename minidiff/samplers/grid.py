"""Grids: the timesteps that a run visits, and curves through sigma, as arrays of numbers.

The training schedule defines one alpha_bar, and so one sigma, for every timestep. A run of n steps visits n of those
levels (``spaced`` in schedule.py: leading, trailing, linspace), or levels between them that follow a curve in sigma:
karras, exponential, beta. The computation is done by numpy on the host, in float64 where the reference uses float64.
``table`` is the training schedule's sigma at every timestep, rising: sqrt((1 - alpha_bar) / alpha_bar).

:class:`Grid` holds the choices that diffusers makes otherwise; its own are in diffusers/grid.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.samplers.betainc import inverse_betainc
from minidiff.schedule import Spacing, spaced

Floats = NDArray[Any]
SigmaSpacing = Literal["timesteps", "karras", "exponential", "beta"]


def at_timesteps(timesteps: Floats, table: Floats) -> Floats:
    """Interpolate ``table`` at float32 ``timesteps``: (n,) float64."""
    sigmas: Floats = np.interp(timesteps, np.arange(len(table)), table)
    return sigmas


def to_timesteps(sigmas: Floats, table: Floats, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    """Return the fractional timesteps, (n,), at which ``table`` has these sigmas, interpolated in log sigma.

    Sigmas outside the table give the first or the last timestep."""
    logs = np.log(table)
    log_sigma = np.log(np.maximum(sigmas, np.asarray(1e-10, dtype=sigmas.dtype)))
    below = np.cumsum(log_sigma[None] - logs[:, None] >= 0, axis=0).argmax(axis=0).clip(max=len(table) - 2)
    low, high = logs[below], logs[below + 1]
    share = np.clip((low - log_sigma) / (low - high), 0, 1)
    low_t = below.astype(dtype)
    t: Floats = (1 - share) * low_t + share * (low_t + 1)
    return t


def karras(low: float, high: float, n: int, rho: float = 7.0) -> Floats:
    """Return (n,) float64 from ``high`` down to ``low``, even in sigma**(1/rho) (Karras et al. 2022, equation 5)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    sigmas: Floats = (a + np.linspace(0, 1, n) * (b - a)) ** rho
    return sigmas


def exponential(low: float, high: float, n: int) -> Floats:
    """Return (n,) float64 from ``high`` down to ``low``, evenly spaced in log sigma."""
    sigmas: Floats = np.exp(np.linspace(math.log(high), math.log(low), n))
    return sigmas


def beta(low: float, high: float, n: int, a: float = 0.6, b: float = 0.6) -> Floats:
    """Return (n,) float64 from ``high`` down to ``low`` at the quantiles of a Beta(a, b) distribution, which puts more
    steps at both ends (Lee et al. 2024, "Beta Sampling is All You Need")."""
    sigmas: Floats = low + inverse_betainc(a, b, 1 - np.linspace(0, 1, n)) * (high - low)
    return sigmas


CURVES: dict[str, Callable[[float, float, int], Floats]] = {"karras": karras, "exponential": exponential, "beta": beta}
"""Every :data:`SigmaSpacing` but "timesteps": (low, high, n) -> (n,) float64, falling."""


class Grid:
    """The choices of minidiff. ``lowest``: the lowest timestep that a row may have. ``beyond``: number of timesteps
    above training's last that the methods in sigma accept. ``further``: points of a curve in excess of the rows, on
    which the last step lands if that is not sigma 0."""

    lowest: ClassVar[int] = 0
    beyond: ClassVar[int] = 0
    further: ClassVar[int] = 1

    def spaced(self, spacing: Spacing, total: int, steps: Any, offset: int, whole: bool = True) -> Floats:
        """Return the timesteps of ``steps`` rows, falling; see :func:`minidiff.schedule.spaced`."""
        return spaced(spacing, total, steps, offset, whole=whole)

    def landing(self, t: Tensor, apart: int) -> Tensor:
        """Return the timesteps, (n,), on which steps from ``t`` land: the next of them, and a negative one after the
        last. ``apart``: T // n."""
        return torch.cat([t[1:], (t[-1:] - apart).clamp(max=-1)])

    def trailing(self, total: int, last: int, n: int) -> Floats:
        """Return the upper ends, (n,) and falling, of ``n`` equal parts of the lowest ``last`` of ``total``
        timesteps."""
        t: Floats = np.arange(last, 0, -(last / n)).round()[:n] - 1
        return t

    def of_curve(self, t: Floats, cut: bool) -> Floats:
        """Return the timesteps, (n,), that the model is told on a curve, where training has its sigmas at ``t``.
        ``cut``: diffusers drops the fractions instead of rounding."""
        return t.astype(np.float32)


OWN = Grid()
