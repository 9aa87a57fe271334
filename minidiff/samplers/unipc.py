"""UniPC: a predictor and a corrector that use each model output twice (Zhao et al. 2023).

The predictor goes from lambda to lambda + h like DPM-Solver (dpm_solver.py), with differences to the latest outputs
(equation 3). The next step calls the model at the new point in any case. Before that step, the corrector uses its
output to repeat the last interval (equation 9), which raises the order by one at no cost.

For x0 (or epsilon) m and an interval from the sample x at lambda_0, with the differences D_k = (m_k - m_0) / r_k at
r_k = (lambda_k - lambda_0) / h, both are

    x_coef * x - m_coef * m_0 - res_coef * sum of rho_k D_k        res_coef = signal_to * B(h)

where only the corrector has the new output, at r = 1, among its D_k. The weights rho solve the small linear system of
appendix A that makes the result exact for polynomials; B(h) is h (bh1) or exp(h) - 1 (bh2). With fewer outputs the
weights are constant: 1/2 for one difference in the predictor, and for none in the corrector.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import earlier, lambda_of, meet, rates
from minidiff.samplers.checks import usable
from minidiff.samplers.levels import Final, Lambdas
from minidiff.samplers.method import Draw, History, Levels, Next, Outputs, Plan
from minidiff.samplers.options import UpTo3

Row = namedtuple("Row", "order x_coef m_coef res_coef r1 r2 predict3 correct2 correct3 new2 new3")
"""For the interval that starts at the row: the coefficients above; ``r1`` and ``r2``: positions of the earlier outputs;
``predict3`` (n, 2): the predictor's weights of order 3; ``correct2`` and ``correct3`` (n, 2): the corrector's, with
those of the new output in ``new2`` and ``new3``. ``order``: the highest of each row."""


@dataclass(frozen=True, kw_only=True)
class UniPC(Lambdas[Row, History]):
    """UniPC sampler. Options: those of :class:`Lambdas`, where ``lower_order_final`` means that the last steps are of
    order 3, 2, 1; ``solver_order``: number of latest outputs that a step uses; ``solver_type``: B(h) as above;
    ``predict_x0``: combine x0 instead of epsilon; ``disable_corrector``: rows whose step is not corrected (0 for the
    first).

    ``like_diffusers``: bh1 cannot reach sigma 0, where the reference gives NaN; and a threshold has no effect on steps
    with predict_x0=False.
    """

    initial = History()

    solver_order: UpTo3 = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    final_sigma: Final = "zero"

    @property
    def on_device(self) -> tuple[str, ...]:
        """See :class:`Method`: only the third order multiplies matrices."""
        return ("predict3", "correct3") if self.solver_order == 3 else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = self.threshold is None or self.predict_x0 or self.like_diffusers
        instead = "limits x0, which predict_x0=False does not combine: give one of them"
        check(limits, f"threshold={self.threshold} {instead}")

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: History, draw: Draw) -> Next[History]:
        """Compute in the dtype of ``x``."""
        # x0 (or epsilon) for the sample that the model saw, before its correction
        m = self.denoised(plan, i, x, out, state) if self.predict_x0 else plan.epsilon(i, x, out)
        if state.base is not None and i - 1 not in self.disable_corrector:
            before, base, known = plan.at(i - 1), state.base, state.outputs
            x = walk(before, base, known, correct(before, base, known, state.order, m))
        outputs = (*state.outputs, m)[-self.solver_order :]
        at = plan.at(i)
        order = min(at.order, len(state.outputs) + 1)
        check(order < 3 or m.dtype == x.dtype or not self.like_diffusers, OF_TWO_DTYPES)
        return walk(at, x, outputs, predict(at, x, outputs, order)), History(outputs, x, order=order)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        n, last = len(at.here), self.solver_order
        orders = tuple(min(last, i + 1, n - i if self.lower_order_final else last) for i in range(n))
        (signal, noise), (to_signal, to_noise) = rates(at.here), rates(at.to)
        scale, to_scale, to = (noise, to_noise, to_signal) if self.predict_x0 else (signal, to_signal, to_noise)
        hh = -at.h if self.predict_x0 else at.h
        phi = torch.expm1(hh)
        b_h = hh if self.solver_type == "bh1" else phi
        res = to * b_h
        first = usable(self, orders, 1, {"x_coef": to_scale / scale, "m_coef": to * phi})
        check(not self.like_diffusers or bool(res.isfinite().all()), BH1_TO_ZERO)
        res_coef = torch.where(res.isfinite(), res, 0.0)
        return Row(order=orders, **first, res_coef=res_coef, **self._weights(at, hh, phi, b_h, orders))

    def _weights(self, at: Levels, hh: Tensor, phi: Tensor, b_h: Tensor, orders: tuple[int, ...]) -> dict[str, Tensor]:
        """Return r1 and r2 (n,), and the weights rho of every order: the solutions of R rho = b, where the rows of R
        are the powers of the r_k and 1, and b consists of the integrals phi_k of the exponential."""
        start, b, phi_k, factorial = lambda_of(at.here), [], phi, 1
        r1, r2 = (earlier(start) - start) / at.h, (earlier(earlier(start)) - start) / at.h
        for k in (1, 2, 3):
            phi_k = phi_k / hh - 1 / factorial
            b.append(phi_k * factorial / b_h)
            factorial *= k + 1
        # A last interval of length 0 has an infinite r1, and differences over it are 0: its step has no effect.
        inner = torch.cat([r1[:-1], torch.zeros_like(r1[-1:])])
        usable(self, orders, 2, {"r1 but the last": inner, "1 / r1": 1 / r1})
        three = usable(self, orders, 3, {"r2": r2, "1 / r2": 1 / r2, "b1": b[0], "b2": b[1]})
        # the corrector repeats every interval but the last, with the order of its first step
        order, repeated = (torch.tensor(column, device="cpu") for column in (orders, (*orders[:-1], 0)))
        one = torch.ones_like(r1)
        correct2 = solve(repeated >= 2, [r1, one], b[:2])
        correct3 = solve(repeated >= 3, [r1, r2, one], b)
        return {
            "r1": torch.where(order >= 2, r1, 0.0),
            "r2": three["r2"],
            "predict3": solve(order >= 3, [r1, r2], b[:2]),
            "correct2": correct2[:, 0],
            "new2": correct2[:, 1],
            "correct3": correct3[:, :2],
            "new3": correct3[:, 2],
        }


BH1_TO_ZERO = (
    "solver_type='bh1' is NaN on the last step to sigma 0 in diffusers 0.42.1: "
    "use 'bh2' or final_sigmas_type='sigma_min'"
)
OF_TWO_DTYPES = (
    "a step of order 3 raises in diffusers 0.42.1 where the sample and x0 have different dtypes: "
    "give both in one, or use solver_order=2"
)


def walk(at: Row, x: Tensor, outputs: Outputs, residual: Tensor | None) -> Tensor:
    """Step from ``x`` at a row to the next."""
    after: Tensor = at.x_coef * x - at.m_coef * outputs[-1]
    return (after if residual is None else after - at.res_coef * residual).to(x.dtype)


def predict(at: Row, x: Tensor, outputs: Outputs, order: int) -> Tensor | None:
    """Return the sum of the rho_k D_k for a step from ``x``, the first time; None if there is none."""
    parts = differences(at, outputs, order)
    if order < 3:
        return 0.5 * meet(parts[0], x) if parts else None
    return weighted(at.predict3, x, parts)


def correct(at: Row, x: Tensor, outputs: Outputs, order: int, new: Tensor) -> Tensor:
    """Return the sum for the repeated step, now that the output ``new`` at its end is known."""
    parts, step = differences(at, outputs, order), new - outputs[-1]
    if order == 1:
        return 0.5 * step
    seen = at.correct2.to(x.dtype) * meet(parts[0], x) if order == 2 else weighted(at.correct3, x, parts)
    total: Tensor = seen + (at.new2 if order == 2 else at.new3).to(x.dtype) * step
    return total


def differences(at: Row, outputs: Outputs, order: int) -> list[Tensor]:
    """Return D_1 (and D_2 for order 3): differences of the latest of ``outputs`` to those before, over their
    distance."""
    return [(outputs[-k] - outputs[-1]) / r for k, r in enumerate((at.r1, at.r2)[: order - 1], 2)]


def weighted(weights: Tensor, x: Tensor, parts: list[Tensor]) -> Tensor:
    """Return the sum of ``parts`` with ``weights`` (2,), rounded to the dtype of ``x``. It is a matrix product: in half
    precision a sum of products is rounded in other places."""
    return torch.einsum("k,bkc...->bc...", weights.to(x.dtype), torch.stack(parts, dim=1).to(x.dtype))


def solve(wanted: Tensor, points: list[Tensor], target: list[Tensor]) -> Tensor:
    """Return the weights (n, k) for k ``points`` and k ``target`` values, (n,) each, where ``wanted``; else 0."""
    at = torch.stack(points, dim=1)
    powers = torch.stack([torch.pow(at, k) for k in range(len(points))], dim=1)
    weights = torch.zeros_like(at)
    weights[wanted] = torch.linalg.solve(powers[wanted], torch.stack(target, dim=1)[wanted])
    return weights
