"""Which noise levels to visit: the spacings of sigma, and the way back from a sigma to the timestep it belongs to.

All of this is numpy on the host, in float64 where the reference has float64. ``table`` is the training schedule's
sigma at every timestep, rising: sqrt((1 - alpha_bar) / alpha_bar).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minidiff.config import check
from minidiff.samplers.betainc import inverse_betainc
from minidiff.schedule import NoiseSchedule

Floats = NDArray[Any]
SigmaSpacing = Literal["timesteps", "karras", "exponential", "beta"]


def sigma_table(schedule: NoiseSchedule, last_alpha_bar: float) -> Floats:
    """(T,) float32. Where the schedule ends in pure noise (zero terminal SNR), sigma would be infinite:
    ``last_alpha_bar`` stands in for the 0."""
    alpha_bar = schedule.alphas_cumprod.clone()
    if alpha_bar[-1] == 0:
        alpha_bar[-1] = last_alpha_bar
    sigmas: Floats = (((1 - alpha_bar) / alpha_bar) ** 0.5).numpy()
    return sigmas


def at_timesteps(timesteps: Floats, table: Floats) -> Floats:
    """(n,) float64: ``table`` interpolated at float32 ``timesteps``."""
    sigmas: Floats = np.interp(timesteps, np.arange(len(table)), table)
    return sigmas


def karras(low: float, high: float, n: int, rho: float = 7.0) -> Floats:
    """(n,) float64 falling from ``high`` to ``low``, evenly spaced in sigma**(1/rho) (Karras et al. 2022, eq. 5)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    sigmas: Floats = (a + np.linspace(0, 1, n) * (b - a)) ** rho
    return sigmas


def exponential(low: float, high: float, n: int) -> Floats:
    """(n,) float64 falling from ``high`` to ``low``, evenly spaced in log sigma."""
    sigmas: Floats = np.exp(np.linspace(math.log(high), math.log(low), n))
    return sigmas


def lu(table: Floats, n: int) -> Floats:
    """(n,) float64 falling over all of ``table``, evenly spaced in lambda = -log sigma (Lu et al. 2022): as
    :func:`exponential`, from logarithms in float32."""
    high, low = float(np.log(table[-1:])[0]), float(np.log(table[:1])[0])
    sigmas: Floats = np.exp(high + np.linspace(0, 1, n) * (low - high))
    return sigmas


def beta(low: float, high: float, n: int, a: float = 0.6, b: float = 0.6) -> Floats:
    """(n,) float64 falling from ``high`` to ``low`` at the quantiles of a Beta(a, b) distribution, which puts more
    steps at both ends (Lee et al. 2024, "Beta Sampling is All You Need")."""
    sigmas: Floats = low + inverse_betainc(a, b, 1 - np.linspace(0, 1, n)) * (high - low)
    return sigmas


CURVES: dict[str, Callable[[float, float, int], Floats]] = {"karras": karras, "exponential": exponential, "beta": beta}
"""Every :data:`SigmaSpacing` but "timesteps": (low, high, n) -> (n,) float64, falling."""


def given(sigmas: Sequence[float]) -> Floats:
    """(n + 1,) float32. Raises ConfigError unless they are two or more, fall strictly, and stay above 0 up to the
    last, which may be 0."""
    levels: Floats = np.array(sigmas, dtype=np.float32)
    check(levels.ndim == 1 and len(levels) >= 2, f"sigmas={list(sigmas)[:6]}: at least 2 are needed, for one step")
    falls = bool(np.all(levels[:-1] > levels[1:])) and float(levels[-1]) >= 0
    check(falls and bool(np.isfinite(levels).all()), f"sigmas must fall strictly to 0 or above, got {list(sigmas)[:6]}")
    return levels


def to_timesteps(sigmas: Floats, table: Floats) -> Floats:
    """(n,) float64: the fractional timesteps at which ``table`` has these sigmas, by interpolation in log sigma.

    Below and above the table it is the first and the last timestep."""
    logs = np.log(table)
    log_sigma = np.log(np.maximum(sigmas, np.asarray(1e-10, dtype=sigmas.dtype)))
    below = np.cumsum(log_sigma[None] - logs[:, None] >= 0, axis=0).argmax(axis=0).clip(max=len(table) - 2)
    low, high = logs[below], logs[below + 1]
    share = np.clip((low - log_sigma) / (low - high), 0, 1)
    t: Floats = (1 - share) * below + share * (below + 1)
    return t
