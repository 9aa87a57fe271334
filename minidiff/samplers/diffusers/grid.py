"""Slips of diffusers 0.42.1 in choosing timesteps and sigmas, which samplers with ``like_diffusers`` repeat.

They are the places where the reference leaves the published method or its own documentation. Everything else that a run
visits is as in minidiff, so a checkpoint's own scheduler_config.json gives the same levels in both programs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from minidiff.samplers.grid import Floats, Grid
from minidiff.schedule import Spacing, check_steps


class DiffusersGrid(Grid):
    """The choices of diffusers.

    ``lowest`` and ``beyond``: trailing spacing may end at timestep -1, and 1000 steps with an offset of 1 begin at
    timestep 1000. ``further``: a curve has reached its end one step before the last, which does (next to) nothing.
    """

    lowest: ClassVar[int] = -1
    beyond: ClassVar[int] = 1
    further: ClassVar[int] = 0

    def spaced(self, spacing: Spacing, total: int, steps: Any, offset: int, whole: bool = True) -> Floats:
        """Return the timesteps of ``steps`` rows. Trailing has one more, at timestep -1, for 62 step counts below 1000
        (61 is the first), and a single step of linspace is timestep 0 instead of the last one."""
        n = check_steps(steps, total)
        if spacing == "trailing":
            t = self.trailing(total, total, n)
        elif spacing == "linspace" and n == 1:
            t = np.zeros(1)
        else:
            return super().spaced(spacing, total, n, offset, whole)
        return t.astype(np.int64 if whole else np.float32)

    def landing(self, t: Tensor, apart: int) -> Tensor:
        """Return ``t`` - ``apart``, although trailing and linspace spacing have their next row elsewhere."""
        return t - apart

    def trailing(self, total: int, last: int, n: int) -> Floats:
        """Return the points from ``last`` down, T / n apart although only part of T may be in use: n, or another
        number."""
        t: Floats = np.arange(last, 0, -(total / n)).round() - 1
        return t

    def of_curve(self, t: Floats, cut: bool) -> Floats:
        """Return ``t`` in whole numbers, although the sigmas lie between those of training."""
        return (t if cut else t.round()).astype(np.int64)


DIFFUSERS = DiffusersGrid()
