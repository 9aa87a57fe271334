"""Grids: the timesteps that a run visits, and curves through sigma, as arrays of numbers.

The training schedule defines one alpha_bar, and so one sigma, for every timestep. A run of n steps visits n of those
levels (``spaced`` in schedule.py: leading, trailing, linspace), or levels between them that follow a curve in sigma:
karras, exponential, beta. The computation is done by numpy on the host, in float64 where the reference uses float64.
``table`` is the training schedule's sigma at every timestep, rising: sqrt((1 - alpha_bar) / alpha_bar).

:class:`Grid` holds the choices that diffusers makes otherwise; its own are in diffusers/grid.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.arithmetic import Put, earlier
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


def log_linear(table: Floats, n: int) -> Floats:
    """Return (n,) float32 from the highest to the lowest of ``table``, evenly spaced in log sigma."""
    high, low = float(np.log(table[-1])), float(np.log(table[0]))
    sigmas: Floats = torch.linspace(high, low, n, dtype=torch.float32, device="cpu").exp().numpy()
    return sigmas


CURVES: dict[str, Callable[[float, float, int], Floats]] = {"karras": karras, "exponential": exponential, "beta": beta}
"""Every :data:`SigmaSpacing` but "timesteps": (low, high, n) -> (n,) float64, falling."""


def given_sigmas(sigmas: Sequence[float]) -> Floats:
    """Return given sigmas as (n + 1,) float32. Raises ConfigError unless they are two or more, fall strictly, and are
    above 0 except for the last, which may be 0."""
    levels: Floats = np.array(sigmas, dtype=np.float32)
    check(levels.ndim == 1 and len(levels) >= 2, f"sigmas={list(sigmas)[:6]}: at least 2 are needed, for one step")
    falls = bool(np.all(levels[:-1] > levels[1:])) and float(levels[-1]) >= 0
    check(falls and bool(np.isfinite(levels).all()), f"sigmas must fall strictly to 0 or above, got {list(sigmas)[:6]}")
    return levels


class Grid:
    """The choices of minidiff. ``lowest``: the lowest timestep that a row may have. ``beyond``: number of timesteps
    above training's last that the methods in sigma accept. ``further``: points of a curve in excess of the rows, on
    which the last step lands if that is not sigma 0."""

    lowest: ClassVar[int] = 0
    beyond: ClassVar[int] = 0
    further: ClassVar[int] = 1

    # --- timesteps: t (n,) are those of the rows, falling; apart: T // n ---

    def spaced(
        self, spacing: Spacing, total: int, steps: Any, offset: int, dtype: type[np.generic] = np.int64
    ) -> Floats:
        """Return the timesteps of ``steps`` rows, falling; see :func:`minidiff.schedule.spaced`."""
        return spaced(spacing, total, steps, offset, dtype=dtype)

    def landing(self, t: Tensor, apart: int) -> Tensor:
        """Return the timesteps, (n,), on which steps from ``t`` land: the next of them, and a negative one after the
        last."""
        return torch.cat([t[1:], (t[-1:] - apart).clamp(max=-1)])

    def middle(self, t: Tensor, apart: int) -> Tensor:
        """Return the timesteps, (n - 1,), half-way between those of ``t``."""
        return t[1:] + (t[:-1] - t[1:]) // 2

    def halfway(self, t: Tensor, apart: int) -> Tensor:
        """Return the timesteps, (n,), on which half a step from ``t`` lands, where the half-way ones are rows too."""
        return self.landing(t, apart)

    def above(self, t: Tensor, apart: int, total: int) -> Tensor:
        """Return the timesteps, (n,), of ``total``, from which a step lands on ``t``."""
        return earlier(t)

    def cut(self, t: Floats, kept: int) -> tuple[Floats, bool]:
        """Return the lowest ``kept`` of ``t``, and True if the last of them is not recognized as the last."""
        return t[len(t) - kept :], False

    # --- points that divide training, and curves in sigma ---

    def trailing(self, total: int, last: int, n: int) -> Floats:
        """Return the upper ends, (n,) and falling, of ``n`` equal parts of the lowest ``last`` of ``total``
        timesteps."""
        t: Floats = np.arange(last, 0, -(last / n)).round()[:n] - 1
        return t

    def ends(
        self, name: str, sigma_min: float | None, sigma_max: float | None, table: Floats, rises: bool = False
    ) -> tuple[float, float]:
        """Return the lowest and highest sigma of a curve: as set by the options, else those of rising ``table``.
        ``rises``: the run leads from the picture to noise. Raises ConfigError if the highest is not above the lowest,
        with the ``name`` of the method."""
        low = float(table[0]) if sigma_min is None else sigma_min
        high = float(table[-1]) if sigma_max is None else sigma_max
        check(low <= high, f"{name}: sigma_min={low:g} is above sigma_max={high:g}")
        return low, high

    def of_curve(self, t: Floats, cut: bool, rises: bool = False) -> Floats:
        """Return the timesteps, (n,), that the model is told on a curve, where training has its sigmas at ``t``.
        ``cut``: diffusers drops the fractions instead of rounding."""
        return t.astype(np.float32)

    def log_linear(self, t: Floats, table: Floats, given: bool) -> tuple[Floats, Floats]:
        """Return the timesteps and sigmas of rows that are even in log sigma over all of training, as many as ``t``.
        Raises ConfigError if ``t`` was ``given``."""
        check(not given, "Euler: interpolation='log_linear' has timesteps of its own: give steps or sigmas")
        sigmas = log_linear(table, len(t))
        return to_timesteps(sigmas, table), sigmas

    # --- two model calls an interval ---

    def at_ends(self, t: Floats, kind: str) -> Floats:
        """Return the timesteps that DPM2 tells the model at the ends of the intervals, where those of the sigmas are
        ``t`` and the curve is ``kind``."""
        return t

    def in_halves(self, t: Tensor, listed: Tensor) -> tuple[Tensor, Put | None]:
        """Return the timesteps of the rows and where a picture is put back, for float64 ``t`` and the sigmas that
        diffusers lists."""
        return t.float(), None

    def put_back(self, alpha_bar: Tensor, t: Tensor) -> Put | None:
        """Return where a picture is put back at timesteps ``t`` of a schedule in lambda, if not at their sigmas."""
        return None

    # --- models trained in sigma ---

    def given(self, sigmas: Sequence[float], run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sigmas, (n + 1,) float32, of a run over given ``sigmas``. ``run`` returns the run over places
        between sigma_max (0) and sigma_min (1)."""
        return torch.from_numpy(given_sigmas(sigmas))

    def highest(self, sigmas: Tensor, sigma_max: float, given: bool) -> float:
        """Return the sigma of the first noise of a run over ``sigmas``, which may be ``given``."""
        return sigmas[0].item() if given else sigma_max


OWN = Grid()
