"""Quantiles of the Beta(a, b) distribution in float64, without scipy, for sampler plans with "beta" spacing.

I_x(a, b), the regularised incomplete beta function, is the probability that a Beta(a, b) variable is below x
(Abramowitz & Stegun 26.5). It is evaluated by a series (26.5.4), which converges fast for x < (a + 1) / (a + b + 2);
beyond that, I_x(a, b) = 1 - I_{1-x}(b, a). It is inverted by Newton's method on the logarithms, where the curve is
nearly a straight line.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TINY = 1e-300


def betainc(a: float, b: float, x: Any) -> Floats:
    """Return I_x(a, b) for a, b > 0 and x in 0..1, any shape."""
    x = np.asarray(x, dtype=np.float64)
    split = (a + 1) / (a + b + 2)
    upper = x > split
    lower_value = _lower(a, b, np.where(upper, split, x))
    upper_value = 1 - _lower(b, a, np.where(upper, 1 - x, 1 - split))
    return np.where(upper, upper_value, lower_value)


def inverse_betainc(a: float, b: float, p: Any) -> Floats:
    """Return the x in 0..1 with I_x(a, b) = p, for p in 0..1 of any shape: the quantile function of Beta(a, b)."""
    p = np.asarray(p, dtype=np.float64)
    split = (a + 1) / (a + b + 2)
    upper = p > betainc(a, b, split)
    # each half is inverted from its own end, where 1 - x keeps its digits
    low = _invert_lower(a, b, np.where(upper, 0.0, p), split)
    high = _invert_lower(b, a, np.where(upper, 1 - p, 0.0), 1 - split)
    found = np.where(upper, 1 - high, low)
    # By symmetry the median is 1/2 if a = b, which processors miss by a bit or two, and a level half-way between two
    # others is rounded by it. The reference's scipy gives the number after 1/2.
    return np.where((p == 0.5) & (a == b), np.nextafter(0.5, 1.0), found)


def _log_front(a: float, b: float, x: Floats) -> Floats:
    """Return the logarithm of x**a (1-x)**b / B(a, b)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    value: Floats = a * np.log(np.maximum(x, TINY)) + b * np.log1p(-x) - log_beta
    return value


def _lower(a: float, b: float, x: Floats) -> Floats:
    """Return I_x(a, b) where the series converges fast: 0 <= x <= (a + 1) / (a + b + 2)."""
    value: Floats = np.where(x > 0, np.exp(_log_front(a, b, x)) / a * _series(a, b, x), 0.0)
    return value


def _series(a: float, b: float, x: Floats) -> Floats:
    """Return 1 + r_0 x (1 + r_1 x (1 + ...)) with r_k = (a + b + k) / (a + 1 + k), to float64's precision."""
    ratios: list[float] = []
    term, highest = 1.0, float(x.max(initial=0))
    while term > 1e-17:
        ratios.append((a + b + len(ratios)) / (a + 1 + len(ratios)))
        term *= ratios[-1] * highest
    total = np.ones_like(x)
    for ratio in reversed(ratios):
        total = 1 + ratio * x * total
    return total


def _invert_lower(a: float, b: float, p: Floats, split: float) -> Floats:
    """Return the x in 0..split with I_x(a, b) = p, for p up to I_split; 0 where p is 0."""
    positive = np.where(p > 0, p, 1e-3)
    log_p = np.log(positive)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    # near 0, I_x is x**a / (a B): the first guess
    log_x = np.minimum((log_p + math.log(a) + log_beta) / a, math.log(split))
    for _ in range(100):
        x = np.exp(log_x)
        series = _series(a, b, x)
        log_value = _log_front(a, b, x) - math.log(a) + np.log(series)
        slope = a / ((1 - x) * series)  # d log I / d log x
        stepped = np.minimum(log_x + (log_p - log_value) / slope, math.log(split))
        done = bool(np.all(np.abs(stepped - log_x) <= 1e-14 * np.maximum(1, np.abs(log_x))))
        log_x = stepped
        if done:
            break
    x = np.exp(log_x)
    for _ in range(2):  # the exponential costs a few digits: refine the root itself
        density = np.exp(_log_front(a, b, x)) / (x * (1 - x))
        x = x - (_lower(a, b, x) - positive) / density
    return np.where(p > 0, x, 0.0)
