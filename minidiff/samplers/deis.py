"""DEIS: exponential integration with a polynomial in log rho (Zhang & Chen 2023, "Fast Sampling of Diffusion Models").

With rho = noise / signal (sigma, as it is called elsewhere), the sample divided by its signal moves by

    d (x / signal) = epsilon d rho

DEIS replaces epsilon by the polynomial in log rho through its latest one to three values ("log-rho", section 4 and
appendix). Each of them then counts with the integral, over the step, of Lagrange's polynomial in log rho:

    2 values: integral of (log t - log c) / (log b - log c) dt        = t (log t - log c - 1) / (log b - log c)
    3 values: integral of (log t - log c)(log t - log d) / ((log b - log c)(log b - log d)) dt

A log rho has no value at rho 0: the last step lands on the smallest sigma of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.dpm_solver import History
from minidiff.samplers.lambda_plan import LambdaOptions, LambdaPlan, highest_orders, lambda_rows, usable
from minidiff.schedule import NoiseSchedule, epsilon_from_x0, to_x0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DEISPlan(LambdaPlan):
    """A step of order 1 is ``x_coef`` * x + ``e_coef`` * epsilon. One of order 2 is ``to_signal`` * (x /
    ``from_signal`` + ``a1`` * epsilon + ``a2`` * the one before), and of order 3 the same with ``b1``, ``b2``,
    ``b3``. ``orders``: the highest order of each row."""

    x_coef: Tensor
    e_coef: Tensor
    to_signal: Tensor
    from_signal: Tensor
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    b3: Tensor
    orders: tuple[int, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        most = [min(order, i + 1) for i, order in enumerate(self.orders)]
        own: dict[str, Tensor | Sequence[Any]] = {"order": most, "x_coef": self.x_coef, "e_coef": self.e_coef}
        return super().columns() | own


@dataclass(frozen=True, kw_only=True)
class DEIS(LambdaOptions):
    """The options are those of :class:`LambdaOptions`. ``lower_order_final``: with fewer than 15 steps the last two are
    of order 1 and 2 at most.

    ``like_diffusers``: see :class:`LambdaOptions`; the last sigma of karras, exponential and beta is there twice, so
    that the last step does nothing.
    """

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DEISPlan:
        """``steps`` in 1..T, or ``sigmas``: falling, one more than there are to be steps, which the reference does
        not take."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, s = self.levels(schedule, steps, sigmas=sigmas, final="repeated")
        rows = lambda_rows(t, s, schedule.prediction)
        orders = highest_orders(len(t), self.solver_order, self.lower_order_final, first_at_last=False)
        for order, coefs in enumerate(coefficients(rows["signal"], rows["noise"], rows["h"]), 1):
            rows |= usable(self, orders, order, coefs)
        return DEISPlan(**rows, orders=orders)

    def start(self) -> History:
        return History()

    def scale_input(self, plan: DEISPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: DEISPlan, i: int, x: Tensor, out: Tensor, state: History) -> Tensor:
        return self.limit(to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i]))

    def step(
        self, plan: DEISPlan, i: int, x: Tensor, out: Tensor, state: History, draw: Draw
    ) -> tuple[Tensor, History]:
        """Everything in the dtype of ``x``; epsilon is made of x0, also where the model predicts it."""
        m = epsilon_from_x0(x, self.denoised(plan, i, x, out, state), plan.signal[i], plan.noise[i])
        outputs = (*state.outputs, m)[-self.solver_order :]
        order = min(plan.orders[i], len(outputs))
        if order == 1:
            return plan.x_coef[i] * x - plan.e_coef[i] * m, History(outputs)
        if order == 2:
            move = x / plan.from_signal[i] + plan.a1[i] * m + plan.a2[i] * outputs[-2]
        else:
            move = x / plan.from_signal[i] + plan.b1[i] * m + plan.b2[i] * outputs[-2] + plan.b3[i] * outputs[-3]
        return plan.to_signal[i] * move, History(outputs)


def coefficients(signal: Tensor, noise: Tensor, h: Tensor) -> list[dict[str, Tensor]]:
    """The rows of :class:`DEISPlan` for steps of order 1, 2 and 3, from ``signal`` and ``noise`` (n + 1,)."""
    rho = noise / signal
    to, s0 = rho[1:], rho[:-1]
    s1 = torch.cat([s0[:1], s0[:-1]])  # the first rows, which have no history, are there to keep the length
    s2 = torch.cat([s1[:1], s1[:-1]])

    def over(*points: Tensor) -> Tensor:
        """The integral from s0 to the next rho of the polynomial that is 1 at the first point and 0 at the others."""
        integral = integral_of_two if len(points) == 2 else integral_of_three
        return integral(to, *points) - integral(s0, *points)

    return [
        {
            "x_coef": signal[1:] / signal[:-1],
            "e_coef": noise[1:] * (torch.exp(h) - 1.0),
            "to_signal": signal[1:],
            "from_signal": signal[:-1],
        },
        {"a1": over(s0, s1), "a2": over(s1, s0)},
        {"b1": over(s0, s1, s2), "b2": over(s1, s2, s0), "b3": over(s2, s0, s1)},
    ]


def integral_of_two(t: Tensor, b: Tensor, c: Tensor) -> Tensor:
    log_b, log_c, log_t = log(b), log(c), log(t)
    return t * (-log_c + log_t - 1) / (log_b - log_c)


def integral_of_three(t: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    log_b, log_c, log_d, log_t = log(b), log(c), log(d), log(t)
    cross = log_c * (log_d - log_t + 1) - log_d * log_t + log_d
    return t * (cross + log_t**2 - 2 * log_t + 2) / ((log_b - log_c) * (log_b - log_d))


def log(x: Tensor) -> Tensor:
    """numpy's logarithm, in float32 as torch's, with other last bits."""
    return torch.from_numpy(np.log(x.numpy()))
