"""EDM's DPM-Solver++: a multistep method for models that were trained in sigma itself (Lu et al. 2022b, algorithm 2).

The path is solved in log sigma, where the model's x0 enters by an integral of exp: with h the interval in -log sigma,

    x_next = (sigma_next / sigma) * x + (1 - exp(-h)) * x0                                       (order 1: DDIM)

is exact for a constant x0, and the higher orders add the differences D1 and D2 of the latest estimates of x0. The
stochastic form (``sde``) goes further down and adds fresh noise. The model's wrapping is edm.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Draw, check_chosen
from minidiff.samplers.edm import EDMOptions, EDMPlan
from minidiff.samplers.lambda_plan import highest_orders
from minidiff.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EDMMultistepPlan(EDMPlan):
    """Rows: the step is ``x_coef`` * x + ``x0_coef`` * x0 + ``d1_coef`` * D1 + ``d2_coef`` * D2 + ``noise_coef`` *
    fresh noise, where D1 and D2 are the first and second difference of x0 by log sigma, made with ``r0`` and ``r1``,
    the latest intervals in units of the coming one. ``orders`` is the highest order that each row may have."""

    x_coef: Tensor
    x0_coef: Tensor
    d1_coef: Tensor
    d2_coef: Tensor
    noise_coef: Tensor
    r0: Tensor
    r1: Tensor
    d1_coef_third: Tensor
    orders: tuple[int, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        coefs = {name: getattr(self, name) for name in ("x_coef", "x0_coef", "d1_coef", "noise_coef")}
        return super().columns() | {"order": [min(o, i + 1) for i, o in enumerate(self.orders)]} | coefs


@dataclass(frozen=True, kw_only=True)
class EDMMultistep(EDMOptions):
    """The options: those of :class:`EDMOptions`, and

    ``solver_order`` 1 to 3; ``sde``: with fresh noise at every step, up to order 2; ``heun``: another second-order
    weight, where the default is the midpoint's. ``lower_order_final`` lowers the order of the last two steps where
    there are fewer than 15, ``euler_at_final`` that of the last one always, as a landing on sigma 0 does anyway.
    """

    solver_order: int = 2
    sde: bool = False
    heun: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.solver_order <= 3, f"solver_order={self.solver_order} must be 1, 2 or 3")
        check(not self.sde or self.solver_order < 3, "solver_order=3 does not go with sde (sde-dpmsolver++): use 2")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> EDMMultistepPlan:
        """``steps`` in 1..1000; the reference takes no sigmas of one's own here, and neither does this. ``schedule``
        may be None: epsilon."""
        check_chosen(self, "steps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        spaced = self.spaced(self.places(steps, torch.float32))
        s = self.landing(spaced, torch.tensor(self.sigma_min, dtype=torch.float32, device="cpu"))
        n = len(s) - 1
        lambdas = 0 - torch.log(s)
        h = lambdas[1:] - lambdas[:-1]
        r0 = torch.cat([h[:1], h[:-1]]) / h
        r1 = torch.cat([h[:2], h[:-2]])[:n] / h
        ratio, fall = s[1:] / s[:-1], torch.exp(-h) - 1.0
        if self.sde:
            double = 1 - torch.exp(-2.0 * h)
            x_coef, x0_coef, noise = ratio * torch.exp(-h), double, s[1:] * torch.sqrt(1.0 - torch.exp(-2 * h))
            third = double / (-2.0 * h) + 1.0
            d1 = third if self.heun else 0.5 * double
        else:
            x_coef, x0_coef, noise = ratio, -fall, torch.zeros_like(h)
            third = fall / h + 1.0
            d1 = third if self.heun else -0.5 * fall
        first_at_last = self.euler_at_final or self.final_sigma == "zero"
        orders = highest_orders(n, self.solver_order, self.lower_order_final, first_at_last)
        plan = EDMMultistepPlan(
            **self.rows(s, schedule, self.sigma_max),
            x_coef=x_coef,
            x0_coef=x0_coef,
            d1_coef=d1,
            d2_coef=-((fall + h) / h**2 - 0.5),
            noise_coef=noise,
            r0=r0,
            r1=r1,
            d1_coef_third=third,
            orders=orders,
        )
        _check_finite(plan)
        return replace(plan, d2_coef=torch.where(plan.d2_coef.isnan(), 0.0, plan.d2_coef))  # landing on 0: not used

    def start(self) -> tuple[Tensor, ...]:
        """The latest estimates of x0, oldest first, up to two of them."""
        return ()

    def scale_input(self, plan: EDMMultistepPlan, i: int, x: Tensor) -> Tensor:
        return x * plan.c_in[i]

    def denoised(self, plan: EDMMultistepPlan, i: int, x: Tensor, out: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return self.limit(plan.c_skip[i] * x + plan.c_out[i] * out)

    def step(
        self, plan: EDMMultistepPlan, i: int, x: Tensor, out: Tensor, state: tuple[Tensor, ...], draw: Draw
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x0 = self.denoised(plan, i, x, out, state)
        order = min(plan.orders[i], len(state) + 1)
        y = plan.x_coef[i] * x + plan.x0_coef[i] * x0
        if order == 2:
            y = y + plan.d1_coef[i] * ((1.0 / plan.r0[i]) * (x0 - state[-1]))
        elif order == 3:
            r0, r1 = plan.r0[i], plan.r1[i]
            late, early = (1.0 / r0) * (x0 - state[-1]), (1.0 / r1) * (state[-1] - state[-2])
            d1, d2 = late + (r0 / (r0 + r1)) * (late - early), (1.0 / (r0 + r1)) * (late - early)
            y = y + plan.d1_coef_third[i] * d1 + plan.d2_coef[i] * d2
        if self.sde:
            y = y + plan.noise_coef[i] * draw(x0)
        return y, (*state[-1:], x0)


def _check_finite(plan: EDMMultistepPlan) -> None:
    """Raise ConfigError where a row has a NaN that it uses: a step between two equal sigmas."""
    parts = {1: (plan.x_coef, plan.x0_coef, plan.noise_coef), 2: (1 / plan.r0, plan.d1_coef)}
    parts[3] = (plan.d1_coef_third, plan.d2_coef, 1 / plan.r1, plan.r0 / (plan.r0 + plan.r1))
    for i, most in enumerate(plan.orders):
        used = [row[i] for order in range(1, min(most, i + 1) + 1) for row in parts[order]]
        fits = all(bool(v.isfinite()) for v in used)
        check(fits, f"EDMMultistep: row {i} goes from sigma {plan.sigmas[i]:g} to itself: use final_sigma='zero'")
