"""Noise levels of a run: by timestep, by sigma, and by lambda.

Each class builds :class:`~minidiff.samplers.method.Levels` from a number of steps, from timesteps or from sigmas, and
has the options of that choice. The numbers come from grid.py, or with ``like_diffusers`` from diffusers/grid.py.
``table`` is the training schedule's sigma at every timestep, rising.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.samplers.arithmetic import Space, unit
from minidiff.samplers.checks import check_timesteps, whole
from minidiff.samplers.grid import CURVES, Floats, SigmaSpacing, at_timesteps, given_sigmas, to_timesteps
from minidiff.samplers.limits import Limited, Thresholded
from minidiff.samplers.method import Given, Levels, Method, Plan, R, S
from minidiff.samplers.options import POSITIVE, AboveZero, Share
from minidiff.schedule import NoiseSchedule, Spacing, check_steps, epsilon_from_x0, x0_from_epsilon

Final = Literal["zero", "sigma_min"]
"""Sigma on which the last step lands: 0, or training's smallest."""


# --- in timesteps: x keeps unit variance ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Timesteps(Method[R, S]):
    """Base class of the methods that visit training's timesteps."""

    spacing: Spacing = "leading"
    steps_offset: int = 1

    def visited(self, schedule: NoiseSchedule, given: Given) -> tuple[Tensor, int]:
        """Return (n,) int64 timesteps, falling, and the number of training's timesteps from one to the next."""
        total = len(schedule)
        if given.timesteps is None:
            t = self.grid.spaced(self.spacing, total, given.steps, self.steps_offset)
        else:
            t = whole(self, given.timesteps)
        check_timesteps(self, t, total)
        return torch.from_numpy(t), total // (given.steps or len(t))


def alpha_bar_at(schedule: NoiseSchedule, t: Tensor, set_alpha_to_one: bool) -> Tensor:
    """Return alpha_bar at timesteps ``t`` (any shape); below 0 it is 1, or that of timestep 0."""
    past_end = unit() if set_alpha_to_one else schedule.alphas_cumprod[0]
    return torch.where(t >= 0, schedule.alphas_cumprod[t.clamp(min=0)], past_end)


# --- from training's table of sigmas ----------------------------------------------------------------------------------


def with_last(schedule: NoiseSchedule, last_alpha_bar: float) -> Tensor:
    """Return alpha_bar, (T,). If the schedule ends in pure noise (zero terminal SNR), where sigma would be infinite,
    ``last_alpha_bar`` replaces the 0."""
    alpha_bar = schedule.alphas_cumprod.clone()
    if alpha_bar[-1] == 0:
        alpha_bar[-1] = last_alpha_bar
    return alpha_bar


def sigma_table(schedule: NoiseSchedule, last_alpha_bar: float) -> Floats:
    """Return the sigmas of training, (T,) float32, finite as in :func:`with_last`."""
    alpha_bar = with_last(schedule, last_alpha_bar)
    sigmas: Floats = (((1 - alpha_bar) / alpha_bar) ** 0.5).numpy()
    return sigmas


@dataclass(frozen=True, kw_only=True)
class Tabled(Method[R, S]):
    """Base class of the methods that take their sigmas from those of training.

    ``sigma_spacing``: "timesteps" takes the sigmas at the timesteps of ``spacing``; "karras", "exponential" and "beta"
    go along a curve from ``sigma_max`` to ``sigma_min`` (None: the ends that ``spacing`` reaches, for methods in lambda
    those of training). ``final_sigma``: the last step lands on 0, or on training's smallest sigma. ``last_alpha_bar``
    replaces the 0 at the end of a zero-SNR schedule, where sigma would be infinite.
    """

    takes_more: ClassVar[tuple[str, ...]] = ("sigmas",)
    rises: ClassVar[bool] = False  # True if a run leads from the picture to noise
    # options of some of the methods
    sigma_spacing = "timesteps"
    final_sigma = "zero"
    sigma_min: ClassVar[float | None] = None
    sigma_max: ClassVar[float | None] = None

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    last_alpha_bar: Share = 2**-24

    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        times, sigmas = self.visited(schedule, given)
        t = torch.from_numpy(times if times.dtype == np.int64 else times.astype(np.float32))
        s = torch.from_numpy(sigmas.astype(np.float32))
        return self.between(t, s[: len(t)], s[1 : len(t) + 1], sigmas=s)

    def visited(self, schedule: NoiseSchedule, given: Given) -> tuple[Floats, Floats]:
        """Return timesteps (n,) and sigmas (n + 1,), not yet rounded."""
        table = sigma_table(schedule, self.last_alpha_bar)
        if given.sigmas is not None:
            sigmas = given_sigmas(given.sigmas)
            return to_timesteps(sigmas[:-1], table), sigmas
        plain = given.timesteps is None or self.sigma_spacing == "timesteps"
        check(plain, f"{self.name}: timesteps can't be given with sigma_spacing={self.sigma_spacing!r}, give steps")
        return self.chosen(schedule, table, given)

    @abstractmethod
    def chosen(self, schedule: NoiseSchedule, table: Floats, given: Given) -> tuple[Floats, Floats]:
        """Return the same for a number of steps or for given timesteps."""

    @abstractmethod
    def between(self, timesteps: Tensor, here: Tensor, to: Tensor, **more: Any) -> Levels:
        """Return the levels of a run with the factor of its first noise; ``more``: further fields of
        :class:`Levels`."""

    def curve(self, n: int, sigmas: Floats) -> Floats:
        """Return (n,) float64 sigmas of the chosen spacing between the ends of rising ``sigmas``, or those set by the
        options, in the order of the run."""
        low, high = self.grid.ends(self.name, self.sigma_min, self.sigma_max, sigmas, self.rises)
        return CURVES[self.sigma_spacing](*((high, low) if self.rises else (low, high)), n)


# --- in sigma ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sigmas(Tabled[R, S]):
    """Base class of the methods whose x is the picture, at its own scale, plus noise of standard deviation sigma.

    This has two consequences. The first noise is multiplied by the largest sigma (14.6146 for Stable Diffusion at
    timestep 999; 1 for DDIM and PNDM, whose x keeps unit variance). And the model, trained on unit variance, gets
    x / sqrt(sigma**2 + 1): see ``scale_input``, called ``scale_model_input`` in diffusers.
    """

    space: ClassVar[Space] = "sigma"
    counts_in: ClassVar[type[np.floating[Any]]] = np.float32  # the dtype of the timesteps behind the sigmas

    def between(self, timesteps: Tensor, here: Tensor, to: Tensor, **more: Any) -> Levels:
        """Return the levels of a run. The first noise has standard deviation sigma if the spacing starts at the last
        timestep, as in k-diffusion. Leading spacing starts lower, where the picture's own variance is no longer
        negligible, so there it is sqrt(sigma**2 + 1)."""
        top = here.max()
        first = top if self.spacing in ("linspace", "trailing") else (top**2 + 1) ** 0.5
        return Levels(timesteps, here, to, first, **more)

    def chosen(self, schedule: NoiseSchedule, table: Floats, given: Given) -> tuple[Floats, Floats]:
        if given.timesteps is None:
            t = self.grid.spaced(self.spacing, len(table), given.steps, self.steps_offset, self.counts_in)
        else:
            t = np.array(given.timesteps, dtype=self.counts_in)
        check_timesteps(self, t, len(table) + self.grid.beyond)
        t, sigmas = self.sigmas_for(t, table, given)
        if self.sigma_spacing != "timesteps":
            sigmas = self.curve(len(t), sigmas[::-1])
            t = to_timesteps(sigmas, table)
        return t, np.append(sigmas, table[0] if self.final_sigma == "sigma_min" else 0.0)

    def sigmas_for(self, t: Floats, table: Floats, given: Given) -> tuple[Floats, Floats]:
        """Return timesteps and sigmas, (n,) each, of the run that would visit ``t``."""
        sigmas = at_timesteps(t, table)
        for row in np.flatnonzero(~(np.isfinite(sigmas) & (sigmas > 0))):
            raise ConfigError(f"sigma is {sigmas[row]:g} at row {row}: the betas leave no picture there, or no noise")
        return t, sigmas


@dataclass(frozen=True, kw_only=True)
class SpacedSigmas(Sigmas[R, S]):
    """Base class of the methods with a choice of spacing in sigma."""

    sigma_spacing: SigmaSpacing = "timesteps"


@dataclass(frozen=True, kw_only=True)
class OwnSigmas(Limited[R, S]):
    """Base class of the methods for models trained in sigma (Karras et al. 2022), which use no schedule.

    ``sigma_max``, ``sigma_min``, ``rho``: the sigmas of training go from one to the other, even in sigma**(1/rho).
    ``sigma_data``: standard deviation of the pictures.
    """

    space = "sigma"
    own_levels = True

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: Annotated[float, POSITIVE] = 0.5
    rho: Annotated[float, POSITIVE] = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        falls = 0 < self.sigma_min < self.sigma_max
        check(falls, f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must rise from above 0")

    def karras(self, places: Any) -> Any:
        """Return the sigmas at ``places`` (n,), an array or a tensor, between sigma_max (0) and sigma_min (1)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + places * (low - high)) ** self.rho


# --- in lambda: the exponential integrators ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lambdas(Tabled[R, S], Thresholded[R, S]):
    """Base class of DPM-Solver, UniPC, DEIS and SA-Solver, which keep x at unit variance and work in lambda.

    lambda = log(signal / noise) is half the logarithm of the signal-to-noise ratio (Lu et al. 2022, "DPM-Solver",
    section 3). In lambda the linear part of the equation has a solution in closed form, and only the model's output has
    to be approximated, by a polynomial through its latest values. The coefficients are functions of the steps
    h = lambda_to - lambda. The last step, to sigma 0, has infinite h: a first-order step that returns x0 itself. Unlike
    the other methods, these divide training into n + 1 points and leave out the lowest, on which the last step lands.

    Options: those of :class:`Tabled`; ``lower_order_final``: the last steps use fewer outputs; ``cut_timesteps``: with
    ``like_diffusers``, the timesteps of karras drop their fractions instead of being rounded, as for the cosine
    schedule in some classes.
    """

    space: ClassVar[Space] = "lambda"
    final_sigma = "sigma_min"
    repeats: ClassVar[bool] = True  # diffusers lands on the last sigma of a curve again, not on training's smallest

    sigma_spacing: SigmaSpacing = "timesteps"
    sigma_min: AboveZero = None  # type: ignore[misc]
    sigma_max: AboveZero = None  # type: ignore[misc]
    lower_order_final: bool = True
    cut_timesteps: bool = False

    def between(self, timesteps: Tensor, here: Tensor, to: Tensor, **more: Any) -> Levels:
        return Levels(timesteps, here, to, unit(), **more)

    def highest(self, schedule: NoiseSchedule) -> int:
        """Return the number of training's timesteps in use, counted from the lowest."""
        return len(schedule)

    def chosen(self, schedule: NoiseSchedule, table: Floats, given: Given) -> tuple[Floats, Floats]:
        times, last, above = given.timesteps, self.highest(schedule), self.final_sigma == "sigma_min"
        if self.sigma_spacing == "timesteps":
            t = self.spaced(len(table), given.steps, last) if times is None else whole(self, times)
            check_timesteps(self, t[::-1] if self.rises else t, len(table))
            sigmas, landing = at_timesteps(t, table), table[last - 1] if self.rises else table[0]
        else:
            n, further = check_steps(given.steps, len(table)), self.grid.further if above else 0
            curve = self.curve(n + further, table)
            sigmas, t = curve[:n], self.timesteps_of(curve[:n], table)
            landing = curve[-1] if further or self.repeats else table[0]
        return t, np.append(sigmas, landing if above else 0.0)

    def spaced(self, total: int, steps: int | None, last: int) -> Floats:
        """Return (n,) int64 among the lowest ``last`` timesteps of ``total``. Raises ConfigError if rounding makes two
        neighbours equal."""
        n = check_steps(steps, total)
        t = self.points(n, total, last).astype(np.int64)
        repeated = len(t) > 1 and bool((np.diff(t) == 0).any())
        check(not repeated, f"{self.name}: steps={n} of spacing={self.spacing!r} visit a timestep twice; use fewer")
        return t

    def points(self, n: int, total: int, last: int) -> Floats:
        """Return n of the n + 1 points that divide the ``last`` timesteps, (n,), falling."""
        if self.spacing == "trailing":
            return self.grid.trailing(total, last, n)
        if self.spacing == "leading":
            t = np.arange(n + 1) * (last // (n + 1)) + self.steps_offset
        else:
            t = np.linspace(0, last - 1, n + 1).round()
        return t[:0:-1]

    def timesteps_of(self, sigmas: Floats, table: Floats) -> Floats:
        """Return the timesteps at which training has these sigmas, (n,)."""
        cut = self.cut_timesteps or self.sigma_spacing in ("exponential", "beta")
        return self.grid.of_curve(to_timesteps(sigmas, table), cut, self.rises)

    def epsilon(self, plan: Plan[R], i: int, x: Tensor, out: Tensor) -> Tensor:
        """Return the noise that the model sees in ``x``, after thresholding its x0 if that is enabled."""
        epsilon, signal, noise = plan.epsilon(i, x, out), plan.signal[i], plan.noise[i]
        if self.threshold is None:
            return epsilon
        return epsilon_from_x0(x, self.limit(x0_from_epsilon(x, epsilon, signal, noise)), signal, noise)


@dataclass(frozen=True, kw_only=True)
class ClippedLambdas(Lambdas[R, S]):
    """Base class of those that may leave out the timesteps with lambda below ``lambda_min_clipped`` (cosine schedules;
    only with spacing by timesteps)."""

    lambda_min_clipped: float | None = None

    def highest(self, schedule: NoiseSchedule) -> int:
        if self.lambda_min_clipped is None:
            return len(schedule)
        alpha_bar = with_last(schedule, self.last_alpha_bar)
        lambdas = torch.log(torch.sqrt(alpha_bar)) - torch.log(torch.sqrt(1 - alpha_bar))
        last = len(schedule) - int(torch.searchsorted(lambdas.flip(0), self.lambda_min_clipped))
        check(last >= 1, f"lambda_min_clipped={self.lambda_min_clipped} clips every timestep of training")
        return last
