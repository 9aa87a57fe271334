"""EDM: Euler for models that were trained in sigma itself (Karras et al. 2022), and what such models are like.

Such a model has no schedule of timesteps: it is trained at any sigma, told log(sigma) / 4, and wrapped so that what it
sees and what it answers have unit variance (Karras, table 1; s is ``sigma_data``, the pictures' standard deviation):

    seen = x / sqrt(sigma**2 + s**2)        x0 = c_skip * x + c_out * out
    c_skip = s**2 / (sigma**2 + s**2)       c_out = sigma * s / sqrt(sigma**2 + s**2)      (-c_out for v-prediction)

So their samplers (this one and that of edm_multistep.py) bring their own sigmas, and take from a schedule no more than
what the model predicts: here "epsilon" and "v_prediction" are the two signs of c_out, and "sample" a model that answers
x0 itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Draw, check_chosen
from minidiff.samplers.euler import MAX_GAMMA
from minidiff.samplers.limits import LimitedOptions
from minidiff.samplers.sigma_plan import SigmaPlan, upcast, widen
from minidiff.schedule import NoiseSchedule, check_steps

MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class EDMOptions(LimitedOptions):
    """Options that both methods for such models share.

    ``sigma_spacing`` goes from ``sigma_max`` to ``sigma_min``: "karras" evenly in sigma**(1/rho), "exponential" evenly
    in log sigma. ``final_sigma``: after that the last step lands on 0, or the last of the spacing is where it lands.

    ``like_diffusers``: with final_sigma="sigma_min" the last step goes from there to itself; and given sigmas are
    taken for places between sigma_max (0) and sigma_min (1), or, with exponential spacing, only counted. The first
    noise is that of sigma_max, wherever they begin.
    """

    in_sigma: ClassVar[bool] = True
    own_levels: ClassVar[bool] = True

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_spacing: Literal["karras", "exponential"] = "karras"
    rho: float = 7.0
    final_sigma: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        falls = 0 < self.sigma_min < self.sigma_max
        check(falls, f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must rise from above 0")
        check(self.sigma_data > 0, f"sigma_data={self.sigma_data} must be positive")
        check(self.rho > 0, f"rho={self.rho} must be positive")

    def places(self, steps: int | None, dtype: torch.dtype) -> Tensor:
        """(n,) from 0 to 1: where the sigmas lie between the ends. One more if the last is where the run lands."""
        n = check_steps(steps, MAX_STEPS)
        n += self.final_sigma == "sigma_min" and not self.like_diffusers
        return torch.linspace(0, 1, n, dtype=dtype, device="cpu")

    def spaced(self, places: Tensor) -> Tensor:
        """(n,) float32: the sigmas at ``places``."""
        if self.sigma_spacing == "karras":
            low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
            sigmas: Tensor = (high + places * (low - high)) ** self.rho
            return sigmas.to(torch.float32)
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.linspace(low, high, len(places), dtype=torch.float32, device="cpu").exp().flip(0)

    def landing(self, sigmas: Tensor, last: Tensor) -> Tensor:
        """``sigmas`` and where the run lands: 0; the last of them by name; ``last`` as the reference has it."""
        if self.final_sigma == "zero":
            return torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
        return torch.cat([sigmas, last.reshape(1)]) if self.like_diffusers else sigmas

    def rows(self, levels: Tensor, schedule: NoiseSchedule | None, highest: float) -> dict[str, Any]:
        """The fields of a :class:`SigmaPlan` for float32 sigmas ``levels`` (n + 1,), the ``highest`` of them first, and
        those of the wrapping."""
        prediction = "epsilon" if schedule is None else schedule.prediction
        sigma, top = levels[:-1], torch.tensor(highest, dtype=torch.float64, device="cpu")
        c_skip, c_out = self.wrapping(sigma, prediction)
        in_scale = (sigma**2 + self.sigma_data**2) ** 0.5
        return {
            "timesteps": 0.25 * torch.log(sigma),
            "alpha_bars": 1 / (sigma**2 + 1),
            "init_noise_sigma": ((top**2 + 1) ** 0.5).float(),
            "prediction": prediction,
            "sigmas": levels,
            "in_scale": in_scale,
            "variance": sigma**2 + 1,
            "c_in": 1 / in_scale,
            "c_skip": c_skip,
            "c_out": c_out,
        }

    def wrapping(self, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at ``sigma`` (n,)."""
        if prediction == "sample":
            return torch.zeros_like(sigma), torch.ones_like(sigma)
        signed = sigma if prediction == "epsilon" else -sigma
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, signed * self.sigma_data / variance**0.5


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EDMPlan(SigmaPlan):
    """Rows: ``c_in``, ``c_skip`` and (from the base) ``c_out``, as above. ``in_scale`` is 1 / c_in."""

    c_in: Tensor
    c_skip: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        return super().columns() | {"c_skip": self.c_skip, "c_out": self.c_out}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EDMEulerPlan(EDMPlan):
    """Rows, as in euler.py: ``sigma_hat``, ``churn``, ``churned`` and ``dt``; ``skip_hat`` and ``out_hat`` are c_skip
    and c_out at sigma_hat."""

    sigma_hat: Tensor
    churn: Tensor
    churned: tuple[bool, ...]
    dt: Tensor
    skip_hat: Tensor
    out_hat: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        churn = {"sigma_hat": self.sigma_hat, "churn": self.churn} if any(self.churned) else {}
        return super().columns() | churn | {"dt": self.dt}


@dataclass(frozen=True, kw_only=True)
class EDMEuler(EDMOptions):
    """The options: those of :class:`EDMOptions`, and the churn of :class:`~minidiff.samplers.euler.Euler`."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float | None = None
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.s_churn >= 0, f"s_churn={self.s_churn} must not be negative")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> EDMEulerPlan:
        """``sigmas``: falling, one more than there are to be steps. ``schedule`` may be None: epsilon."""
        check_chosen(self, "steps sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        highest = self.sigma_max
        if sigmas is not None and not self.like_diffusers:
            s = torch.from_numpy(spacings.given(sigmas))
            highest = s[0].item()
        else:
            if sigmas is None:
                places = self.places(steps, torch.float64)
            else:
                places = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
            spaced = self.spaced(places)
            fits = spaced.ndim == 1 and len(spaced) > 0 and bool(((spaced > 0) & spaced.isfinite()).all())
            check(fits, f"EDMEuler: sigmas are places between sigma_max (0) and sigma_min (1) here, got {sigmas}")
            s = self.landing(spaced, spaced[-1])
        return self.plan_of(s, schedule, highest)

    def plan_of(self, s: Tensor, schedule: NoiseSchedule | None, highest: float) -> EDMEulerPlan:
        """The plan for float32 sigmas ``s`` (n + 1,); the first noise is that of sigma ``highest``."""
        rows, sigma = self.rows(s, schedule, highest), s[:-1]
        gamma = min(self.s_churn / (len(s) - 1), MAX_GAMMA)
        churned = (sigma >= self.s_tmin) & (gamma > 0)
        if self.s_tmax is not None:
            churned &= sigma <= self.s_tmax
        sigma_hat = torch.where(churned, sigma * (gamma + 1), sigma)
        skip_hat, out_hat = self.wrapping(sigma_hat, rows["prediction"])
        return EDMEulerPlan(
            **rows,
            sigma_hat=sigma_hat,
            churn=(sigma_hat**2 - sigma**2) ** 0.5,
            churned=tuple(churned.tolist()),
            dt=s[1:] - sigma_hat,
            skip_hat=skip_hat,
            out_hat=out_hat,
        )

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: EDMEulerPlan, i: int, x: Tensor) -> Tensor:
        return x * plan.c_in[i]

    def denoised(self, plan: EDMEulerPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        """From the sample that the model saw, before any churn."""
        return self.limit(plan.c_skip[i] * upcast(x) + widen(plan.c_out[i] * out))

    def step(
        self, plan: EDMEulerPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x = upcast(x)
        if plan.churned[i]:
            x = x + widen((draw(out) * self.s_noise) * plan.churn[i])
        x0 = self.limit(plan.skip_hat[i] * x + widen(plan.out_hat[i] * out))
        slope = (x - x0) / plan.sigma_hat[i]
        return (x + slope * plan.dt[i]).to(out.dtype), state
