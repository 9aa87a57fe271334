"""DPM-Solver and DPM-Solver++, singlestep (Lu et al. 2022a, algorithms 1 and 2; 2022b, algorithm 1: "2S").

Unlike the multistep method, this one keeps no history across groups. The calls form groups of one to three, and each
step of a group goes from the group's first sample to its own point, with one more output than the step before. The
last call of a group of k thus gives a step of order k over its whole interval: four calls in groups of 2 have the
orders 1, 2, 1, 2. With D0 the group's first output, and D1 and D2 its differences in units of h, the coefficients are
those of dpm_solver.py.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import lambda_of, meet, rates
from minidiff.samplers.checks import usable
from minidiff.samplers.dpm_solver import DPMOptions, exponentials
from minidiff.samplers.method import Draw, History, Levels, Next, Plan

Row = namedtuple("Row", "order x_coef d0 d1 d2 fresh r0 r1")
"""(n, 3) each, the entry k - 1 for steps of order k, which begin k - 1 rows before: a step is ``x_coef`` * x + ``d0`` *
D0 + ``d1`` * D1 + ``d2`` * D2 + ``fresh`` * noise; ``r0`` and ``r1`` are where the latest output and the one before lie
in the step. ``order`` (n,): that of each row, its place in the group."""


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestep(DPMOptions[Row, History]):
    """Singlestep DPM-Solver. Options as in :class:`DPMOptions`, except algorithm "sde-dpmsolver", euler_at_final and
    sigma spacing "lu".

    ``lower_order_final``: the last groups are smaller, which allows any number of steps. Without it they are smaller
    only if ``solver_order`` does not divide the number of steps, or if the run ends at sigma 0. In a run that starts
    inside a group (img2img), that group is smaller.

    ``like_diffusers``: the D2 of order 3 in sde-dpmsolver++ (heun) has -1/2 where it should be +1/2.
    """

    initial = History()

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.algorithm != "sde-dpmsolver" and not self.euler_at_final and self.sigma_spacing != "lu"
        check(known, f"{self.name} has no algorithm 'sde-dpmsolver', euler_at_final or sigma_spacing 'lu'")

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: History, draw: Draw) -> Next[History]:
        """Compute in the dtype of ``x``."""
        m, at = self.convert(plan, i, x, out, state), plan.at(i)
        outputs = (*state.outputs, m)[-self.solver_order :]
        order = min(at.order, len(outputs))
        base = x if order == 1 or state.base is None else state.base
        k = order - 1
        after = at.x_coef[k] * base + meet(at.d0[k] * outputs[-order], base)
        if order > 1:
            r0, r1 = at.r0[k], at.r1[k]
            d1, d2 = (1.0 / r0) * (m - outputs[-order]), None
            if order == 3 and self.solver_type == "heun":
                near = (1.0 / r1) * (outputs[-2] - outputs[-3])
                d1, d2 = (r0 * near - r1 * d1) / (r0 - r1), 2.0 * (d1 - near) / (r0 - r1)
            after = after + meet(at.d1[k] * d1, base)
            after = after if d2 is None else after + meet(at.d2[k] * d2, base)
        if self.algorithm.startswith("sde"):
            after = after + meet(at.fresh[k] * draw(m), base)
        return after, History(outputs, base)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        orders = self._orders(len(at.here))
        by_order = [self._coefficients(k, at, orders) for k in (1, 2, 3)]
        return Row(orders, **{name: torch.stack([c[name] for c in by_order], dim=1) for name in by_order[0]})

    def _coefficients(self, k: int, at: Levels, orders: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the columns of steps of order ``k``, (n,) each."""
        now = torch.arange(len(orders), device="cpu")
        first, second = (now - (k - 1)).clamp(min=0), (now - (k - 2)).clamp(min=0, max=len(orders) - 1)
        lambdas, h = lambda_of(at.here), lambda_of(at.to) - lambda_of(at.here)[first]
        ends = rates(at.here[first]), rates(at.to)
        x_coef, d0, midpoint, heun, d2, fresh = exponentials(self.algorithm, *ends, h, self.like_diffusers)
        used = {"x_coef": x_coef, "d0": d0, "fresh": fresh}
        if k > 1:
            d1, r0 = midpoint if k == 2 and self.solver_type == "midpoint" else heun, (lambdas - lambdas[first]) / h
            used |= {"d1": d1, "r0": r0, "inverse": 1.0 / r0}
        if k > 2:
            used |= {"d2": d2, "r1": (lambdas[second] - lambdas[first]) / h}
        found = usable(self, orders, k, used)
        return {name: found.get(name, torch.zeros_like(h)) for name in Row._fields[1:]}

    def _orders(self, n: int) -> tuple[int, ...]:
        """Return the order of each row; the last group may give up its last place, for a step of order 1."""
        orders = [i % self.solver_order + 1 for i in range(n)]
        if self.final_sigma == "zero" or (self.lower_order_final and n % self.solver_order == 0):
            orders[-1] = 1
        return tuple(orders)
