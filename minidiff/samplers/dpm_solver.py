"""DPM-Solver and DPM-Solver++, multistep (Lu et al. 2022a, 2022b): exponential integrators in lambda.

From lambda to lambda + h (levels.py), the equation for x with the model's x0 has the solution

    x_next = noise_next / noise * x  +  signal_next * integral of exp(-(h - u)) x0(lambda + u) du over 0..h

DPM-Solver++ (2022b) replaces x0 under the integral by a polynomial through its latest one to three values: D0 the
latest value, D1 and D2 its divided differences in units of h. Then the integral is

    (1 - exp(-h)) D0 + ((exp(-h) - 1) / h + 1) D1 - ((exp(-h) - 1 + h) / h**2 - 1/2) D2      of order 1, 2, 3

("heun" uses this D1 term; "midpoint" uses (1 - exp(-h)) / 2, equal up to O(h**2)). For the third order, Taylor's
formula has the second derivative in place of D2, which is 2 * D2. k-diffusion and diffusers omit the factor 2, and so
does this module, since that is the method known as 3M. On a Gaussian its error falls with order 2, a little below that
of 2M; with the factor the order would be 3 (tests/unit/test_order_of_accuracy.py). DPM-Solver (2022a) does the same
with epsilon: signal and noise are exchanged, and h changes its sign. The sde forms solve the reverse stochastic
equation (2022b, appendix): the exponentials have 2h, and every step adds fresh noise.

The equation without fresh noise can be solved in both directions. The inverse takes the same steps with negative h,
from a picture to the noise that would generate it, for editing by inversion.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers.arithmetic import earlier, meet, rates, upcast
from minidiff.samplers.checks import usable
from minidiff.samplers.ddpm import split_variance
from minidiff.samplers.grid import Floats
from minidiff.samplers.levels import ClippedLambdas, Final
from minidiff.samplers.method import Draw, Levels, Next, Outputs, Plan, R, S
from minidiff.samplers.options import UpTo3

Algorithm = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
SolverType = Literal["midpoint", "heun"]
FEW = 15  # runs of fewer steps end with steps of lower order, which are more stable there


Multistep = namedtuple("Multistep", "order x_coef d0 d1 d1_heun d2 fresh inv_r0 inv_r1 share inv_r")
"""A step is ``x_coef`` * x + ``d0`` * D0 + ``d1`` * D1 + ``d2`` * D2 + ``fresh`` * noise, with ``d1_heun`` in the place
of d1 in a step of order 3. ``inv_r0`` and ``inv_r1`` make D1 of the differences of the latest outputs, ``share`` and
``inv_r`` make D1 and D2 of those of order 3. ``order``: the highest of each row."""


def multistep(at: Any, x: Tensor, outputs: Outputs) -> Tensor:
    """Compute the step of one row of :class:`Multistep` without the fresh noise, summed in the wider dtype."""
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
class DPMOptions(ClippedLambdas[R, S]):
    """Base class of the multistep and the singlestep method. Options: those of :class:`ClippedLambdas`, and

    ``solver_order``: number of latest outputs that a step uses. ``algorithm``: the names with "++" combine x0, the
    others epsilon; "sde" adds fresh noise at every step. ``solver_type`` as above, for order 2. ``euler_at_final``: the
    last step is always of order 1, as it is for ``final_sigma`` "zero", which epsilon cannot reach. ``sigma_spacing``
    "lu" is even in lambda, over all of training (sigma_min and sigma_max are not used). ``learned_variance``: the model
    has twice the channels, and the second half is not used.
    """

    takes: ClassVar[tuple[str, ...]] = ("steps", "timesteps")
    repeats = False

    solver_order: UpTo3 = 2
    algorithm: Algorithm = "dpmsolver++"
    solver_type: SolverType = "midpoint"
    euler_at_final: bool = False
    sigma_spacing: Literal["timesteps", "karras", "exponential", "beta", "lu"] = "timesteps"  # type: ignore[assignment]
    final_sigma: Final = "zero"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        reaches = self.predicts_x0 or self.final_sigma != "zero"
        check(reaches, f"algorithm={self.algorithm!r} divides by sigma: it needs final_sigma='sigma_min'")
        known = self.algorithm != "sde-dpmsolver" or self.solver_order < 3
        check(known, "algorithm='sde-dpmsolver' has no order 3: use solver_order=2 or sde-dpmsolver++")

    @property
    def predicts_x0(self) -> bool:
        return self.algorithm.endswith("++")

    @property
    def reads_variance(self) -> bool:
        return self.learned_variance

    def curve(self, n: int, sigmas: Floats) -> Floats:
        if self.sigma_spacing != "lu":
            return super().curve(n, sigmas)
        low, high = np.log(sigmas[[0, -1]]).tolist()  # in float32
        even: Floats = np.exp(high + np.linspace(0, 1, n) * (low - high))
        return even

    def denoised(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        return super().denoised(plan, i, x, self._mean(x, out), state)

    def convert(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        """Convert the model output to the quantity that the algorithm combines: x0 or epsilon."""
        if self.predicts_x0:
            return self.denoised(plan, i, x, out, state)
        return self.epsilon(plan, i, x, self._mean(x, out))

    def _mean(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the prediction without the learned variance."""
        return split_variance(x, out, "learned_variance=True")[0] if self.learned_variance else out


@dataclass(frozen=True, kw_only=True)
class DPMSolver(DPMOptions[Multistep, Outputs]):
    """DPM++ 2M by default; the options give the rest of the family. ``lower_order_final``: with fewer than 15 steps
    the last two are of order 2 and 1 at most.

    ``like_diffusers``: the D2 of order 3 in sde-dpmsolver++ has -1/2 where the expansion of the exponential (and
    k-diffusion) has +1/2.
    """

    def step(self, plan: Plan[Multistep], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw) -> Next[Outputs]:
        """Compute x0 in the model's dtype, and the sum in float32."""
        m, at = self.convert(plan, i, x, out, state), plan.at(i)
        outputs = (*state, m)[-self.solver_order :]
        after = multistep(at, upcast(x), outputs)
        if self.algorithm.startswith("sde"):
            after = after + at.fresh * draw(upcast(m))
        return after.to(m.dtype), outputs

    def rows(self, at: Levels, prediction: Prediction) -> Multistep:
        return multistep_rows(self, self.algorithm, self.solver_type, rates(at.here), rates(at.to), at.h)


@dataclass(frozen=True, kw_only=True)
class DPMSolver2MSDE(DPMSolver):
    """DPM++ 2M SDE: :class:`DPMSolver` with fresh noise at every step."""

    algorithm: Algorithm = "sde-dpmsolver++"


@dataclass(frozen=True, kw_only=True)
class DPMSolver3MSDE(DPMSolver2MSDE):
    """DPM++ 3M SDE: :class:`DPMSolver2MSDE` with order 3."""

    solver_order: UpTo3 = 3


@dataclass(frozen=True, kw_only=True)
class DPMSolverInverse(DPMSolver):
    """DPM-Solver run backwards, from a picture to noise. Options as in :class:`DPMSolver`, except the sde algorithms
    (their noise cannot be undone) and sigma spacing "lu". ``final_sigma`` is the start of the run, always "sigma_min".
    The last step lands on the largest sigma of training.

    ``like_diffusers``: steps are computed in the dtype of x, even in half precision, whose rounding errors they
    amplify.
    """

    takes = ("steps",)
    takes_more = ()
    repeats = True
    rises = True

    final_sigma: Final = "sigma_min"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.final_sigma == "sigma_min", "DPMSolverInverse can't begin at sigma 0: leave final_sigma='sigma_min'")
        check(not self.algorithm.startswith("sde"), f"algorithm={self.algorithm!r} adds noise: it can't be inverted")
        known = self.sigma_spacing != "lu"
        check(known, "DPMSolverInverse has no sigma_spacing='lu'; it knows timesteps, karras, exponential, beta")

    def step(self, plan: Plan[Multistep], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw) -> Next[Outputs]:
        """Compute in float32, since the first steps multiply the difference of x and x0 by 10 and more."""
        seen, said = (x, out) if self.like_diffusers else (upcast(x), upcast(out))
        outputs = (*state, self.convert(plan, i, seen, said, state))[-self.solver_order :]
        after = multistep(plan.at(i), seen, outputs)
        return after if self.like_diffusers else after.to(out.dtype), outputs

    def points(self, n: int, total: int, last: int) -> Floats:
        """Return n of the n + 1 points that divide the ``last`` timesteps, (n,), rising."""
        if self.spacing == "trailing":  # and without the top, on which the last step lands
            further = self.grid.further
            return super().points(n + further, total, last)[further:][::-1]
        lowest = self.steps_offset if self.spacing == "leading" else 0
        return np.append(lowest, super().points(n, total, last)[:0:-1])


Rates = tuple[Tensor, Tensor]


def exponentials(algorithm: Algorithm, here: Rates, to: Rates, h: Tensor, like_diffusers: bool) -> tuple[Tensor, ...]:
    """Return the factors of x, D0, D1 (midpoint), D1 (heun), D2 and fresh noise in steps of length ``h`` from one
    (signal, noise) to another, all (n,). ``u``, the exponent, is -h for x0 (-2h with fresh noise) and h for epsilon."""
    (signal, noise), (to_signal, to_noise) = here, to
    sde, fresh = algorithm.startswith("sde"), torch.zeros_like(h)
    if algorithm.endswith("++"):
        u, x_coef, scale = -2.0 * h if sde else -h, to_noise / noise, to_signal
        if sde:
            x_coef, fresh = x_coef * torch.exp(-h), to_noise * torch.sqrt(1 - torch.exp(u))
    else:
        u, x_coef, scale = h, to_signal / signal, 2.0 * to_noise if sde else to_noise
        if sde:
            fresh = to_noise * torch.sqrt(torch.exp(2 * h) - 1.0)
    growth = torch.exp(u) - 1.0
    d0, d1_heun = -(scale * growth), -(scale * (growth / u - 1.0))
    half = -0.5 if sde and like_diffusers else 0.5
    return x_coef, d0, 0.5 * d0, d1_heun, -(scale * ((growth - u) / u**2 - half)), fresh


def multistep_rows(
    method: Any, algorithm: Algorithm, solver_type: SolverType, here: Rates, to: Rates, h: Tensor
) -> Multistep:
    """Return the rows for steps of length ``h`` (n,). Raises ConfigError if a coefficient in use is not finite."""
    last_is_first = method.euler_at_final or method.final_sigma == "zero"
    orders = highest_orders(len(h), method.solver_order, method.lower_order_final, last_is_first)
    x_coef, d0, d1_midpoint, d1_heun, d2, fresh = exponentials(algorithm, here, to, h, method.like_diffusers)
    h_0 = earlier(h)  # the first row has no history, and only keeps the length
    r0, r1 = h_0 / h, earlier(h_0) / h
    d1, inv_r = d1_midpoint if solver_type == "midpoint" else d1_heun, 1.0 / (r0 + r1)
    third = {"d1_heun": d1_heun, "d2": d2, "inv_r1": 1.0 / r1, "share": r0 / (r0 + r1), "inv_r": inv_r}
    return Multistep(
        order=orders,
        **usable(method, orders, 1, {"x_coef": x_coef, "d0": d0, "fresh": fresh}),
        **usable(method, orders, 2, {"d1": d1, "inv_r0": 1.0 / r0}),
        **usable(method, orders, 3, third),
    )


def highest_orders(n: int, order: int, lower_order_final: bool, first_at_last: bool) -> tuple[int, ...]:
    """Return the highest order of each step of a multistep method, (n,): ``order``, or the number of outputs so far if
    that is lower. With ``lower_order_final`` and few steps, the last two have order 2 and 1 at most; with
    ``first_at_last``, the last has order 1."""
    few = lower_order_final and n < FEW
    orders = [min(order, i + 1) for i in range(n)]
    if few and n > 1:
        orders[-2] = min(orders[-2], 2)
    if few or first_at_last:
        orders[-1] = 1
    return tuple(orders)
