"""DPM++ SDE: the second-order singlestep method with fresh noise (k-diffusion's sample_dpmpp_sde, Katherine Crowson).

Each interval from sigma to sigma_to takes two model calls. From the first, at its start, an ancestral step (split as in
Euler ancestral, but along the exact solution in log sigma) leads to the middle, halfway in log sigma. The x0 of the
second call, in the middle, replaces the first in a step over the whole interval. The noise of both steps comes from one
Brownian path with sigma as its time, so that the noise of the second step includes that of the first. n steps make
2n - 1 model calls; the last step, to sigma 0, is an Euler step.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.errors import ConfigError
from minidiff.samplers.arithmetic import earlier, interleave
from minidiff.samplers.brownian import BrownianTree
from minidiff.samplers.checks import check_finite
from minidiff.samplers.grid import to_timesteps
from minidiff.samplers.levels import SpacedSigmas, sigma_table
from minidiff.samplers.method import Draw, Given, History, Levels, Next, Plan
from minidiff.samplers.options import Rule
from minidiff.schedule import NoiseSchedule

Row = namedtuple("Row", "x_coef x0_coef sigma_up dt root_dt first_part second_part path")
"""A step is ``x_coef`` * x - ``x0_coef`` * x0 + ``sigma_up`` * noise; ``dt`` is for the last row. ``root_dt`` is what
an increment of the path is divided by; ``first_part`` and ``second_part`` make the noise of an odd row (the middle of
an interval) of two draws. ``path``: the Brownian path and interval of each row's noise, if there is a seed."""


@dataclass(frozen=True, kw_only=True)
class DPMSDE(SpacedSigmas[Row, History]):
    """DPM++ SDE sampler. Options: those of :class:`SpacedSigmas`; ``s_noise`` multiplies the noise; ``noise_seed``:
    seed of the Brownian path, drawn as in torchsde, one for the whole batch (None: the path consists of the run's own
    draws).

    Without a seed, diffusers takes one from torch's global generator: such pictures cannot be reproduced, neither there
    nor here.
    """

    initial = History()
    order = 2
    counts_in = np.float64  # which moves the last bits of the sigmas

    s_noise: float = 1.0
    noise_seed: Annotated[int | None, Rule(lambda v: v >= 0, "must not be negative")] = None

    def step(self, plan: Plan[Row], i: int, x: Tensor, out: Tensor, state: History, draw: Draw) -> Next[History]:
        """Compute in the dtype of ``x``."""
        at, x0 = plan.at(i), self.denoised(plan, i, x, out, state)
        if i == len(plan) - 1:  # to sigma 0
            return x + (x - x0) / plan.levels.here[i] * at.dt, state
        if i % 2 and state.base is None:
            raise ConfigError(f"DPM++ SDE can't start at row {i}, in the middle of an interval: start at an even row")
        base = x if state.base is None else state.base
        noise = self._noise(at, x, state, draw)
        after = at.x_coef * base - at.x0_coef * x0 + noise * self.s_noise * at.sigma_up
        return after, History() if i % 2 else History(base=x, noise=noise)

    def _noise(self, at: Row, x: Tensor, state: History, draw: Draw) -> Tensor:
        """Return standard normal noise: the path's increment over the row's step, divided by the root of its length."""
        if at.path is not None:
            tree, low, high = at.path
            noise: Tensor = tree.increment(low, high, x) * -1.0 / at.root_dt
            return noise
        fresh = draw(x)
        return fresh if state.noise is None else at.first_part * state.noise + at.second_part * fresh

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        """Return the levels of 2n - 1 rows, including the middles."""
        table = sigma_table(schedule, self.last_alpha_bar)
        t, sigmas = self.visited(schedule, given)  # of the ends, in float64
        if given.sigmas is not None:
            sigmas = sigmas.astype(np.float64)
            t = to_timesteps(sigmas[:-1], table)
        logs = -np.log(sigmas[:-1])
        between = to_timesteps(np.exp(-(logs[:-1] + np.diff(logs) * 0.5)), table)
        times = interleave(*(torch.from_numpy(column.astype(np.float64)) for column in (t, between)))
        s = torch.from_numpy(sigmas.astype(np.float32))
        now, after = -s[:-1].log(), -s[1:].log()
        middle = torch.exp(-(now + (after - now) * 0.5))
        here, to = interleave(s[:-1], middle), interleave(middle, torch.exp(-after))
        to[-1] = s[-1]
        listed = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
        times, put = self.grid.in_halves(times, listed)
        return self.between(times, here, to, sigmas=listed, put=put)

    def require_usable(self, rows: Row) -> None:
        check_finite(self, rows.first_part)

    def rows(self, at: Levels, prediction: Prediction) -> Row:
        sigma = at.here[0::2].repeat_interleave(2)[: len(at.here)]
        now = -sigma.log()
        start = torch.exp(-now)
        up = torch.minimum(at.to, (at.to**2 * (start**2 - at.to**2) / start**2) ** 0.5)
        down = -((at.to**2 - up**2) ** 0.5).log()
        length = (at.to - start).abs()
        half = earlier(length)  # odd rows: that of the half before
        coefs = {"x_coef": torch.exp(-down) / torch.exp(-now), "x0_coef": torch.expm1(now - down), "sigma_up": up}
        return Row(
            **{name: torch.cat([column[:-1], torch.zeros_like(column[-1:])]) for name, column in coefs.items()},
            dt=at.to - sigma,
            root_dt=length.sqrt(),
            first_part=(half / length) ** 0.5,
            second_part=(1 - half / length).clamp(min=0) ** 0.5,
            path=self._path(at, start.tolist()),
        )

    def _path(self, at: Levels, starts: list[float]) -> tuple[Any, ...]:
        """Return where the noise of each row comes from, from its start to where it lands; the last row draws none."""
        if self.noise_seed is None:
            return (None,) * len(starts)
        ends = torch.cat([at.here[0::2], at.to[-1:]])
        positive = ends[ends > 0]
        tree = BrownianTree(positive.min().item(), positive.max().item(), self.noise_seed)
        rows = zip(starts[:-1], at.to[:-1].tolist(), strict=True)
        return (*((tree, to, start) for start, to in rows), None)
