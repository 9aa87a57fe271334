"""Slips of diffusers 0.42.1 in choosing timesteps and sigmas, which samplers with ``like_diffusers`` repeat.

They are the places where the reference leaves the published method or its own documentation. Everything else that a run
visits is as in minidiff, so a checkpoint's own scheduler_config.json gives the same levels in both programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.samplers.arithmetic import Put
from minidiff.samplers.grid import Floats, Grid, log_linear
from minidiff.schedule import Spacing, check_steps


class DiffusersGrid(Grid):
    """The choices of diffusers.

    ``lowest`` and ``beyond``: trailing spacing may end at timestep -1, and 1000 steps with an offset of 1 begin at
    timestep 1000. ``further``: a curve that ends above 0 has reached its end one step early, so that the last step does
    (next to) nothing: DEIS, UniPC, SA-Solver, EDM and the inverse methods land on the same sigma again, the other
    DPM-Solvers on training's smallest.
    """

    lowest: ClassVar[int] = -1
    beyond: ClassVar[int] = 1
    further: ClassVar[int] = 0

    def spaced(
        self, spacing: Spacing, total: int, steps: Any, offset: int, dtype: type[np.generic] = np.int64
    ) -> Floats:
        """Return the timesteps of ``steps`` rows. Trailing has one more, at timestep -1, for 62 step counts below 1000
        (61 is the first), and a single step of linspace is timestep 0 instead of the last one."""
        n = check_steps(steps, total)
        if spacing == "trailing":
            t = self.trailing(total, total, n)
        elif spacing == "linspace" and n == 1:
            t = np.zeros(1)
        else:
            return super().spaced(spacing, total, n, offset, dtype)
        return t.astype(dtype)

    def landing(self, t: Tensor, apart: int) -> Tensor:
        """Return ``t`` - ``apart``, although trailing and linspace spacing have their next row elsewhere."""
        return t - apart

    def middle(self, t: Tensor, apart: int) -> Tensor:
        """Return the timesteps half of ``apart`` above the lower ones, wherever the upper ones are."""
        return t[1:] + apart // 2

    def halfway(self, t: Tensor, apart: int) -> Tensor:
        """Return the timesteps half of ``apart`` below."""
        return t - apart // 2

    def above(self, t: Tensor, apart: int, total: int) -> Tensor:
        """Return ``t`` + ``apart``."""
        return (t + apart).clamp(max=total - 1)

    def cut(self, t: Floats, kept: int) -> tuple[Floats, bool]:
        """Return the lowest of given timesteps. A distilled model's run compares its row with the length of the whole
        list, and so misses its end if some are cut off."""
        return super().cut(t, kept)[0], kept < len(t)

    def trailing(self, total: int, last: int, n: int) -> Floats:
        """Return the points from ``last`` down, T / n apart although only part of T may be in use
        (lambda_min_clipped): n of them, one more, or fewer."""
        t: Floats = np.arange(last, 0, -(total / n)).round() - 1
        return t

    def ends(
        self, name: str, sigma_min: float | None, sigma_max: float | None, table: Floats, rises: bool = False
    ) -> tuple[float, float]:
        """Return the ends, exchanged in a run that ``rises``."""
        if not rises:
            return super().ends(name, sigma_min, sigma_max, table)
        return sigma_max or float(table[0]), sigma_min or float(table[-1])

    def of_curve(self, t: Floats, cut: bool, rises: bool = False) -> Floats:
        """Return ``t`` in whole numbers, although the sigmas lie between those of training. A run that ``rises`` drops
        one of two equal ones, but not its sigma, and is off by one row from there on."""
        t = t if cut else t.round()
        return (np.array(list(dict.fromkeys(t.tolist()))) if rises else t).astype(np.int64)

    def log_linear(self, t: Floats, table: Floats, given: bool) -> tuple[Floats, Floats]:
        """Return ``t``, which does not match the sigmas, and one sigma too many, at which the last step stops."""
        return t, log_linear(table, len(t) + 1)

    def at_ends(self, t: Floats, kind: str) -> Floats:
        """Return Karras timesteps in whole numbers, although neither the sigmas nor the middles are rounded."""
        return t.round() if kind == "karras" else t

    def in_halves(self, t: Tensor, listed: Tensor) -> tuple[Tensor, Put | None]:
        """Return float64 timesteps. A picture that is put back in the middle of an interval has the noise of its
        end."""
        return t, ("sigma", listed)

    def put_back(self, alpha_bar: Tensor, t: Tensor) -> Put | None:
        """Return the alpha_bar of whole timesteps, beside which the sigmas may lie."""
        return "alpha_bar", alpha_bar[t]

    def given(self, sigmas: Sequence[float], run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sigmas at the places for which given ``sigmas`` are taken; an exponential run only counts them."""
        return run(torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"))

    def highest(self, sigmas: Tensor, sigma_max: float, given: bool) -> float:
        """Return ``sigma_max``, even if given timesteps or sigmas start lower."""
        return sigma_max


DIFFUSERS = DiffusersGrid()
