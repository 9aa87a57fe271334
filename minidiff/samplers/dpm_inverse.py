"""DPM-Solver run backwards: from a picture to the noise it could have been made of.

The equation without fresh noise is the same in both directions, so the steps are those of ``dpm_solver.py`` with
negative h: sigma rises from the smallest of training to the largest. Used for editing pictures by inversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Draw, check_chosen, need_schedule
from minidiff.samplers.dpm_solver import DPMSolver, DPMSolverPlan, History, multistep, multistep_coefficients
from minidiff.samplers.lambda_plan import lambda_rows, usable
from minidiff.samplers.sigma_plan import upcast
from minidiff.samplers.sigmas import Floats
from minidiff.schedule import NoiseSchedule, check_steps


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

    final_sigma: Literal["zero", "sigma_min"] = "sigma_min"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.final_sigma == "sigma_min", "DPMSolverInverse can't begin at sigma 0: leave final_sigma='sigma_min'")
        check(not self.algorithm.startswith("sde"), f"algorithm={self.algorithm!r} adds noise: it can't be inverted")
        known = self.sigma_spacing != "lu"
        check(known, "DPMSolverInverse has no sigma_spacing='lu'; it knows timesteps, karras, exponential, beta")

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> DPMSolverPlan:
        """``steps`` in 1..T; the reference takes no timesteps or sigmas of one's own, and neither does this."""
        schedule = need_schedule(schedule, self)
        check_chosen(self, "steps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        t, s = self._rising(schedule, steps)
        n = len(t)
        rows = lambda_rows(t, s, schedule.prediction)
        rows["h"] = rows["h"][:n]
        signal, noise = rows["signal"][: n + 1], rows["noise"][: n + 1]
        by_order = multistep_coefficients(self.algorithm, self.solver_type, signal, noise, rows["h"], True)
        orders = self._orders(n)
        for order, coefs in enumerate(by_order, 1):
            rows |= usable(self, orders, order, coefs)
        return DPMSolverPlan(**rows, orders=orders)

    def _rising(self, schedule: NoiseSchedule, steps: int | None) -> tuple[Tensor, Tensor]:
        """Timesteps (n,) and float32 sigmas (n + 1,), from the picture up."""
        table = spacings.sigma_table(schedule, self.last_alpha_bar)
        n, last = check_steps(steps, len(table)), self._last(schedule)
        if self.sigma_spacing == "timesteps":
            t = self._upwards(len(table), n, last)
            inside = t[0] >= -self.like_diffusers and t[-1] < len(table)
            check(inside, f"{self._name}: timesteps run from {t[0]} to {t[-1]}, the model knows 0 to {len(table) - 1}")
            levels, landing = spacings.at_timesteps(t, table), float(table[last - 1])
        else:
            levels = self._bent(n + (not self.like_diffusers), table)
            landing, levels = levels[-1], levels[:n]
            t = self._times(levels, table)
        sigmas = np.concatenate([levels, [landing]]).astype(np.float32)
        return torch.from_numpy(t), torch.from_numpy(sigmas)

    def _upwards(self, total: int, n: int, last: int) -> Floats:
        """(n,) int64, rising: n of the n + 1 points that divide the lowest ``last`` timesteps of ``total``."""
        if self.spacing == "trailing":
            step = total / n if self.like_diffusers else last / (n + 1)
            t = np.arange(last, 0, -step).round()[::-1] - 1
            t = t if self.like_diffusers else t[-n - 1 : -1]  # without the top, where the last step lands
        elif self.spacing == "leading":
            t = np.arange(n) * (last // (n + 1)) + self.steps_offset
        else:
            t = np.linspace(0, last - 1, n + 1).round()[:-1]
        repeated = len(t) > 1 and bool((t[:-1] >= t[1:]).any())
        check(not repeated, f"{self._name}: steps={n} of spacing={self.spacing!r} visit a timestep twice; use fewer")
        rising: Floats = t.astype(np.int64)
        return rising

    def _times(self, levels: Floats, table: Floats) -> Floats:
        t = spacings.to_timesteps(levels, table)
        if not self.like_diffusers:
            return t.astype(np.float32)
        t = t.round() if self.sigma_spacing == "karras" else t
        _, seen = np.unique(t, return_index=True)
        return t[np.sort(seen)].astype(np.int64)

    def _bent(self, n: int, table: Floats) -> Floats:
        """(n,) float64 sigmas of the chosen spacing, from the bottom up."""
        ends = (self.sigma_max, self.sigma_min) if self.like_diffusers else (self.sigma_min, self.sigma_max)
        low = float(table[0]) if ends[0] is None else ends[0]
        high = float(table[-1]) if ends[1] is None else ends[1]
        check(self.like_diffusers or low <= high, f"{self._name}: sigma_min={low:g} is above sigma_max={high:g}")
        return spacings.CURVES[self.sigma_spacing](high, low, n)  # upside down

    def step(
        self, plan: DPMSolverPlan, i: int, x: Tensor, out: Tensor, state: History, draw: Draw
    ) -> tuple[Tensor, History]:
        """In float32, since the first steps multiply the difference of x and x0 by 10 and more."""
        if self.like_diffusers:
            outputs = (*state.outputs, self.convert(plan, i, x, out, state))[-self.solver_order :]
            return multistep(plan, i, x, outputs), History(outputs)
        wide = upcast(x)
        outputs = (*state.outputs, self.convert(plan, i, wide, upcast(out), state))[-self.solver_order :]
        return multistep(plan, i, wide, outputs).to(out.dtype), History(outputs)
