"""DPM-Solver and DPM-Solver++, multistep (Lu et al. 2022a, 2022b): x's own part solved exactly, the model's by Taylor.

From lambda to lambda + h (``lambda_plan.py``), the equation for x with the model's x0 has the solution

    x_next = noise_next / noise * x  +  signal_next * integral of exp(-(h - u)) x0(lambda + u) du over 0..h

DPM-Solver++ (2022b) replaces x0 under the integral by a polynomial through its latest one to three values: D0 the
latest value, D1 and D2 its divided differences in units of h. Then the integral is

    (1 - exp(-h)) D0 + ((exp(-h) - 1) / h + 1) D1 - ((exp(-h) - 1 + h) / h**2 - 1/2) D2      of order 1, 2, 3

("heun" takes that D1; "midpoint" takes (1 - exp(-h)) / 2, equal up to O(h**2)). For the third order Taylor's formula
has the second derivative where D2 stands here, which is twice as much: k-diffusion and diffusers leave the 2 out, and
so does this, as it is what goes by the name of 3M. On a Gaussian its error falls with order 2, a little below that of
2M; twice the D2 would make it 3 (tests/unit/test_order_of_accuracy.py). DPM-Solver (2022a) does the same with
epsilon, where signal and noise change places and h its sign. The sde forms solve the reverse stochastic equation
(2022b, appendix): twice the h in the exponentials, and fresh noise at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.lambda_plan import LambdaOptions, LambdaPlan, highest_orders, lambda_rows, unclipped, usable
from minidiff.samplers.sigma_plan import upcast
from minidiff.samplers.sigmas import Floats
from minidiff.schedule import (
    NoiseSchedule,
    epsilon_from_x0,
    to_epsilon,
    to_x0,
    x0_from_epsilon,
)

Algorithm = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
SolverType = Literal["midpoint", "heun"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DPMSolverPlan(LambdaPlan):
    """A step is ``x_coef`` * x + ``d0`` * D0 + ``d1`` * D1 + ``d2`` * D2 + ``fresh`` * noise, with ``d1_heun`` in the
    place of d1 in a step of order 3. ``inv_r0`` and ``inv_r1`` make D1 of the differences of the latest outputs,
    ``share`` and ``inv_r`` make D1 and D2 of those of order 3. ``orders``: the highest order of each row."""

    x_coef: Tensor
    d0: Tensor
    d1: Tensor
    d1_heun: Tensor
    d2: Tensor
    fresh: Tensor
    inv_r0: Tensor
    inv_r1: Tensor
    share: Tensor
    inv_r: Tensor
    orders: tuple[int, ...]

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        most = [min(order, i + 1) for i, order in enumerate(self.orders)]
        own: dict[str, Tensor | Sequence[Any]] = {"order": most, "x_coef": self.x_coef, "D0": self.d0, "D1": self.d1}
        return super().columns() | own | ({"fresh": self.fresh} if bool(self.fresh.any()) else {})


class History(NamedTuple):
    """The latest outputs, converted to x0 (or epsilon), oldest first."""

    outputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DPMSolver(LambdaOptions):
    """DPM++ 2M as it stands; the options make the others of the family.

    ``algorithm``: "++" predicts x0, without it epsilon; "sde" adds fresh noise at every step. ``solver_type`` as above,
    for order 2. ``lower_order_final``: with fewer than 15 steps the last two are of order 1 and 2 at most;
    ``euler_at_final``: the last is of order 1 always, as it is for ``final_sigma`` "zero", which epsilon can't reach.
    ``sigma_spacing`` "lu" is even in lambda, over all of training (sigma_min and sigma_max play no part).
    ``lambda_min_clipped``: timesteps of lower lambda are left out (cosine schedules; with spacing by timesteps only).
    ``learned_variance``: the model has twice the channels, the second half unused.

    ``like_diffusers``: the D2 of order 3 in sde-dpmsolver++ has -1/2 where the expansion of the exponential (and
    k-diffusion) has +1/2; with lambda_min_clipped, trailing spacing has fewer rows than steps; "lu" rounds its
    timesteps as karras does; and see :class:`LambdaOptions`.
    """

    algorithm: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    euler_at_final: bool = False
    sigma_spacing: Literal["timesteps", "karras", "exponential", "beta", "lu"] = "timesteps"  # type: ignore[assignment]
    final_sigma: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float | None = None
    learned_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_algorithm(self.algorithm, self.solver_order, self.final_sigma)

    @property
    def predicts_x0(self) -> bool:
        return self.algorithm.endswith("++")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DPMSolverPlan:
        """``timesteps``: whole numbers that fall strictly, within those of training; only with their own sigmas.
        ``sigmas``: falling, one more than steps (which the reference can't take)."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps", "sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, s = self.levels(schedule, steps, timesteps, sigmas, last=self._last(schedule), final=self.final_sigma)
        orders = self._orders(len(t))
        rows = lambda_rows(t, s, schedule.prediction)
        algorithm, kind, like = self.algorithm, self.solver_type, self.like_diffusers
        by_order = multistep_coefficients(algorithm, kind, rows["signal"], rows["noise"], rows["h"], like)
        for order, coefs in enumerate(by_order, 1):
            rows |= usable(self, orders, order, coefs)
        return DPMSolverPlan(**rows, orders=orders)

    def _last(self, schedule: NoiseSchedule) -> int:
        return unclipped(schedule, self.last_alpha_bar, self.lambda_min_clipped)

    def _orders(self, n: int) -> tuple[int, ...]:
        """The highest order of each of ``n`` rows."""
        first_at_last = self.euler_at_final or self.final_sigma == "zero"
        return highest_orders(n, self.solver_order, self.lower_order_final, first_at_last)

    def _bent(self, n: int, table: Floats) -> Floats:
        return spacings.lu(table, n) if self.sigma_spacing == "lu" else super()._bent(n, table)

    def start(self) -> History:
        return History()

    def scale_input(self, plan: LambdaPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: LambdaPlan, i: int, x: Tensor, out: Tensor, state: History) -> Tensor:
        out = self._mean(x, out)
        return self.limit(to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i]))

    def step(
        self, plan: DPMSolverPlan, i: int, x: Tensor, out: Tensor, state: History, draw: Draw
    ) -> tuple[Tensor, History]:
        """x0 is made in the model's dtype; the sum is in float32."""
        m = self.convert(plan, i, x, out, state)
        outputs = (*state.outputs, m)[-self.solver_order :]
        after = multistep(plan, i, upcast(x), outputs)
        if self.algorithm.startswith("sde"):
            after = after + plan.fresh[i] * draw(upcast(m))
        return after.to(m.dtype), History(outputs)

    def convert(self, plan: LambdaPlan, i: int, x: Tensor, out: Tensor, state: History) -> Tensor:
        """The model output as what the algorithm combines: x0, or epsilon."""
        if self.predicts_x0:
            return self.denoised(plan, i, x, out, state)
        signal, noise = plan.signal[i], plan.noise[i]
        epsilon = to_epsilon(plan.prediction, x, self._mean(x, out), signal, noise)
        if self.threshold is None:
            return epsilon
        return epsilon_from_x0(x, self.limit(x0_from_epsilon(x, epsilon, signal, noise)), signal, noise)

    def _mean(self, x: Tensor, out: Tensor) -> Tensor:
        """The prediction without the learned variance."""
        if not self.learned_variance:
            return out
        wanted = 2 * x.shape[1]
        check(out.shape[1] == wanted, f"learned_variance=True needs {wanted} output channels, got {out.shape[1]}")
        return out[:, : x.shape[1]]


@dataclass(frozen=True, kw_only=True)
class DPMSolver2MSDE(DPMSolver):
    """DPM++ 2M SDE: :class:`DPMSolver` with fresh noise at every step."""

    algorithm: Algorithm = "sde-dpmsolver++"


@dataclass(frozen=True, kw_only=True)
class DPMSolver3MSDE(DPMSolver2MSDE):
    """DPM++ 3M SDE: the same of order 3."""

    solver_order: int = 3


def multistep(plan: DPMSolverPlan, i: int, x: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
    """The step at row ``i`` but for fresh noise, from the latest ``outputs``, summed in the wider dtype."""
    m, order = outputs[-1], min(plan.orders[i], len(outputs))
    after = plan.x_coef[i] * x + meet(plan.d0[i] * m, x)
    if order == 2:
        after = after + meet(plan.d1[i] * (plan.inv_r0[i] * (m - outputs[-2])), x)
    if order == 3:
        near, far = plan.inv_r0[i] * (m - outputs[-2]), plan.inv_r1[i] * (outputs[-2] - outputs[-3])
        after = after + meet(plan.d1_heun[i] * (near + plan.share[i] * (near - far)), x)
        after = after + meet(plan.d2[i] * (plan.inv_r[i] * (near - far)), x)
    return after


def meet(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the wider dtype of both: what their sum makes of it anyway, written down."""
    return y.to(torch.promote_types(y.dtype, x.dtype))


def check_algorithm(algorithm: str, order: int, final_sigma: str) -> None:
    """Raise ConfigError for what the formulas can't do."""
    reaches = algorithm.endswith("++") or final_sigma != "zero"
    check(reaches, f"algorithm={algorithm!r} divides by sigma: it needs final_sigma='sigma_min'")
    known = algorithm != "sde-dpmsolver" or order < 3
    check(known, "algorithm='sde-dpmsolver' has no order 3: use solver_order=2 or sde-dpmsolver++")


def multistep_coefficients(
    algorithm: Algorithm, kind: SolverType, signal: Tensor, noise: Tensor, h: Tensor, like_diffusers: bool
) -> list[dict[str, Tensor]]:
    """The rows of :class:`DPMSolverPlan` that steps of order 1, 2 and 3 or higher need, from ``signal`` and ``noise``
    (n + 1,) and ``h`` (n,)."""
    parts = exponentials(algorithm, signal[:-1], noise[:-1], signal[1:], noise[1:], h, like_diffusers)
    h_0 = torch.cat([h[:1], h[:-1]])  # the first row, which has no history, is there to keep the length
    h_1 = torch.cat([h_0[:1], h_0[:-1]])
    r0, r1 = h_0 / h, h_1 / h
    return [
        {"x_coef": parts.x_coef, "d0": parts.d0, "fresh": parts.fresh},
        {"d1": parts.d1_midpoint if kind == "midpoint" else parts.d1_heun, "inv_r0": 1.0 / r0},
        {
            "d1_heun": parts.d1_heun,
            "d2": parts.d2,
            "inv_r1": 1.0 / r1,
            "share": r0 / (r0 + r1),
            "inv_r": 1.0 / (r0 + r1),
        },
    ]


class Exponentials(NamedTuple):
    """What x, D0, D1 (of both solver types), D2 and fresh noise are multiplied by, (n,) each."""

    x_coef: Tensor
    d0: Tensor
    d1_midpoint: Tensor
    d1_heun: Tensor
    d2: Tensor
    fresh: Tensor


def exponentials(
    algorithm: Algorithm,
    signal: Tensor,
    noise: Tensor,
    to_signal: Tensor,
    to_noise: Tensor,
    h: Tensor,
    like_diffusers: bool,
) -> Exponentials:
    """The coefficients of steps of length ``h`` from one signal and noise to another, all (n,)."""
    fresh = torch.zeros_like(h)
    if algorithm == "dpmsolver++":
        decay = torch.exp(-h) - 1.0
        x_coef, d0 = to_noise / noise, -(to_signal * decay)
        half, heun = 0.5 * d0, to_signal * (decay / h + 1.0)
        d2 = -(to_signal * ((decay + h) / h**2 - 0.5))
    elif algorithm == "dpmsolver":
        growth = torch.exp(h) - 1.0
        x_coef, d0 = to_signal / signal, -(to_noise * growth)
        half, heun = 0.5 * d0, -(to_noise * (growth / h - 1.0))
        d2 = -(to_noise * ((growth - h) / h**2 - 0.5))
    elif algorithm == "sde-dpmsolver++":
        rise = 1 - torch.exp(-2.0 * h)
        x_coef, d0 = to_noise / noise * torch.exp(-h), to_signal * rise
        half, heun = 0.5 * d0, to_signal * (rise / (-2.0 * h) + 1.0)
        d2 = to_signal * ((rise - 2.0 * h) / (2.0 * h) ** 2 + (-0.5 if like_diffusers else 0.5))
        fresh = to_noise * torch.sqrt(rise)
    else:
        growth = torch.exp(h) - 1.0
        x_coef, d0 = to_signal / signal, -(2.0 * (to_noise * growth))
        half, heun = -(to_noise * growth), -(2.0 * (to_noise * (growth / h - 1.0)))
        d2 = torch.zeros_like(h)  # no order 3
        fresh = to_noise * torch.sqrt(torch.exp(2 * h) - 1.0)
    return Exponentials(x_coef, d0, half, heun, d2, fresh)
