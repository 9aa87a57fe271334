"""SA-Solver: Adams' multistep methods for the reverse stochastic equation, with a corrector (Xue et al. 2023).

A family of equations leads from noise to the picture. Its parameter tau is the amount of fresh noise on the way: 0 for
none (the ordinary equation), 1 for as much as in DDPM. In lambda (levels.py) the solution for x0 is

    x_to = exp(-tau**2 h) * noise_to / noise * x  +  noise_to * sqrt(1 - exp(-2 tau**2 h)) * fresh noise
             + (1 + tau**2) * noise_to * exp(-tau**2 lambda_to) * integral of exp((1 + tau**2) u) x0(u) du

over u from lambda to lambda_to (equation 14). x0 under the integral is replaced by Lagrange's polynomial through the
latest outputs (Adams-Bashforth: the predictor), or also through the one at the new point (Adams-Moulton: the corrector,
which repeats the step over the interval with the same noise, once the model has been called there for the next step).
The integrals of u**k exp(u) have closed forms (appendix). Two values use a special weight, which is more accurate for
small h. epsilon can take the place of x0.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add, mul
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.samplers.arithmetic import lambda_of, meet, rates
from minidiff.samplers.checks import usable
from minidiff.samplers.levels import ClippedLambdas
from minidiff.samplers.method import Draw, Given, History, Levels, Next, Outputs, Plan
from minidiff.samplers.options import NotNegative, Rule
from minidiff.schedule import NoiseSchedule

HIGHEST = 4
UpTo4 = Annotated[int, Rule(lambda v: 1 <= v <= HIGHEST, f"must lie in 1..{HIGHEST}")]

Row = namedtuple("Row", "order correct_order tau x_coef fresh predict correct")
"""For the interval that begins at the row: ``tau``; a step is ``x_coef`` * x + ``fresh`` * noise + a sum over the
outputs, latest first, with weights ``predict`` or, the new output being the first, ``correct`` (n, 4, 4): the row, the
order less one, the output. ``order`` and ``correct_order``: the highest of each row."""


@dataclass(frozen=True, kw_only=True)
class SASolver(ClippedLambdas[Row, History]):
    """SA-Solver. Options: those of :class:`ClippedLambdas`; ``predictor_order`` and ``corrector_order``: 1 to 4
    outputs; ``algorithm``: combine x0 (data) or epsilon (noise); ``tau``, which applies where the timestep lies in
    ``tau_start``..``tau_end``, and is 0 elsewhere.
    """

    initial = History()

    predictor_order: UpTo4 = 2
    corrector_order: UpTo4 = 2
    algorithm: Literal["data_prediction", "noise_prediction"] = "data_prediction"
    tau: NotNegative = 1.0
    tau_start: float = 200.0
    tau_end: float = 800.0

    @property
    def predicts_x0(self) -> bool:
        return self.algorithm == "data_prediction"

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: History, draw: Draw) -> Next[History]:
        """Compute in the dtype of ``x``. Noise is drawn at every step, even if tau is 0."""
        # from the sample that the model saw, before its correction
        m = self.denoised(plan, i, x, out, state) if self.predicts_x0 else self.epsilon(plan, i, x, out)
        if state.base is not None and state.noise is not None:
            before = plan.at(i - 1)
            x = walk(before, state.base, state.noise, before.correct, (*state.outputs, m), state.order)
        outputs = (*state.outputs, m)[-max(self.predictor_order, self.corrector_order - 1) :]
        at, noise = plan.at(i), draw(out)
        after = walk(at, x, noise, at.predict, outputs, min(at.order, len(state.outputs) + 1))
        return after, History(outputs, x, noise, min(at.correct_order, len(state.outputs) + 2))

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        at = super().levels(schedule, given)
        return at._replace(put=self.grid.put_back(schedule.alphas_cumprod, at.timesteps))

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        n, t = len(at.here), at.timesteps
        (signal, noise), (to_signal, to_noise) = rates(at.here), rates(at.to)
        h = at.h
        tau = torch.where((t >= self.tau_start) & (t <= self.tau_end), self.tau, 0.0).to(torch.float32)
        if self.predicts_x0:
            x_coef = torch.exp(-(tau**2) * h) * (to_noise / noise)
            fresh = to_noise * torch.sqrt(1 - torch.exp(-2 * tau**2 * h))
        else:
            x_coef = to_signal / signal
            fresh = tau * to_noise * torch.sqrt(torch.exp(2 * h) - 1)
        left = [n - i if self.lower_order_final else HIGHEST for i in range(n)]  # number of remaining steps
        predict = tuple(min(self.predictor_order, k, i + 1) for i, k in enumerate(left))
        correct = tuple(min(self.corrector_order, k + 1, i + 2) for i, k in enumerate(left))
        return Row(
            order=predict,
            correct_order=correct,
            tau=tau,
            x_coef=x_coef,
            fresh=fresh,
            predict=self._weights(at, tau, predict, 0),
            correct=self._weights(at, tau, (*correct[:-1], 0), 1),  # the last interval is never corrected
        )

    def _weights(self, at: Levels, tau: Tensor, orders: tuple[int, ...], ahead: int) -> Tensor:
        """Return the weights of the outputs in steps of every order, (n, 4, 4); ``ahead`` is 1 for the corrector."""
        start, end, n = lambda_of(at.here), lambda_of(at.to), len(tau)
        to_signal, to_noise = rates(at.to)
        if self.predicts_x0:
            scale = (1 + tau**2) * to_noise * torch.exp(-(tau**2) * end)
        else:
            scale = -(1 + tau**2) * to_signal
        weights = torch.zeros(n, HIGHEST, HIGHEST, dtype=torch.float32, device="cpu")
        lambdas, now = torch.cat([start, end[-1:]]), torch.arange(n, device="cpu") + ahead
        for order in range(1, max(orders, default=0) + 1):
            points = [lambdas[(now - k).clamp(min=0)] for k in range(order)]
            integrals = [
                exponential_positive(k, start, end, tau) if self.predicts_x0 else exponential_negative(k, start, end)
                for k in reversed(range(order))
            ]
            parts = [reduce(add, map(mul, powers, integrals)) for powers in lagrange(points)]
            if order == 2 and self.predicts_x0:
                extra = second_order(start, end, tau, None if ahead else points[1])
                parts = [parts[0] + extra, parts[1] - extra]
            found = usable(self, orders, order, {str(k): scale * part for k, part in enumerate(parts)}, 1 + ahead)
            weights[:, order - 1, :order] = torch.stack(list(found.values()), dim=1)
        return weights


def walk(at: Row, x: Tensor, noise: Tensor, weights: Tensor, outputs: Outputs, order: int) -> Tensor:
    """Step from ``x`` over the interval of a row, with the ``weights`` (4, 4) of the latest ``order`` outputs."""
    total = weights[order - 1, 0] * outputs[-1]
    for k in range(1, order):
        total = total + weights[order - 1, k] * outputs[-k - 1]
    after: Tensor = at.x_coef * x + meet(total, x) + meet(at.fresh * noise, x)
    return after.to(x.dtype)


# --- weights: integrals over an interval of lambda, all (n,) ---------------------------------------------------------


def polynomial(k: int, u: Tensor, sign: int) -> Tensor:
    """Return u**k + sign k u**(k-1) + k (k-1) u**(k-2) + sign ..., up to k!."""
    total, factor = u**k, 1
    for power in reversed(range(k)):
        factor *= sign * (power + 1)
        total = total + factor * u**power
    return total


def exponential_negative(k: int, start: Tensor, end: Tensor) -> Tensor:
    """Integrate u**k exp(-u) from ``start`` to ``end``."""
    return torch.exp(-end) * (polynomial(k, start, 1) * torch.exp(end - start) - polynomial(k, end, 1))


def exponential_positive(k: int, start: Tensor, end: Tensor, tau: Tensor) -> Tensor:
    """Integrate u**k exp((1 + tau**2) u) from ``start`` to ``end``."""
    scale = 1 + tau**2
    a, b = scale * start, scale * end
    return torch.exp(b) * (polynomial(k, b, -1) - polynomial(k, a, -1) * torch.exp(-(b - a))) / scale ** (k + 1)


def second_order(start: Tensor, end: Tensor, tau: Tensor, before: Tensor | None) -> Tensor:
    """Return the amount moved from the second of two weights to the first. ``before``: the earlier lambda for the
    predictor, None for the corrector."""
    scale, h = 1 + tau**2, end - start
    lead, rest = 1.0 * torch.exp(scale * end), h * scale - 1 + torch.exp(scale * -h)
    if before is None:
        return lead * (h / 2 - rest / (scale**2 * h))
    return lead * (h**2 / 2 - rest / scale**2) / (start - before)


def lagrange(points: list[Tensor]) -> list[list[Tensor]]:
    """Return, for each of one to four ``points``, the coefficients (highest power first) of the polynomial that is 1
    there and 0 at the others."""
    if len(points) == 1:
        return [[torch.ones_like(points[0])]]
    polynomials = []
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        below = reduce(mul, [point - p for p in others])
        above: list[Any] = [1]  # of the product of all (u - p): (-1)**k times the sum of the products of k of the p
        for k in range(1, len(points)):
            above.append((-1) ** k * reduce(add, [reduce(mul, some) for some in combinations(others, k)]))
        polynomials.append([value / below for value in above])
    return polynomials
