"""DPM-Solver and DPM-Solver++, singlestep (Lu et al. 2022a, algorithms 1 and 2; 2022b, algorithm 1: "2S").

Where the multistep method remembers, this one starts afresh: the calls come in groups of one to three, and each step
of a group goes from the group's first sample, with one output more than the step before, to its own point. So the
last call of a group of k gives a step of order k over all of its interval: four calls in groups of 2 have the orders
1, 2, 1, 2. With D0 the group's first output, D1 and D2 its differences in units of h, the coefficients are those of
``dpm_solver.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.dpm_solver import DPMSolver, Exponentials, History, exponentials, meet
from minidiff.samplers.lambda_plan import LambdaPlan, lambda_rows, usable
from minidiff.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SinglestepPlan(LambdaPlan):
    """(3, n) each, the row k - 1 for steps of order k, which begin k - 1 rows before: a step is ``x_coef`` * x +
    ``d0`` * D0 + ``d1`` * D1 + ``d2`` * D2 + ``fresh`` * noise; ``r0`` and ``r1`` (3, n) are where the latest output
    and the one before lie in the step. ``orders``: the order of each row, its place in the group."""

    x_coef: Tensor
    d0: Tensor
    d1: Tensor
    d2: Tensor
    fresh: Tensor
    r0: Tensor
    r1: Tensor
    orders: tuple[int, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        at = torch.tensor(self.orders, device="cpu")[None] - 1
        own: dict[str, Tensor | Sequence[Any]] = {"order": self.orders}
        for name, row in (("x_coef", self.x_coef), ("D0", self.d0), ("D1", self.d1)):
            own[name] = row.gather(0, at)[0]
        return super().columns() | own


class Group(NamedTuple):
    """The latest outputs, oldest first, and the sample with which the group began."""

    outputs: tuple[Tensor, ...] = ()
    base: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestep(DPMSolver):
    """Options as in :class:`DPMSolver`, but for algorithm "sde-dpmsolver", euler_at_final and sigma spacing "lu".

    ``lower_order_final``: the last groups are smaller, so that any number of steps can be had; without it, a number
    that groups of ``solver_order`` do not divide, and any way to sigma 0, has them nevertheless. In a run that begins
    inside a group (image to image) that group is smaller.

    ``like_diffusers``: the D2 of order 3 in sde-dpmsolver++ (heun) has -1/2 where it should be +1/2, and see
    :class:`LambdaOptions`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.algorithm != "sde-dpmsolver" and not self.euler_at_final and self.sigma_spacing != "lu"
        check(known, f"{type(self).__name__} has no algorithm 'sde-dpmsolver', euler_at_final or sigma_spacing 'lu'")

    def plan(  # type: ignore[override]
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> SinglestepPlan:
        """``timesteps``: whole numbers that fall strictly, within those of training; only with their own sigmas.
        ``sigmas``: falling, one more than there are to be steps, which the reference does not take."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, s = self.levels(schedule, steps, timesteps, sigmas, last=self._last(schedule), final=self.final_sigma)
        rows = lambda_rows(t, s, schedule.prediction)
        orders = self._orders(len(t))
        by_order = [self._coefficients(k, rows["signal"], rows["noise"], rows["lambdas"], orders) for k in (1, 2, 3)]
        rows |= {name: torch.stack([coefs[name] for coefs in by_order]) for name in by_order[0]}
        return SinglestepPlan(**rows, orders=orders)

    def _coefficients(
        self, k: int, signal: Tensor, noise: Tensor, lambdas: Tensor, orders: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """The rows of steps of order ``k``, (n,) each."""
        n = len(orders)
        now = torch.arange(n, device="cpu")
        first, second = (now - (k - 1)).clamp(min=0), (now - (k - 2)).clamp(min=0, max=n - 1)
        h = lambdas[1:] - lambdas[first]
        parts: Exponentials = exponentials(
            self.algorithm, signal[first], noise[first], signal[1:], noise[1:], h, self.like_diffusers
        )
        r0, r1 = (lambdas[:-1] - lambdas[first]) / h, (lambdas[second] - lambdas[first]) / h
        midpoint = k == 2 and self.solver_type == "midpoint"
        used = {"x_coef": parts.x_coef, "d0": parts.d0, "fresh": parts.fresh}
        if k > 1:
            used |= {"d1": parts.d1_midpoint if midpoint else parts.d1_heun, "r0": r0, "inverse": 1.0 / r0}
        if k > 2:
            used |= {"d2": parts.d2, "r1": r1}
        found = usable(self, orders, k, used)
        zero = torch.zeros_like(h)
        return {name: found.get(name, zero) for name in ("x_coef", "d0", "d1", "d2", "fresh", "r0", "r1")}

    def _orders(self, n: int) -> tuple[int, ...]:
        k = self.solver_order
        lower = self.lower_order_final or n % k != 0 or self.final_sigma == "zero"
        orders = [i % k + 1 for i in range(n)]
        if lower and k > 1 and n % k == 0:  # the last group gives up its last place, for a step of order 1
            orders[-1] = 1
        if self.final_sigma == "zero":
            orders[-1] = 1
        return tuple(orders)

    def start(self) -> Group:  # type: ignore[override]
        return Group()

    def step(  # type: ignore[override]
        self, plan: SinglestepPlan, i: int, x: Tensor, out: Tensor, state: Group, draw: Draw
    ) -> tuple[Tensor, Group]:
        """Everything in the dtype of ``x``."""
        m = self.convert(plan, i, x, out, History())
        outputs = (*state.outputs, m)[-self.solver_order :]
        order = min(plan.orders[i], len(outputs))
        base = x if order == 1 or state.base is None else state.base
        k = order - 1
        after = plan.x_coef[k, i] * base + meet(plan.d0[k, i] * outputs[-order], base)
        if order > 1:
            r0, r1 = plan.r0[k, i], plan.r1[k, i]
            d1 = (1.0 / r0) * (m - outputs[-order])
            if order == 3 and self.solver_type == "heun":
                near = (1.0 / r1) * (outputs[-2] - outputs[-3])
                d2 = 2.0 * (d1 - near) / (r0 - r1)
                d1 = (r0 * near - r1 * d1) / (r0 - r1)
                after = after + meet(plan.d1[k, i] * d1, base) + meet(plan.d2[k, i] * d2, base)
            else:
                after = after + meet(plan.d1[k, i] * d1, base)
        if self.algorithm.startswith("sde"):
            after = after + meet(plan.fresh[k, i] * draw(m), base)
        return after, Group(outputs, base)
