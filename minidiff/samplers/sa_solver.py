"""SA-Solver: Adams' multistep methods for the reverse stochastic equation, with a corrector (Xue et al. 2023).

A whole family of equations leads from noise to the picture; tau says how much fresh noise goes in on the way, 0 for
none (the ordinary equation) and 1 for as much as DDPM. In lambda (``lambda_plan.py``) the solution for x0 is

    x_next = exp(-tau**2 h) * noise_next / noise * x  +  noise_next * sqrt(1 - exp(-2 tau**2 h)) * fresh noise
             + (1 + tau**2) * noise_next * exp(-tau**2 lambda_next) * integral of exp((1 + tau**2) u) x0(u) du

over u from lambda to lambda_next (equation 14). x0 under the integral becomes Lagrange's polynomial through the latest
outputs (Adams and Bashforth: the predictor) or through the one at the new point as well (Adams and Moulton: the
corrector, which walks the interval once more with the same noise, when the model has been asked there for the next
step anyway). The integrals of u**k exp(u) are known (appendix). Two values have a weight of their own, more accurate
for small h. The same can be done with epsilon in the place of x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, mul
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.dpm_solver import meet
from minidiff.samplers.lambda_plan import LambdaPlan, LambdaSpacing, lambda_rows, unclipped, usable
from minidiff.schedule import NoiseSchedule, epsilon_from_x0, to_epsilon, to_x0, x0_from_epsilon

HIGHEST = 4


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SASolverPlan(LambdaPlan):
    """Rows, for the interval that begins there: ``tau``; a step is ``x_coef`` * x + ``fresh`` * noise + a sum over the
    outputs, latest first, with weights ``predict`` or, the new output being the first, ``correct`` (4, 4, n): the
    order less one, the output, the row. ``predict_orders`` and ``correct_orders``: the highest order of each row."""

    tau: Tensor
    x_coef: Tensor
    fresh: Tensor
    predict: Tensor
    correct: Tensor
    predict_orders: tuple[int, ...]
    correct_orders: tuple[int, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        most = [min(order, i + 1) for i, order in enumerate(self.predict_orders)]
        own: dict[str, Tensor | Sequence[Any]] = {"order": most, "tau": self.tau, "x_coef": self.x_coef}
        return super().columns() | own | {"fresh": self.fresh}


class SASolverState(NamedTuple):
    """The latest outputs, oldest first; the (corrected) sample at the last row, the noise of the step from there, and
    the order with which it is to be corrected."""

    outputs: tuple[Tensor, ...] = ()
    base: Tensor | None = None
    noise: Tensor | None = None
    order: int = 0


@dataclass(frozen=True, kw_only=True)
class SASolver(LambdaSpacing):
    """``predictor_order`` and ``corrector_order``: 1 to 4 outputs. ``algorithm``: combine x0 (data) or epsilon (noise).
    ``tau`` applies where the timestep lies in ``tau_start``..``tau_end``, and is 0 elsewhere. ``lambda_min_clipped``:
    timesteps of lower lambda are left out (with spacing by timesteps only).

    ``like_diffusers``: see :class:`LambdaSpacing`; the last sigma of karras, exponential and beta is there twice, so
    that the last step does nothing; and noise is added to a picture by the alpha_bar of a whole timestep.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    algorithm: Literal["data_prediction", "noise_prediction"] = "data_prediction"
    tau: float = 1.0
    tau_start: float = 200.0
    tau_end: float = 800.0
    lambda_min_clipped: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.tau >= 0, f"tau={self.tau} must not be negative")
        for name, order in (("predictor_order", self.predictor_order), ("corrector_order", self.corrector_order)):
            check(1 <= order <= HIGHEST, f"{name}={order} must lie in 1..{HIGHEST}")

    @property
    def predicts_x0(self) -> bool:
        return self.algorithm == "data_prediction"

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> SASolverPlan:
        """``steps`` in 1..T, or ``sigmas``: falling, one more than there are to be steps, which the reference does
        not take."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        last = unclipped(schedule, self.last_alpha_bar, self.lambda_min_clipped)
        t, s = self.levels(schedule, steps, sigmas=sigmas, last=last, final="repeated")
        n = len(t)
        rows = lambda_rows(t, s, schedule.prediction)
        if self.like_diffusers:
            rows |= {"alpha_bars": schedule.alphas_cumprod[t], "noise_by_timestep": True}
        signal, noise, h = rows["signal"], rows["noise"], rows["h"]
        tau = torch.where((t >= self.tau_start) & (t <= self.tau_end), self.tau, 0.0).to(torch.float32)
        if self.predicts_x0:
            rows["x_coef"] = torch.exp(-(tau**2) * h) * (noise[1:] / noise[:-1])
            rows["fresh"] = noise[1:] * torch.sqrt(1 - torch.exp(-2 * tau**2 * h))
        else:
            rows["x_coef"] = signal[1:] / signal[:-1]
            rows["fresh"] = tau * noise[1:] * torch.sqrt(torch.exp(2 * h) - 1)
        ends = self.lower_order_final
        predict = tuple(min(self.predictor_order, n - i) if ends else self.predictor_order for i in range(n))
        correct = tuple(min(self.corrector_order, n - i + 1) if ends else self.corrector_order for i in range(n))
        return SASolverPlan(
            **rows,
            tau=tau,
            predict=self._weights(rows, tau, predict, 0),
            correct=self._weights(rows, tau, (*correct[:-1], 0), 1),  # the last interval is never walked again
            predict_orders=predict,
            correct_orders=correct,
        )

    def _weights(self, rows: dict[str, Any], tau: Tensor, orders: tuple[int, ...], ahead: int) -> Tensor:
        """(4, 4, n): what the outputs are multiplied by in steps of every order, ``ahead`` 1 for the corrector."""
        lambdas, n = rows["lambdas"], len(tau)
        start, end = lambdas[:-1], lambdas[1:]
        if self.predicts_x0:
            scale = (1 + tau**2) * rows["noise"][1:] * torch.exp(-(tau**2) * end)
        else:
            scale = -(1 + tau**2) * rows["signal"][1:]
        weights = torch.zeros(HIGHEST, HIGHEST, n, dtype=torch.float32, device="cpu")
        now = torch.arange(n, device="cpu") + ahead
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
            coefs = {str(k): scale * part for k, part in enumerate(parts)}
            found = usable(self, orders, order, coefs, 1 + ahead)
            weights[order - 1, :order] = torch.stack(list(found.values()))
        return weights

    def start(self) -> SASolverState:
        return SASolverState()

    def scale_input(self, plan: SASolverPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: SASolverPlan, i: int, x: Tensor, out: Tensor, state: SASolverState) -> Tensor:
        """From the sample that the model saw, before its correction."""
        return self.limit(to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i]))

    def step(
        self, plan: SASolverPlan, i: int, x: Tensor, out: Tensor, state: SASolverState, draw: Draw
    ) -> tuple[Tensor, SASolverState]:
        """Everything in the dtype of ``x``. Noise is drawn at every step, also where tau is 0."""
        m = self._convert(plan, i, x, out, state)
        if state.base is not None and state.noise is not None:
            weights = plan.correct[state.order - 1]
            x = walk(plan, i - 1, state.base, state.noise, weights, (*state.outputs, m), state.order)
        outputs = (*state.outputs, m)[-max(self.predictor_order, self.corrector_order - 1) :]
        noise = draw(out)
        order = min(plan.predict_orders[i], len(state.outputs) + 1)
        after = walk(plan, i, x, noise, plan.predict[order - 1], outputs, order)
        return after, SASolverState(outputs, x, noise, min(plan.correct_orders[i], len(state.outputs) + 2))

    def _convert(self, plan: SASolverPlan, i: int, x: Tensor, out: Tensor, state: SASolverState) -> Tensor:
        if self.predicts_x0:
            return self.denoised(plan, i, x, out, state)
        signal, noise = plan.signal[i], plan.noise[i]
        epsilon = to_epsilon(plan.prediction, x, out, signal, noise)
        if self.threshold is None:
            return epsilon
        return epsilon_from_x0(x, self.limit(x0_from_epsilon(x, epsilon, signal, noise)), signal, noise)


def walk(
    plan: SASolverPlan, i: int, x: Tensor, noise: Tensor, weights: Tensor, outputs: tuple[Tensor, ...], order: int
) -> Tensor:
    """The interval of row ``i`` from ``x``, with the ``weights`` (4, n) of the latest ``order`` outputs."""
    total = weights[0, i] * outputs[-1]
    for k in range(1, order):
        total = total + weights[k, i] * outputs[-k - 1]
    return (plan.x_coef[i] * x + meet(total, x) + meet(plan.fresh[i] * noise, x)).to(x.dtype)


# --- weights: integrals over an interval of lambda, all (n,) ---------------------------------------------------------


def exponential_negative(k: int, start: Tensor, end: Tensor) -> Tensor:
    """The integral of u**k exp(-u) from ``start`` to ``end``."""
    polynomials: list[Callable[[Tensor], Tensor]] = [
        lambda u: torch.ones_like(u),
        lambda u: u + 1,
        lambda u: u**2 + 2 * u + 2,
        lambda u: u**3 + 3 * u**2 + 6 * u + 6,
    ]
    p = polynomials[k]
    return torch.exp(-end) * (p(start) * torch.exp(end - start) - p(end))


def exponential_positive(k: int, start: Tensor, end: Tensor, tau: Tensor) -> Tensor:
    """The integral of u**k exp((1 + tau**2) u) from ``start`` to ``end``."""
    polynomials: list[Callable[[Tensor], Tensor]] = [
        lambda u: torch.ones_like(u),
        lambda u: u - 1,
        lambda u: u**2 - 2 * u + 2,
        lambda u: u**3 - 3 * u**2 + 6 * u - 6,
    ]
    p, scale = polynomials[k], 1 + tau**2
    a, b = scale * start, scale * end
    return torch.exp(b) * (p(b) - p(a) * torch.exp(-(b - a))) / scale ** (k + 1)


def second_order(start: Tensor, end: Tensor, tau: Tensor, before: Tensor | None) -> Tensor:
    """What goes from the second of two weights to the first; ``before`` is the earlier lambda of the predictor, None
    for the corrector."""
    scale, h = 1 + tau**2, end - start
    lead, rest = 1.0 * torch.exp(scale * end), h * scale - 1 + torch.exp(scale * -h)
    if before is None:
        return lead * (h / 2 - rest / (scale**2 * h))
    return lead * (h**2 / 2 - rest / scale**2) / (start - before)


def lagrange(points: list[Tensor]) -> list[list[Tensor]]:
    """For each of one to four ``points`` the coefficients, highest power first, of the polynomial that is 1 there and 0
    at the others."""
    polynomials = []
    for i, point in enumerate(points):
        others = [p for k, p in enumerate(points) if k != i]
        if not others:
            return [[torch.ones_like(point)]]
        below = reduce(mul, [point - p for p in others])
        above: list[Any] = [1]
        if len(others) == 1:
            above += [-others[0]]
        elif len(others) == 2:
            a, b = others
            above += [-a - b, a * b]
        else:
            a, b, c = others
            above += [-a - b - c, a * b + a * c + b * c, -a * b * c]
        polynomials.append([value / below for value in above])
    return polynomials
