"""DEIS: exponential integration with a polynomial in log rho (Zhang & Chen 2023, "Fast Sampling of Diffusion Models").

With rho = noise / signal (called sigma elsewhere), the sample divided by its signal changes by

    d (x / signal) = epsilon d rho

DEIS replaces epsilon by the polynomial in log rho through its latest one to three values ("log-rho", section 4 and
appendix). The weight of each value is the integral, over the step, of Lagrange's polynomial in log rho:

    2 values: integral of (log t - log c) / (log b - log c) dt        = t (log t - log c - 1) / (log b - log c)
    3 values: integral of (log t - log c)(log t - log d) / ((log b - log c)(log b - log d)) dt

log rho is not defined at rho 0, so the last step lands on the smallest sigma of training.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.samplers.arithmetic import earlier, rates
from minidiff.samplers.checks import usable
from minidiff.samplers.dpm_solver import highest_orders
from minidiff.samplers.levels import Lambdas
from minidiff.samplers.method import Draw, Levels, Next, Outputs, Plan
from minidiff.samplers.options import UpTo3
from minidiff.schedule import epsilon_from_x0

Row = namedtuple("Row", "order x_coef e_coef to_signal from_signal a1 a2 b1 b2 b3")
"""A step of order 1 is ``x_coef`` * x + ``e_coef`` * epsilon. One of order 2 is ``to_signal`` * (x / ``from_signal`` +
``a1`` * epsilon + ``a2`` * the one before), and of order 3 the same with ``b1``, ``b2``, ``b3``. ``order``: the highest
of each row."""


@dataclass(frozen=True, kw_only=True)
class DEIS(Lambdas[Row, Outputs]):
    """DEIS sampler. Options: those of :class:`Lambdas`, and ``solver_order``, the number of latest outputs that a step
    uses. ``lower_order_final``: with fewer than 15 steps the last two are of order 2 and 1 at most.
    """

    solver_order: UpTo3 = 2

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw) -> Next[Outputs]:
        """Compute in the dtype of ``x``. epsilon is derived from x0, even if the model predicts epsilon."""
        at = plan.at(i)
        m = epsilon_from_x0(x, self.denoised(plan, i, x, out, state), plan.signal[i], plan.noise[i])
        outputs = (*state, m)[-self.solver_order :]
        order = min(at.order, len(outputs))
        if order == 1:
            return at.x_coef * x - at.e_coef * m, outputs
        if order == 2:
            move = x / at.from_signal + at.a1 * m + at.a2 * outputs[-2]
        else:
            move = x / at.from_signal + at.b1 * m + at.b2 * outputs[-2] + at.b3 * outputs[-3]
        return at.to_signal * move, outputs

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        orders = highest_orders(len(at.here), self.solver_order, self.lower_order_final, first_at_last=False)
        (signal, noise), (to_signal, to_noise) = rates(at.here), rates(at.to)
        to, s0 = to_noise / to_signal, noise / signal
        s1 = earlier(s0)  # the first rows have no history, and only keep the length
        s2 = earlier(s1)

        def over(*points: Tensor) -> Tensor:
            """Integrate, from s0 to the next rho, the polynomial that is 1 at the first point and 0 at the others."""
            integral = integral_of_two if len(points) == 2 else integral_of_three
            return integral(to, *points) - integral(s0, *points)

        first = {"x_coef": to_signal / signal, "e_coef": to_noise * (torch.exp(at.h) - 1.0)}
        return Row(
            orders,
            **usable(self, orders, 1, first | {"to_signal": to_signal, "from_signal": signal}),
            **usable(self, orders, 2, {"a1": over(s0, s1), "a2": over(s1, s0)}),
            **usable(self, orders, 3, {"b1": over(s0, s1, s2), "b2": over(s1, s2, s0), "b3": over(s2, s0, s1)}),
        )


def integral_of_two(t: Tensor, b: Tensor, c: Tensor) -> Tensor:
    log_b, log_c, log_t = log(b), log(c), log(t)
    return t * (-log_c + log_t - 1) / (log_b - log_c)


def integral_of_three(t: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    log_b, log_c, log_d, log_t = log(b), log(c), log(d), log(t)
    cross = log_c * (log_d - log_t + 1) - log_d * log_t + log_d
    return t * (cross + log_t**2 - 2 * log_t + 2) / ((log_b - log_c) * (log_b - log_d))


def log(x: Tensor) -> Tensor:
    """Return numpy's float32 logarithm, whose last bits differ from torch's."""
    return torch.from_numpy(np.log(x.numpy()))
