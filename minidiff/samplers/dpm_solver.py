"""DPM-Solver and DPM-Solver++, multistep (Lu et al. 2022a, 2022b): x's own part solved exactly, the model's by Taylor.

From lambda to lambda + h (levels.py), the equation for x with the model's x0 has the solution

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

The equation without fresh noise is the same in both directions: the inverse takes the same steps with negative h, from
a picture to the noise it could have been made of, for editing by inversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.ddpm import split_variance
from minidiff.samplers.levels import CURVES, Final, Floats, Lambdas, at_timesteps, to_timesteps
from minidiff.samplers.method import Draw, Given, Levels, Plan, earlier, meet, rates, upcast
from minidiff.samplers.multistep import Outputs, highest_orders, unclipped, usable
from minidiff.schedule import NoiseSchedule, check_steps, epsilon_from_x0, to_epsilon, x0_from_epsilon

Algorithm = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
SolverType = Literal["midpoint", "heun"]
R = TypeVar("R", bound=tuple[Any, ...])
S = TypeVar("S")


class Multistep(NamedTuple):
    """A step is ``x_coef`` * x + ``d0`` * D0 + ``d1`` * D1 + ``d2`` * D2 + ``fresh`` * noise, with ``d1_heun`` in the
    place of d1 in a step of order 3. ``inv_r0`` and ``inv_r1`` make D1 of the differences of the latest outputs,
    ``share`` and ``inv_r`` make D1 and D2 of those of order 3. ``order``: the highest of each row."""

    order: Any
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


def multistep(at: Any, x: Tensor, outputs: Outputs) -> Tensor:
    """The step of one row of :class:`Multistep` but for fresh noise, summed in the wider dtype."""
    m, order = outputs[-1], min(at.order, len(outputs))
    after: Tensor = at.x_coef * x + meet(at.d0 * m, x)
    if order == 2:
        after = after + meet(at.d1 * (at.inv_r0 * (m - outputs[-2])), x)
    if order == 3:
        near, far = at.inv_r0 * (m - outputs[-2]), at.inv_r1 * (outputs[-2] - outputs[-3])
        after = after + meet(at.d1_heun * (near + at.share * (near - far)), x)
        after = after + meet(at.d2 * (at.inv_r * (near - far)), x)
    return after


@dataclass(frozen=True, kw_only=True)
class DPMOptions(Lambdas[R, S]):
    """What the multistep and the singlestep method have in common.

    ``solver_order``: how many of the latest outputs a step uses. ``algorithm``: "++" predicts x0, without it epsilon;
    "sde" adds fresh noise at every step. ``solver_type`` as above, for order 2. ``euler_at_final``: the last step is of
    order 1 always, as it is for ``final_sigma`` "zero", which epsilon can't reach. ``sigma_spacing`` "lu" is even in
    lambda, over all of training (sigma_min and sigma_max play no part). ``lambda_min_clipped``: timesteps of lower
    lambda are left out (cosine schedules; with spacing by timesteps only). ``learned_variance``: the model has twice
    the channels, the second half unused.
    """

    takes: ClassVar[tuple[str, ...]] = ("steps", "timesteps")

    solver_order: int = 2
    algorithm: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    euler_at_final: bool = False
    sigma_spacing: Literal["timesteps", "karras", "exponential", "beta", "lu"] = "timesteps"  # type: ignore[assignment]
    final_sigma: Final = "zero"
    lambda_min_clipped: float | None = None
    learned_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.solver_order)
        reaches = self.predicts_x0 or self.final_sigma != "zero"
        check(reaches, f"algorithm={self.algorithm!r} divides by sigma: it needs final_sigma='sigma_min'")
        known = self.algorithm != "sde-dpmsolver" or self.solver_order < 3
        check(known, "algorithm='sde-dpmsolver' has no order 3: use solver_order=2 or sde-dpmsolver++")

    @property
    def predicts_x0(self) -> bool:
        return self.algorithm.endswith("++")

    @property
    def final(self) -> Literal["zero", "sigma_min", "repeated"]:
        return self.final_sigma

    def highest(self, schedule: NoiseSchedule) -> int:
        return unclipped(schedule, self.last_alpha_bar, self.lambda_min_clipped)

    def curve(self, n: int, table: Floats) -> Floats:
        return lu(table, n) if self.sigma_spacing == "lu" else super().curve(n, table)

    def denoised(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        return super().denoised(plan, i, x, self._mean(x, out), state)

    def convert(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        """The model output as what the algorithm combines: x0, or epsilon."""
        if self.predicts_x0:
            return self.denoised(plan, i, x, out, state)
        return limited_epsilon(self, plan, i, x, self._mean(x, out))

    def _mean(self, x: Tensor, out: Tensor) -> Tensor:
        """The prediction without the learned variance."""
        return split_variance(x, out, "learned_variance=True")[0] if self.learned_variance else out


def limited_epsilon(method: Lambdas[Any, Any], plan: Plan[Any], i: int, x: Tensor, out: Tensor) -> Tensor:
    """The epsilon that ``out`` stands for, after the threshold of its x0 if there is one."""
    signal, noise = plan.signal[i], plan.noise[i]
    epsilon = to_epsilon(plan.prediction, x, out, signal, noise)
    if method.threshold is None:
        return epsilon
    return epsilon_from_x0(x, method.limit(x0_from_epsilon(x, epsilon, signal, noise)), signal, noise)


def check_order(order: int) -> None:
    """Raise ConfigError for an order that no formula is there for."""
    check(1 <= order <= 3, f"solver_order={order} must be 1, 2 or 3")


def lu(table: Floats, n: int) -> Floats:
    """(n,) float64 falling over all of ``table``, evenly spaced in lambda = -log sigma (Lu et al. 2022): as the
    exponential curve, from logarithms in float32."""
    high, low = float(np.log(table[-1:])[0]), float(np.log(table[:1])[0])
    sigmas: Floats = np.exp(high + np.linspace(0, 1, n) * (low - high))
    return sigmas


@dataclass(frozen=True, kw_only=True)
class DPMSolver(DPMOptions[Multistep, Outputs]):
    """DPM++ 2M as it stands; the options make the others of the family. ``lower_order_final``: with fewer than 15 steps
    the last two are of order 1 and 2 at most.

    ``like_diffusers``: the D2 of order 3 in sde-dpmsolver++ has -1/2 where the expansion of the exponential (and
    k-diffusion) has +1/2; with lambda_min_clipped, trailing spacing has fewer rows than steps; "lu" rounds its
    timesteps as karras does; and see :class:`Lambdas`.
    """

    def step(
        self, plan: Plan[Multistep], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw
    ) -> tuple[Tensor, Outputs]:
        """x0 is made in the model's dtype; the sum is in float32."""
        m, at = self.convert(plan, i, x, out, state), plan.at(i)
        outputs = (*state, m)[-self.solver_order :]
        after = multistep(at, upcast(x), outputs)
        if self.algorithm.startswith("sde"):
            after = after + at.fresh * draw(upcast(m))
        return after.to(m.dtype), outputs

    def rows(self, at: Levels, prediction: Prediction) -> Multistep:
        first_at_last = self.euler_at_final or self.final_sigma == "zero"
        orders = highest_orders(len(at.here), self.solver_order, self.lower_order_final, first_at_last)
        parts = exponentials(self.algorithm, rates(at.here), rates(at.to), at.h, self.like_diffusers)
        return multistep_rows(self, orders, parts, at.h, self.solver_type)


@dataclass(frozen=True, kw_only=True)
class DPMSolver2MSDE(DPMSolver):
    """DPM++ 2M SDE: :class:`DPMSolver` with fresh noise at every step."""

    algorithm: Algorithm = "sde-dpmsolver++"


@dataclass(frozen=True, kw_only=True)
class DPMSolver3MSDE(DPMSolver2MSDE):
    """DPM++ 3M SDE: the same of order 3."""

    solver_order: int = 3


@dataclass(frozen=True, kw_only=True)
class DPMSolverInverse(DPMSolver):
    """Options as in :class:`DPMSolver`, but for the sde algorithms (their noise can't be taken back) and sigma spacing
    "lu". ``final_sigma`` is where the walk begins: "sigma_min" always. The last step lands on the largest sigma of
    training.

    ``like_diffusers``: steps are made in the dtype of x, half precision too, whose rounding they blow up; karras,
    exponential, beta and trailing are there a step before, so that the last one does nothing; sigma_min and sigma_max
    change places; and where rounding makes two timesteps of karras equal, one is dropped from the timesteps, but not
    from the sigmas, which go with the wrong rows from there on.
    """

    takes: ClassVar[tuple[str, ...]] = ("steps",)
    takes_more: ClassVar[tuple[str, ...]] = ()

    final_sigma: Final = "sigma_min"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.final_sigma == "sigma_min", "DPMSolverInverse can't begin at sigma 0: leave final_sigma='sigma_min'")
        check(not self.algorithm.startswith("sde"), f"algorithm={self.algorithm!r} adds noise: it can't be inverted")
        known = self.sigma_spacing != "lu"
        check(known, "DPMSolverInverse has no sigma_spacing='lu'; it knows timesteps, karras, exponential, beta")

    def step(
        self, plan: Plan[Multistep], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw
    ) -> tuple[Tensor, Outputs]:
        """In float32, since the first steps multiply the difference of x and x0 by 10 and more."""
        seen, said = (x, out) if self.like_diffusers else (upcast(x), upcast(out))
        outputs = (*state, self.convert(plan, i, seen, said, state))[-self.solver_order :]
        after = multistep(plan.at(i), seen, outputs)
        return after if self.like_diffusers else after.to(out.dtype), outputs

    def visited(self, table: Floats, given: Given, last: int) -> tuple[Floats, Floats]:
        """From the picture up."""
        n = check_steps(given.steps, len(table))
        if self.sigma_spacing == "timesteps":
            t = self.spaced(len(table), n, last)
            inside = t[0] >= -self.like_diffusers and t[-1] < len(table)
            check(inside, f"{self.name}: timesteps run from {t[0]} to {t[-1]}, the model knows 0 to {len(table) - 1}")
            sigmas = np.append(at_timesteps(t, table), table[last - 1])
        else:
            sigmas = self.curve(n + (not self.like_diffusers), table)
            t = self.timesteps_of(sigmas[:n], table)
            sigmas = np.append(sigmas[:n], sigmas[-1])
        return t, sigmas.astype(np.float32)

    def spaced(self, total: int, steps: int | None, last: int) -> Floats:
        """(n,) int64, rising: n of the n + 1 points that divide the lowest ``last`` timesteps of ``total``."""
        n = check_steps(steps, total)
        if self.spacing == "trailing":
            step = total / n if self.like_diffusers else last / (n + 1)
            t = np.arange(last, 0, -step).round()[::-1] - 1
            t = t if self.like_diffusers else t[-n - 1 : -1]  # without the top, where the last step lands
        elif self.spacing == "leading":
            t = np.arange(n) * (last // (n + 1)) + self.steps_offset
        else:
            t = np.linspace(0, last - 1, n + 1).round()[:-1]
        return self.visited_once(t.astype(np.int64), n)

    def curve(self, n: int, table: Floats) -> Floats:
        """(n,) float64 sigmas of the chosen spacing, from the bottom up."""
        low_and_high = (self.sigma_max, self.sigma_min) if self.like_diffusers else (self.sigma_min, self.sigma_max)
        low, high = (float(table[k]) if end is None else end for k, end in zip((0, -1), low_and_high, strict=True))
        check(self.like_diffusers or low <= high, f"{self.name}: sigma_min={low:g} is above sigma_max={high:g}")
        return CURVES[self.sigma_spacing](high, low, n)  # upside down

    def timesteps_of(self, sigmas: Floats, table: Floats) -> Floats:
        t = to_timesteps(sigmas, table)
        if not self.like_diffusers:
            return t.astype(np.float32)
        t = t.round() if self.sigma_spacing == "karras" else t
        _, seen = np.unique(t, return_index=True)
        return t[np.sort(seen)].astype(np.int64)

    def rows(self, at: Levels, prediction: Prediction) -> Multistep:
        orders = highest_orders(len(at.here), self.solver_order, self.lower_order_final, self.euler_at_final)
        parts = exponentials(self.algorithm, rates(at.here), rates(at.to), at.h, True)
        return multistep_rows(self, orders, parts, at.h, self.solver_type)


class Exponentials(NamedTuple):
    """What x, D0, D1 (of both solver types), D2 and fresh noise are multiplied by, (n,) each."""

    x_coef: Tensor
    d0: Tensor
    d1_midpoint: Tensor
    d1_heun: Tensor
    d2: Tensor
    fresh: Tensor


Rates = tuple[Tensor, Tensor]


def exponentials(algorithm: Algorithm, here: Rates, to: Rates, h: Tensor, like_diffusers: bool) -> Exponentials:
    """The coefficients of steps of length ``h`` from one (signal, noise) to another, all (n,)."""
    (signal, noise), (to_signal, to_noise) = here, to
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


def multistep_rows(method: Any, orders: tuple[int, ...], parts: Exponentials, h: Tensor, kind: SolverType) -> Multistep:
    """The rows for steps of length ``h`` (n,). Raises ConfigError where one that is used is not finite."""
    h_0 = earlier(h)  # the first row, which has no history, is there to keep the length
    r0, r1 = h_0 / h, earlier(h_0) / h
    d1 = parts.d1_midpoint if kind == "midpoint" else parts.d1_heun
    share, inv_r = r0 / (r0 + r1), 1.0 / (r0 + r1)
    third = {"d1_heun": parts.d1_heun, "d2": parts.d2, "inv_r1": 1.0 / r1, "share": share, "inv_r": inv_r}
    return Multistep(
        order=orders,
        **usable(method, orders, 1, {"x_coef": parts.x_coef, "d0": parts.d0, "fresh": parts.fresh}),
        **usable(method, orders, 2, {"d1": d1, "inv_r0": 1.0 / r0}),
        **usable(method, orders, 3, third),
    )
