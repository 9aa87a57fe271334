"""Noise levels of other programs: their tables of alpha_bar and sigma, and their schedules over those tables.

The formulas are those of the files that profiles.py cites, computed in torch float32 as there. A schedule of n steps is
(n + 1,) falling sigmas, the last of them 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minidiff.config import ScheduleConfig, check
from minidiff.samplers.betainc import inverse_betainc
from minidiff.schedule import NoiseSchedule, check_steps


@dataclass(frozen=True, eq=False)
class Table:
    """Noise levels of training in a program: float32 ``sigmas`` and ``logs`` (T,), rising."""

    schedule: NoiseSchedule
    sigmas: Tensor
    logs: Tensor

    def at(self, t: Tensor) -> Tensor:
        """Return sigma at timesteps ``t`` (n,), which may be fractional, interpolated in log sigma."""
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self.logs[low] + share * self.logs[high]).exp()

    def fractional(self, sigmas: Tensor) -> Tensor:
        """Return the fractional timesteps (n,) of ``sigmas`` (n,): the inverse of :meth:`at`."""
        apart = sigmas.log() - self.logs[:, None]
        low = apart.ge(0).cumsum(dim=0).argmax(dim=0).clamp(max=len(self.logs) - 2)
        below, above = self.logs[low], self.logs[low + 1]
        share = ((below - sigmas.log()) / (below - above)).clamp(0, 1)
        return (1 - share) * low + share * (low + 1)

    def nearest(self, sigmas: Tensor) -> Tensor:
        """Return the whole timesteps (n,), as float32, with the nearest log sigma."""
        return (sigmas.log() - self.logs[:, None]).abs().argmin(dim=0).float()


def noise_table(kind: str, config: ScheduleConfig) -> Table:
    """Return the table of ``config``: "float32" throughout; "rounded": alpha_bar in float64, then float32; "float64":
    sigma in float64 too. Zero-SNR and curved schedules, which these programs build otherwise or not at all, are
    float32.
    """
    schedule = NoiseSchedule.from_config(config)
    even = config.beta_schedule in ("linear", "scaled_linear") and config.betas is None
    if kind == "float32" or not even or config.zero_snr:
        return Table(schedule, schedule.sigmas, schedule.sigmas.log())
    power = 2 if config.beta_schedule == "scaled_linear" else 1
    ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    betas = torch.linspace(*ends, config.steps, dtype=torch.float64, device="cpu") ** power
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    exact = NoiseSchedule(alpha_bar.float(), config.prediction)
    if kind == "rounded":
        return Table(exact, exact.sigmas, exact.sigmas.log())
    sigmas = ((1 - alpha_bar) / alpha_bar) ** 0.5
    return Table(exact, sigmas.float(), sigmas.log().float())


def strided(total: int, steps: int) -> list[int]:
    """Return falling timesteps: ..., 1 + 2c, 1 + c, 1, for c = total // steps."""
    check_steps(steps, total)
    return [t + 1 for t in range(0, total, total // steps)][::-1]


def uniform(table: Table, n: int) -> Tensor:
    """Space ``n`` levels evenly from the last timestep to 0, as k-diffusion does."""
    return table.at(torch.linspace(len(table.sigmas) - 1, 0, n, dtype=torch.float32, device="cpu"))


def karras(table: Table, n: int) -> Tensor:
    """Space ``n`` levels evenly in sigma ** (1/7) (Karras et al. 2022, equation 5)."""
    low, high = (float(end) ** (1 / 7) for end in (table.sigmas[0], table.sigmas[-1]))
    ramp: Tensor = high + torch.linspace(0, 1, n, dtype=torch.float32, device="cpu") * (low - high)
    return ramp.pow(7.0)


def exponential(table: Table, n: int) -> Tensor:
    """Space ``n`` levels evenly in log sigma."""
    low, high = (math.log(float(end)) for end in (table.sigmas[0], table.sigmas[-1]))
    return torch.linspace(high, low, n, dtype=torch.float32, device="cpu").exp()


def simple(table: Table, n: int) -> Tensor:
    """Take every T / n-th level from the top, cut to whole timesteps (ComfyUI); the lowest ones are never reached."""
    apart = len(table.sigmas) / n
    return table.sigmas[[-(1 + int(i * apart)) for i in range(n)]]


def normal(table: Table, n: int) -> Tensor:
    """Space levels as :func:`uniform`, in ComfyUI's own table."""
    return uniform(table, n)


def sgm_uniform(table: Table, n: int) -> Tensor:
    """Take n of the n + 1 points that divide the timesteps evenly, without the lowest (ComfyUI)."""
    return uniform(table, n + 1)[:-1]


def ddim_uniform(table: Table, n: int) -> Tensor:
    """Take every T // n-th level from timestep 1 up (ComfyUI): more than n if n does not divide T."""
    return table.sigmas[1 :: max(len(table.sigmas) // n, 1)].flip(0)


def beta(table: Table, n: int) -> Tensor:
    """Take the quantiles of Beta(0.6, 0.6), rounded to whole timesteps, each once (ComfyUI; Lee 2024)."""
    shares = 1 - np.linspace(0, 1, n, endpoint=False)
    places = inverse_betainc(0.6, 0.6, shares) * (len(table.sigmas) - 1)
    t = np.floor(places + (0.5 + 1e-9)).astype(int).tolist()  # the median is a tie, which scipy's last bit rounds up
    return table.sigmas[sorted(set(t), reverse=True)]


SCHEDULERS: dict[str, Callable[[Table, int], Tensor]] = {
    "uniform": uniform,
    "karras": karras,
    "exponential": exponential,
    "simple": simple,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
}


def levels(table: Table, scheduler: str, steps: int, discard: bool = False, last: float = 0.0) -> Tensor:
    """Return the (n + 1,) falling sigmas of ``steps``, the last of which is ``last``.

    ``discard``: schedule one step more, and leave out its last sigma above 0: methods that evaluate the middle of an
    interval (DPM2) then stay away from the smallest sigmas. Raises :class:`ConfigError` if no sigma is left.
    """
    check_steps(steps, len(table.sigmas) - discard)
    sigmas = SCHEDULERS[scheduler](table, steps + discard)
    sigmas = sigmas[:-1] if discard else sigmas
    check(len(sigmas) > 0, f"steps={steps}: scheduler {scheduler} leaves no sigma; use more steps")
    return torch.cat([sigmas, torch.tensor([last], dtype=torch.float32, device="cpu")])
