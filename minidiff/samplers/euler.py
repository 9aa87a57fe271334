"""Euler: solve the probability-flow equation in sigma by straight lines (Karras et al. 2022, algorithms 1 and 2).

The path back to the picture is dx / d sigma = (x - x0) / sigma; a step follows that slope to the next sigma, the last
of which is 0. With ``s_churn`` a step first adds a little noise, up to sigma_hat (algorithm 2, lines 4 to 6); as in
the reference, the model has been asked before that.

The step is x0 = x - sigma * epsilon, then x + (x - x0) / sigma * (sigma_next - sigma). That is
x + epsilon * (sigma_next - sigma) but for rounding, and the short form differs from the reference at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Draw, Options, check_chosen, check_timesteps, need_schedule
from minidiff.samplers.sigma_plan import SigmaPlan, sigma_rows, sigma_x0, upcast, widen
from minidiff.samplers.sigmas import Floats, SigmaSpacing
from minidiff.schedule import NoiseSchedule, Spacing, spaced

MAX_GAMMA = 2**0.5 - 1  # churn at most doubles the variance in one step


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EulerPlan(SigmaPlan):
    """Rows: ``sigma_hat``, sigma after the churn; ``churn``, what its noise is multiplied by, and ``churned``, whether
    there is any; ``dt``, from sigma_hat to the next sigma."""

    sigma_hat: Tensor
    churn: Tensor
    churned: tuple[bool, ...]
    dt: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        churn = {"sigma_hat": self.sigma_hat, "churn": self.churn} if any(self.churned) else {}
        return super().columns() | churn | {"dt": self.dt}


@dataclass(frozen=True, kw_only=True)
class Euler(Options):
    """The options.

    ``sigma_spacing``: "timesteps" takes the sigmas at ``spacing``'s timesteps; "karras", "exponential" and "beta" go
    from ``sigma_max`` to ``sigma_min`` (None: the ends that ``spacing`` reaches). ``interpolation``: "log_linear"
    spaces the sigmas of all of training evenly in their logarithm. ``continuous``: a v-prediction model is told
    log(sigma) / 4 instead of a timestep, as in EDM and Stable Video Diffusion. ``final_sigma``: the last step lands on
    0, or on training's smallest. ``s_churn`` (0: none) is spread over all steps and works where sigma lies in
    ``s_tmin``..``s_tmax`` (None: no upper bound), with its noise times ``s_noise``. ``last_alpha_bar`` replaces the 0
    at the end of a zero-SNR schedule, where sigma would be infinite.

    ``like_diffusers``: log_linear has a sigma too many, so that the last step stops at training's smallest, and keeps
    the timesteps of ``spacing``, or those given, which are not where its sigmas are; timestep T, which 1000 steps with
    an offset of 1 begin with, is let through.
    """

    in_sigma: ClassVar[bool] = True

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    sigma_spacing: SigmaSpacing = "timesteps"
    interpolation: Literal["linear", "log_linear"] = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    continuous: bool = False
    final_sigma: Literal["zero", "sigma_min"] = "zero"
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float | None = None
    s_noise: float = 1.0
    last_alpha_bar: float = 2**-24

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.s_churn >= 0, f"s_churn={self.s_churn} must not be negative")
        check(0 < self.last_alpha_bar < 1, f"last_alpha_bar={self.last_alpha_bar} must lie between 0 and 1")
        for name, sigma in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            check(sigma is None or sigma > 0, f"{name}={sigma} must be positive, or None")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> EulerPlan:
        """``timesteps``: falling, fractions allowed. ``sigmas``: falling, one more than there are to be steps."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps timesteps sigmas", steps=steps, timesteps=timesteps, sigmas=sigmas)
        table = spacings.sigma_table(schedule, self.last_alpha_bar)
        if sigmas is None:
            times, levels = self._levels(steps, timesteps, table)
        else:
            levels = spacings.given(sigmas)
            times = spacings.to_timesteps(levels[:-1], table)
        s = torch.from_numpy(levels)
        if self.continuous and schedule.prediction == "v_prediction":
            check(timesteps is None, "Euler: timesteps can't be given with continuous=True, give sigmas")
            t = 0.25 * s[:-1].log()
        else:
            t = torch.from_numpy(times.astype(np.float32))

        sigma = s[: len(t)]
        gamma = min(self.s_churn / (len(s) - 1), MAX_GAMMA)
        churned = (sigma >= self.s_tmin) & (gamma > 0)
        if self.s_tmax is not None:
            churned &= sigma <= self.s_tmax
        sigma_hat = torch.where(churned, sigma * (gamma + 1), sigma)
        return EulerPlan(
            **sigma_rows(t, s, self.spacing, schedule.prediction),
            sigma_hat=sigma_hat,
            churn=(sigma_hat**2 - sigma**2) ** 0.5,
            churned=tuple(churned.tolist()),
            dt=s[1 : len(t) + 1] - sigma_hat,
        )

    def _levels(self, steps: int | None, timesteps: Sequence[float] | None, table: Floats) -> tuple[Floats, Floats]:
        """Timesteps (n,) and sigmas (n + 1,) of ``steps``, or of the ``timesteps`` given."""
        if timesteps is not None:
            plain = self.sigma_spacing == "timesteps"
            check(plain, f"Euler: timesteps can't be given with sigma_spacing={self.sigma_spacing!r}, give steps")
            t: Floats = np.array(timesteps, dtype=np.float32)
        else:
            like, offset = self.like_diffusers, self.steps_offset
            t = spaced(self.spacing, len(table), steps or 0, offset, whole=False, like_diffusers=like)
        check_timesteps(self, t, len(table) + self.like_diffusers)
        n = len(t)
        if self.interpolation == "log_linear":
            known = timesteps is None or self.like_diffusers
            check(known, "Euler: interpolation='log_linear' has timesteps of its own: give steps or sigmas")
            high, low = float(np.log(table[-1])), float(np.log(table[0]))
            sigmas: Floats = (
                torch.linspace(high, low, n + self.like_diffusers, dtype=torch.float32, device="cpu").exp().numpy()
            )
            t = t if self.like_diffusers else spacings.to_timesteps(sigmas, table)
        else:
            sigmas = spacings.at_timesteps(t, table)
        if self.sigma_spacing != "timesteps":
            low = float(sigmas[-1]) if self.sigma_min is None else self.sigma_min
            high = float(sigmas[0]) if self.sigma_max is None else self.sigma_max
            check(low <= high, f"Euler: sigma_min={low:g} is above sigma_max={high:g}")
            sigmas = spacings.CURVES[self.sigma_spacing](low, high, n)
            t = spacings.to_timesteps(sigmas, table)
        last = table[0] if self.final_sigma == "sigma_min" else 0.0
        return t, np.concatenate([sigmas, [last]]).astype(np.float32)

    def start(self) -> tuple[()]:
        return ()

    def scale_input(self, plan: EulerPlan, i: int, x: Tensor) -> Tensor:
        return x / plan.in_scale[i]

    def denoised(self, plan: EulerPlan, i: int, x: Tensor, out: Tensor, state: tuple[()]) -> Tensor:
        """From the sample that the model saw, before any churn."""
        return sigma_x0(plan, i, upcast(x), out, plan.sigmas[i])

    def step(
        self, plan: EulerPlan, i: int, x: Tensor, out: Tensor, state: tuple[()], draw: Draw
    ) -> tuple[Tensor, tuple[()]]:
        x = upcast(x)
        if plan.churned[i]:
            x = x + widen((draw(out) * self.s_noise) * plan.churn[i])
        sigma_hat = plan.sigma_hat[i]
        slope = (x - widen(sigma_x0(plan, i, x, out, sigma_hat))) / sigma_hat
        return (x + slope * plan.dt[i]).to(out.dtype), state
