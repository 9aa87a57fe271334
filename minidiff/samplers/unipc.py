"""UniPC: a predictor and a corrector that use each model output twice (Zhao et al. 2023).

The predictor goes from lambda to lambda + h as DPM-Solver does (``dpm_solver.py``), with differences to the latest
outputs (equation 3). The model is asked at the new point anyway, for the next step: before that step, the corrector
takes the answer to walk the last interval once more (equation 9), which raises the order by one at no cost.

For x0 (or epsilon) m and an interval from the sample x at lambda_0, with the differences D_k = (m_k - m_0) / r_k at
r_k = (lambda_k - lambda_0) / h, both are

    x_coef * x - m_coef * m_0 - res_coef * sum of rho_k D_k        res_coef = signal_next * B(h)

where the new output, at r = 1, is among the D_k of the corrector only. The weights rho solve the small linear system
of appendix A that makes the result exact for polynomials; B(h) is h (bh1) or exp(h) - 1 (bh2). Fewer outputs have
constant weights: 1/2 for one difference in the predictor, and for none in the corrector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.dpm_solver import meet
from minidiff.samplers.lambda_plan import LambdaOptions, LambdaPlan, lambda_rows, usable
from minidiff.schedule import NoiseSchedule, to_epsilon, to_x0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class UniPCPlan(LambdaPlan):
    """Rows, for the interval that begins there: the coefficients above; ``r1`` and ``r2``, where the outputs before
    lie; ``predict3`` (n, 2) the predictor's weights of order 3; ``correct2`` and ``correct3`` (n, 2) the corrector's,
    with those of the new output in ``new2`` and ``new3``. ``orders``: the highest order of each row."""

    x_coef: Tensor
    m_coef: Tensor
    res_coef: Tensor
    r1: Tensor
    r2: Tensor
    predict3: Tensor
    correct2: Tensor
    correct3: Tensor
    new2: Tensor
    new3: Tensor
    orders: tuple[int, ...]

    def to(self, device: torch.device | str) -> UniPCPlan:
        """With the weights of rank 1, which meet the samples in a product of matrices."""
        moved = super().to(device)
        if max(self.orders) < 3:  # nobody asks for them
            return moved
        return replace(moved, predict3=self.predict3.to(device), correct3=self.correct3.to(device))

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        most = [min(order, i + 1) for i, order in enumerate(self.orders)]
        own: dict[str, Tensor | Sequence[Any]] = {"order": most, "x_coef": self.x_coef, "m_coef": self.m_coef}
        return super().columns() | own | {"res_coef": self.res_coef}


class UniPCState(NamedTuple):
    """The latest outputs, oldest first; the (corrected) sample at the last row and the order of the step from there."""

    outputs: tuple[Tensor, ...] = ()
    base: Tensor | None = None
    order: int = 0


@dataclass(frozen=True, kw_only=True)
class UniPC(LambdaOptions):
    """``solver_type``: B(h) as above. ``predict_x0``: combine x0 instead of epsilon. ``disable_corrector``: rows whose
    step is not corrected (0 for the first). ``final_sigma``: the last step lands on 0, or on training's smallest.
    ``lower_order_final``: the last steps are of order 3, 2, 1.

    ``like_diffusers``: see :class:`LambdaOptions`; bh1 can't reach sigma 0, where the reference is NaN; the last sigma
    of karras, exponential and beta is there twice with final_sigma "sigma_min", so that the last step does nothing;
    and a threshold has no effect on the steps of predict_x0=False.
    """

    solver_type: Literal["bh1", "bh2"] = "bh2"
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    final_sigma: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = self.threshold is None or self.predict_x0 or self.like_diffusers
        check(
            limits, f"threshold={self.threshold} limits x0, which predict_x0=False does not combine: give one of them"
        )

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> UniPCPlan:
        """``steps`` in 1..T, or falling ``sigmas``, one more than steps (which the reference can't take)."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, s = self.levels(schedule, steps, None, sigmas, final="zero" if self.final_sigma == "zero" else "repeated")
        n = len(t)
        orders = tuple(min(self.solver_order, n - i) if self.lower_order_final else self.solver_order for i in range(n))
        rows = lambda_rows(t, s, schedule.prediction)
        to, scale = ("signal", "noise") if self.predict_x0 else ("noise", "signal")
        hh = -rows["h"] if self.predict_x0 else rows["h"]
        phi = torch.expm1(hh)
        b_h = hh if self.solver_type == "bh1" else phi
        first = {"x_coef": rows[scale][1:] / rows[scale][:-1], "m_coef": rows[to][1:] * phi}
        res = rows[to][1:] * b_h
        rows |= usable(self, orders, 1, first)
        if self.like_diffusers:
            check(bool(res.isfinite().all()), BH1_TO_ZERO)
        rows["res_coef"] = torch.where(res.isfinite(), res, 0.0)
        rows |= self._weights(rows["lambdas"], hh, phi, b_h, orders)
        return UniPCPlan(**rows, orders=orders)

    def _weights(
        self, lambdas: Tensor, hh: Tensor, phi: Tensor, b_h: Tensor, orders: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """r1 and r2 (n,), and the weights rho of every order: the solutions of R rho = b, with R's rows the powers of
        the r_k and 1, and b made of the integrals phi_k of the exponential."""
        n, start, h = len(hh), lambdas[:-1], lambdas[1:] - lambdas[:-1]
        r1, r2 = (torch.cat([lambdas[:1].expand(k), lambdas[: n - k]])[:n].sub(start) / h for k in (1, 2))
        targets, factorial = [], 1
        phi_k = phi / hh - 1
        for k in range(1, 4):
            targets.append(phi_k * factorial / b_h)
            factorial *= k + 1
            phi_k = phi_k / hh - 1 / factorial
        b1, b2, b3 = targets
        # A last interval without length has an infinite r1, and differences over it are 0: it is walked, to no effect.
        inner = torch.cat([r1[:-1], torch.zeros_like(r1[-1:])])
        usable(self, orders, 2, {"r1 but the last": inner, "1 / r1": 1 / r1})
        used = torch.tensor([o >= 2 and i >= 1 for i, o in enumerate(orders)], device="cpu")
        three = usable(self, orders, 3, {"r2": r2, "1 / r2": 1 / r2, "b1": b1, "b2": b2})
        # the corrector walks every interval but the last again, with the order of the step that walked it first
        of_2, of_3 = ([o >= k and k <= i + 1 < n for i, o in enumerate(orders)] for k in (2, 3))
        in_3 = [o >= 3 and i >= 2 for i, o in enumerate(orders)]
        one = torch.ones_like(h)
        correct2 = solve(of_2, [r1, one], [b1, b2])
        correct3 = solve(of_3, [r1, r2, one], [b1, b2, b3])
        return {
            "r1": torch.where(used, r1, 0.0),
            "r2": three["r2"],
            "predict3": solve(in_3, [r1, r2], [b1, b2]),
            "correct2": correct2[:, 0],
            "new2": correct2[:, 1],
            "correct3": correct3[:, :2],
            "new3": correct3[:, 2],
        }

    def start(self) -> UniPCState:
        return UniPCState()

    def scale_input(self, plan: UniPCPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: UniPCPlan, i: int, x: Tensor, out: Tensor, state: UniPCState) -> Tensor:
        """From the sample that the model saw, before its correction."""
        return self.limit(to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i]))

    def step(
        self, plan: UniPCPlan, i: int, x: Tensor, out: Tensor, state: UniPCState, draw: Draw
    ) -> tuple[Tensor, UniPCState]:
        """Everything in the dtype of ``x``."""
        m = self._convert(plan, i, x, out, state)
        if state.base is not None and i - 1 not in self.disable_corrector:
            x = self._correct(plan, i - 1, state, state.base, m)
        outputs = (*state.outputs, m)[-self.solver_order :]
        order = min(plan.orders[i], len(state.outputs) + 1)
        check(order < 3 or m.dtype == x.dtype or not self.like_diffusers, OF_TWO_DTYPES)
        return self._predict(plan, i, x, outputs, order), UniPCState(outputs, x, order)

    def _convert(self, plan: UniPCPlan, i: int, x: Tensor, out: Tensor, state: UniPCState) -> Tensor:
        if self.predict_x0:
            return self.denoised(plan, i, x, out, state)
        return to_epsilon(plan.prediction, x, out, plan.signal[i], plan.noise[i])

    def _predict(self, plan: UniPCPlan, i: int, x: Tensor, outputs: tuple[Tensor, ...], order: int) -> Tensor:
        """From ``x`` at row ``i`` to the next."""
        after = plan.x_coef[i] * x - plan.m_coef[i] * outputs[-1]
        if order == 2:
            after = after - plan.res_coef[i] * (0.5 * meet(differences(plan, i, outputs, 2)[0], x))
        if order == 3:
            after = after - plan.res_coef[i] * weighted(plan.predict3[i], x, differences(plan, i, outputs, 3))
        return after.to(x.dtype)

    def _correct(self, plan: UniPCPlan, i: int, state: UniPCState, x: Tensor, new: Tensor) -> Tensor:
        """From ``x`` at row ``i`` to the next once more, now that its output ``new`` is known."""
        outputs, order = state.outputs, state.order
        step = new - outputs[-1]
        if order == 1:
            residual = 0.5 * step
        elif order == 2:
            seen = plan.correct2[i].to(x.dtype) * meet(differences(plan, i, outputs, 2)[0], x)
            residual = seen + plan.new2[i].to(x.dtype) * step
        else:
            seen = weighted(plan.correct3[i], x, differences(plan, i, outputs, 3))
            residual = seen + plan.new3[i].to(x.dtype) * step
        after = plan.x_coef[i] * x - plan.m_coef[i] * outputs[-1]
        return (after - plan.res_coef[i] * residual).to(x.dtype)


BH1_TO_ZERO = (
    "solver_type='bh1' is NaN on the last step to sigma 0 in diffusers 0.42.1: "
    "use 'bh2' or final_sigmas_type='sigma_min'"
)
OF_TWO_DTYPES = (
    "a step of order 3 raises in diffusers 0.42.1 where the sample and x0 have different dtypes: "
    "give both in one, or use solver_order=2"
)


def differences(plan: UniPCPlan, i: int, outputs: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """D_1 (and D_2 for order 3): from the latest of ``outputs`` to those before, over their distance."""
    rows = (plan.r1, plan.r2)[: order - 1]
    return [(outputs[-k] - outputs[-1]) / r[i] for k, r in enumerate(rows, 2)]


def weighted(weights: Tensor, x: Tensor, parts: list[Tensor]) -> Tensor:
    """The sum of ``parts`` with ``weights`` (2,), rounded to the dtype of ``x``, as a product of matrices: in half
    precision a sum of products is rounded elsewhere."""
    return torch.einsum("k,bkc...->bc...", weights.to(x.dtype), torch.stack(parts, dim=1).to(x.dtype))


def solve(wanted: list[bool], points: list[Tensor], target: list[Tensor]) -> Tensor:
    """(n, k): the weights for k ``points`` and k ``target`` values, (n,) each, where ``wanted``; else 0."""
    at, rows = torch.stack(points, dim=1), torch.tensor(wanted, device="cpu")
    powers = torch.stack([torch.pow(at, k) for k in range(len(points))], dim=1)
    weights = torch.zeros_like(at)
    weights[rows] = torch.linalg.solve(powers[rows], torch.stack(target, dim=1)[rows])
    return weights
