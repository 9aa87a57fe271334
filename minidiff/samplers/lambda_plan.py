"""What the exponential integrators have in common: DPM-Solver, UniPC, DEIS and SA-Solver reckon in lambda.

They keep x at unit variance, x = signal * x0 + noise * epsilon, and measure their way by half the logarithm of the
signal-to-noise ratio, lambda = log(signal / noise) (Lu et al. 2022, "DPM-Solver", section 3). In lambda the linear
part of the equation has a solution in closed form, and only the model's output remains to be approximated: by a
polynomial through its latest values, whose steps h = lambda_next - lambda are what the coefficients are made of. The
last step, to sigma 0, has h infinite: a first-order step that returns x0 itself.

signal and noise follow from sigma = noise / signal, which is what the schedules are spaced in. Unlike the rest of the
family these methods divide training into n + 1 points and leave out the lowest, where the last step lands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Options, Plan, check_timesteps, unit, whole
from minidiff.samplers.limits import dynamic_threshold
from minidiff.samplers.sigmas import Floats, SigmaSpacing
from minidiff.schedule import NoiseSchedule, Spacing, check_steps

FEW = 15  # runs of fewer steps end with steps of lower order, which are more stable there


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LambdaPlan(Plan):
    """``sigmas``, ``signal``, ``noise`` and ``lambdas`` have an entry more than there are rows: where the last step
    lands. ``h`` (n,) is each step in lambda. ``noise_by_timestep``: the start of image to image reads alpha_bar off the
    timestep, not off sigma."""

    sigmas: Tensor
    signal: Tensor
    noise: Tensor
    lambdas: Tensor
    h: Tensor
    noise_by_timestep: bool = False

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        if self.noise_by_timestep:
            return super().add_noise(x0, noise, i)
        signal, sigma = rates(self.sigmas[i].to(x0.dtype))
        return signal * x0 + sigma * noise

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        n = len(self)
        own = {"to sigma": self.sigmas[1 : n + 1], "lambda": self.lambdas[:n], "h": self.h}
        return super().columns() | {"sigma": self.sigmas[:n]} | own


def rates(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, noise) where noise / signal is ``sigma`` (any shape) and signal**2 + noise**2 is 1."""
    signal = 1 / (sigma**2 + 1) ** 0.5
    return signal, sigma * signal


def lambda_rows(timesteps: Tensor, sigmas: Tensor, prediction: Prediction) -> dict[str, Any]:
    """The fields of a :class:`LambdaPlan` for ``timesteps`` (n,) and float32 ``sigmas`` (n + 1,)."""
    signal, noise = rates(sigmas)
    lambdas = torch.log(signal) - torch.log(noise)
    return {
        "timesteps": timesteps,
        "alpha_bars": signal[: len(timesteps)] ** 2,
        "init_noise_sigma": unit(),
        "prediction": prediction,
        "sigmas": sigmas,
        "signal": signal,
        "noise": noise,
        "lambdas": lambdas,
        "h": lambdas[1:] - lambdas[:-1],
    }


@dataclass(frozen=True, kw_only=True)
class LambdaSpacing(Options):
    """Options of the whole family.

    ``sigma_spacing``: "timesteps" takes the sigmas at ``spacing``'s timesteps; "karras", "exponential" and "beta" go
    from ``sigma_max`` to ``sigma_min`` (None: the ends of training). ``lower_order_final``: the last steps use fewer
    outputs. ``threshold``: the percentile of dynamic thresholding of x0 as a fraction (None: none), its bound kept in
    1..``threshold_max``. ``last_alpha_bar`` replaces the 0 at the end of a zero-SNR schedule, where sigma is infinite.

    ``like_diffusers``: the timesteps of the other sigma spacings are made whole: rounded for karras (cut with
    ``cut_timesteps``, as for the cosine schedule in some classes), cut for exponential and beta. trailing has a row
    too many, at timestep -1, for some numbers of steps. And where the last step lands on training's smallest sigma,
    those spacings have reached it before, so that the last step does (next to) nothing.
    """

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    sigma_spacing: SigmaSpacing = "timesteps"
    sigma_min: float | None = None
    sigma_max: float | None = None
    lower_order_final: bool = True
    threshold: float | None = None
    threshold_max: float = 1.0
    cut_timesteps: bool = False
    last_alpha_bar: float = 2**-24

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.last_alpha_bar < 1, f"last_alpha_bar={self.last_alpha_bar} must lie between 0 and 1")
        fits = self.threshold is None or 0 <= self.threshold <= 1
        check(fits, f"threshold={self.threshold} is a fraction: it must lie in 0..1")
        for name, sigma in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            check(sigma is None or sigma > 0, f"{name}={sigma} must be positive, or None")

    def limit(self, x0: Tensor) -> Tensor:
        """``x0`` (B, ...) after dynamic thresholding, if that is chosen."""
        return x0 if self.threshold is None else dynamic_threshold(x0, self.threshold, self.threshold_max)

    def levels(
        self,
        schedule: NoiseSchedule,
        steps: int | None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        *,
        last: int | None = None,
        final: Literal["zero", "sigma_min", "repeated"] = "zero",
    ) -> tuple[Tensor, Tensor]:
        """Timesteps (n,), int64 or float32, and float32 sigmas (n + 1,).

        ``last``: how many of training's timesteps are in use. ``final``: where the last step lands: on 0, on
        training's smallest sigma, or (like_diffusers only) on the last of a sigma spacing once more."""
        table = spacings.sigma_table(schedule, self.last_alpha_bar)
        if sigmas is not None:
            levels = spacings.given(sigmas)
            t = spacings.to_timesteps(levels[:-1], table).astype(np.float32)
            return torch.from_numpy(t), torch.from_numpy(levels)
        if self.sigma_spacing == "timesteps":
            t = whole(self, timesteps) if timesteps is not None else self._spaced(len(table), steps, last or len(table))
            check_timesteps(self, t, len(table))
            levels = spacings.at_timesteps(t, table)
            landing = 0.0 if final == "zero" else float(table[0])
        else:
            check(
                timesteps is None, f"{self._name}: timesteps can't be given with sigma_spacing={self.sigma_spacing!r}"
            )
            n = check_steps(steps, len(table))
            full = final != "zero" and not self.like_diffusers  # one more, to land on
            levels = self._bent(n + full, table)
            landing = {"zero": 0.0, "sigma_min": float(table[0]), "repeated": levels[-1]}[final]
            landing, levels = (levels[-1], levels[:n]) if full else (landing, levels)
            t = self._times(levels, table)
        levels = np.concatenate([levels, [landing]]).astype(np.float32)
        return torch.from_numpy(t), torch.from_numpy(levels)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _spaced(self, total: int, steps: int | None, last: int) -> Floats:
        """(n,) int64, falling: n of the n + 1 points that divide the lowest ``last`` timesteps of ``total``."""
        n = check_steps(steps, total)
        if self.spacing == "trailing":
            t = np.arange(last, 0, -((total if self.like_diffusers else last) / n)).round() - 1
            t = t if self.like_diffusers else t[:n]
        elif self.spacing == "leading":
            t = np.arange(n + 1)[:0:-1] * (last // (n + 1)) + self.steps_offset
        else:
            t = np.linspace(0, last - 1, n + 1).round()[:0:-1]
        repeated = len(t) > 1 and bool((t[:-1] <= t[1:]).any())
        check(not repeated, f"{self._name}: steps={n} of spacing={self.spacing!r} visit a timestep twice; use fewer")
        falling: Floats = t.astype(np.int64)
        return falling

    def _bent(self, n: int, table: Floats) -> Floats:
        """(n,) float64 sigmas of the chosen spacing, from the top down."""
        low = float(table[0]) if self.sigma_min is None else self.sigma_min
        high = float(table[-1]) if self.sigma_max is None else self.sigma_max
        check(low <= high, f"{self._name}: sigma_min={low:g} is above sigma_max={high:g}")
        return spacings.CURVES[self.sigma_spacing](low, high, n)

    def _times(self, levels: Floats, table: Floats) -> Floats:
        """The timesteps at which training has these sigmas: float32, or made whole as diffusers does."""
        t = spacings.to_timesteps(levels, table)
        if not self.like_diffusers:
            return t.astype(np.float32)
        cut = self.cut_timesteps or self.sigma_spacing in ("exponential", "beta")
        return (t if cut else t.round()).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class LambdaOptions(LambdaSpacing):
    """The options of :class:`LambdaSpacing`, and ``solver_order``: how many of the latest outputs a step uses."""

    solver_order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.solver_order <= 3, f"solver_order={self.solver_order} must be 1, 2 or 3")


def highest_orders(n: int, order: int, lower_order_final: bool, first_at_last: bool) -> tuple[int, ...]:
    """(n,) the highest order of each step of a multistep method: ``order``, but 2 and 1 at most for the last two where
    ``lower_order_final`` and the steps are few, and 1 for the last where ``first_at_last``."""
    few = lower_order_final and n < FEW
    orders = [order] * n
    if few and n > 1:
        orders[-2] = min(order, 2)
    if few or first_at_last:
        orders[-1] = 1
    return tuple(orders)


def unclipped(schedule: NoiseSchedule, last_alpha_bar: float, lambda_min: float | None) -> int:
    """How many of training's timesteps, the lowest ones, have a lambda of ``lambda_min`` (None: any) or more."""
    if lambda_min is None:
        return len(schedule)
    alpha_bar = schedule.alphas_cumprod.clone()
    if alpha_bar[-1] == 0:
        alpha_bar[-1] = last_alpha_bar
    lambdas = torch.log(torch.sqrt(alpha_bar)) - torch.log(torch.sqrt(1 - alpha_bar))
    last = len(schedule) - int(torch.searchsorted(lambdas.flip(0), lambda_min))
    check(last >= 1, f"lambda_min_clipped={lambda_min} clips every timestep of training")
    return last


def usable(
    sampler: Options, orders: tuple[int, ...], order: int, rows: dict[str, Tensor], ahead: int = 1
) -> dict[str, Tensor]:
    """``rows`` of coefficients for steps of ``order``, 0 where no step of that order is made: by ``orders`` or because
    row i knows no more than i + ``ahead`` outputs.

    Raises ConfigError where one that may be made has coefficients that are not finite: two sigmas are equal, or a
    higher-order step leads to sigma 0. The reference gives NaN there."""
    wanted = torch.tensor([min(o, i + ahead) >= order for i, o in enumerate(orders)], dtype=torch.bool, device="cpu")
    for row in rows.values():
        bad = (wanted & ~row.isfinite()).nonzero().flatten().tolist()
        check(
            not bad,
            f"{type(sampler).__name__}: no finite coefficients of order {order} at rows {bad[:4]} of {len(orders)}, "
            "where two sigmas are equal or the last is 0; use fewer steps, a lower solver_order or lower_order_final",
        )
    return {name: torch.where(wanted, row, 0.0) for name, row in rows.items()}
