"""EDM: samplers for models trained in sigma (Karras et al. 2022), by Euler's method and by DPM-Solver++.

Such a model has no schedule of timesteps. It is trained at any sigma, takes log(sigma) / 4 as its time input, and is
wrapped so that its input and output have unit variance (Karras, table 1; s is ``sigma_data``, the standard deviation of
the pictures):

    seen = x / sqrt(sigma**2 + s**2)        x0 = c_skip * x + c_out * out
    c_skip = s**2 / (sigma**2 + s**2)       c_out = sigma * s / sqrt(sigma**2 + s**2)      (-c_out for v-prediction)

The samplers therefore define their own sigmas, and use only the prediction type of a schedule: "epsilon" and
"v_prediction" are the two signs of c_out, and "sample" is a model that predicts x0 itself. The Euler step is that of
euler.py; the DPM-Solver++ step (Lu et al. 2022b, algorithm 2) is that of dpm_solver.py, with signal 1 and noise sigma.
"""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from minidiff.config import Prediction, check, quote
from minidiff.samplers.arithmetic import meet, upcast
from minidiff.samplers.dpm_solver import Algorithm, SolverType, multistep, multistep_rows
from minidiff.samplers.euler import Churning
from minidiff.samplers.levels import Final, OwnSigmas
from minidiff.samplers.method import Draw, Empty, Given, Levels, Next, Outputs, Plan, R, S
from minidiff.samplers.options import UpTo3
from minidiff.schedule import NoiseSchedule, check_steps

MAX_STEPS = 1000

Wrapping = namedtuple("Wrapping", "c_in c_skip c_out")
Seen = namedtuple("Seen", "seen")
"""``seen``: the columns at sigma, where the model is called."""


@dataclass(frozen=True, kw_only=True)
class EDMOptions(OwnSigmas[R, S]):
    """Options common to both methods for such models: those of :class:`OwnSigmas` and :class:`Limited`, and

    ``sigma_spacing``: "karras" is even in sigma**(1/rho), "exponential" in log sigma. ``final_sigma``: the last step
    lands on 0 after the spacing, or on the last sigma of the spacing.
    """

    places_in: ClassVar[torch.dtype] = torch.float32  # the dtype in which the positions of the sigmas are computed

    sigma_spacing: Literal["karras", "exponential"] = "karras"
    final_sigma: Final = "zero"

    def wrapping(self, sigma: Tensor, prediction: Prediction) -> Wrapping:
        """Return the columns at ``sigma`` (n,)."""
        variance = sigma**2 + self.sigma_data**2
        c_in = 1 / variance**0.5
        if prediction == "sample":
            return Wrapping(c_in, torch.zeros_like(sigma), torch.ones_like(sigma))
        signed = sigma if prediction == "epsilon" else -sigma
        return Wrapping(c_in, self.sigma_data**2 / variance, signed * self.sigma_data / variance**0.5)

    def picture(self, at: Wrapping, x: Tensor, out: Tensor) -> Tensor:
        """Return the picture that the model sees in ``x``, limited, in the wider dtype."""
        return self.limit(at.c_skip * x + meet(at.c_out * out, x))

    def denoised(self, plan: Plan[Any], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        return self.picture(plan.at(i).seen, x, out)

    def scale_input(self, plan: Plan[Any], i: int, x: Tensor) -> Tensor:
        seen: Tensor = x * plan.at(i).seen.c_in
        return seen

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        if given.sigmas is not None:
            s = self.grid.given(given.sigmas, self.run)
        else:
            n = check_steps(given.steps, MAX_STEPS) + (0 if self.final_sigma == "zero" else self.grid.further)
            s = self.run(torch.linspace(0, 1, n, dtype=self.places_in, device="cpu"))
        return self.between(s, self.grid.highest(s, self.sigma_max, given.sigmas is not None))

    def run(self, places: Tensor) -> Tensor:
        """Return the sigmas, (n + 1,) float32, of a run over ``places`` between sigma_max (0) and sigma_min (1)."""
        s = self.sigmas_at(places)
        fits = s.ndim == 1 and len(s) > 0 and bool(((s > 0) & s.isfinite()).all())
        wanted = "sigmas are places between sigma_max (0) and sigma_min (1) here"
        check(fits, f"{self.name}: {wanted}, got {quote(places.tolist())}")
        return self.landed(s)

    def between(self, s: Tensor, highest: float) -> Levels:
        """Return the levels of float32 sigmas ``s`` (n + 1,), whose first noise is that of sigma ``highest``."""
        top = torch.tensor(highest, dtype=torch.float64, device="cpu")
        return Levels(0.25 * torch.log(s[:-1]), s[:-1], s[1:], ((top**2 + 1) ** 0.5).float())

    def sigmas_at(self, places: Tensor) -> Tensor:
        """Return the sigmas, (n,) float32, at ``places`` between sigma_max (0) and sigma_min (1)."""
        if self.sigma_spacing == "exponential":
            low, high = math.log(self.sigma_min), math.log(self.sigma_max)
            return torch.linspace(low, high, len(places), dtype=torch.float32, device="cpu").exp().flip(0)
        sigmas: Tensor = self.karras(places).to(torch.float32)
        return sigmas

    def landed(self, sigmas: Tensor) -> Tensor:
        """Return ``sigmas`` with the one on which the run lands: 0, the last of them, or that of the reference."""
        if self.final_sigma == "zero":
            return torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
        return sigmas if self.grid.further else torch.cat([sigmas, self.last(sigmas).reshape(1)])

    def last(self, sigmas: Tensor) -> Tensor:
        """Return the sigma on which the reference's last step lands with final_sigma="sigma_min"."""
        return sigmas[-1]


EulerRow = namedtuple("EulerRow", "seen hat churn")
"""``seen``: at sigma, where the model is called; ``hat``: at sigma_hat, where the step starts."""


@dataclass(frozen=True, kw_only=True)
class EDMEuler(Churning[EulerRow], EDMOptions[EulerRow, Empty]):
    """Euler sampler for EDM. Options: :class:`EDMOptions`, and the churn of :class:`~minidiff.samplers.euler.Euler`."""

    takes = ("steps", "sigmas")
    places_in = torch.float64

    def step(self, plan: Plan[EulerRow], i: int, x: Tensor, out: Tensor, state: Empty, draw: Draw) -> Next[Empty]:
        at = plan.at(i)
        return self.churned_step(at.churn, x, out, draw, lambda x: self.picture(at.hat, x, out)), state

    def denoised(self, plan: Plan[EulerRow], i: int, x: Tensor, out: Tensor, state: Empty) -> Tensor:
        """Compute x0 from the sample that the model saw, before any churn."""
        return super().denoised(plan, i, upcast(x), out, state)

    def rows(self, at: Levels, prediction: Prediction) -> EulerRow:
        churn = self.churn(at, len(at.here))
        return EulerRow(self.wrapping(at.here, prediction), self.wrapping(churn.sigma_hat, prediction), churn)


MultistepRow = namedtuple("MultistepRow", "seen step")


@dataclass(frozen=True, kw_only=True)
class EDMMultistep(EDMOptions[MultistepRow, Outputs]):
    """DPM-Solver++ for EDM. Options: those of :class:`EDMOptions`, and

    ``solver_order`` 1 to 3; ``sde``: fresh noise at every step, up to order 2; ``heun``: Heun's second-order weight
    instead of the midpoint's. ``lower_order_final`` lowers the order of the last two steps if there are fewer than 15;
    ``euler_at_final`` always lowers that of the last step, as landing on sigma 0 does in any case.
    """

    solver_order: UpTo3 = 2
    sde: bool = False
    heun: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.sde or self.solver_order < 3, "solver_order=3 does not go with sde (sde-dpmsolver++): use 2")

    def step(
        self, plan: Plan[MultistepRow], i: int, x: Tensor, out: Tensor, state: Outputs, draw: Draw
    ) -> Next[Outputs]:
        x0, at = self.denoised(plan, i, x, out, state), plan.at(i)
        outputs = (*state, x0)[-3:]
        after = multistep(at.step, x, outputs)
        return after + at.step.fresh * draw(x0) if self.sde else after, outputs

    def last(self, sigmas: Tensor) -> Tensor:
        return torch.tensor(self.sigma_min, dtype=torch.float32, device="cpu")

    def rows(self, at: Levels, prediction: Prediction) -> MultistepRow:
        one, h = torch.ones_like(at.here), torch.log(at.here) - torch.log(at.to)
        algorithm: Algorithm = "sde-dpmsolver++" if self.sde else "dpmsolver++"
        kind: SolverType = "heun" if self.heun else "midpoint"
        steps = multistep_rows(self, algorithm, kind, (one, at.here), (one, at.to), h)
        return MultistepRow(self.wrapping(at.here, prediction), steps)
