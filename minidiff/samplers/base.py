"""What every sampler is made of: options, a plan, a state, and a step that is a pure function.

A sampler turns noise into a picture by calling the model a few dozen times. Here

* the **Sampler** itself is configuration: a frozen dataclass of options, hashable and as good as its JSON;
* the **Plan** is data: one row per model call, every number that the steps will use, computed before the first of
  them. ``print(plan)`` shows it;
* the **state** is what a step hands to the next one: ``()`` for one-step methods, a NamedTuple with the history for
  multistep ones. There are no hidden counters, so any step can be run alone, from any row;
* ``step(plan, i, x, out, state, draw)`` changes nothing but what it returns.

``x`` is the current noisy sample, ``out`` what the model answered to ``scale_input(plan, i, x)``: the raw output, so
that each call can be held against ``scheduler.step`` of the reference.

Coefficients are 0-dim float32 tensors on the host, read from the plan by the row number: as Python floats they would
be rounded at other places, and on the device they would have to be fetched. A CUDA sample takes them without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.config import Prediction, check, one_of, quote, within
from minidiff.errors import ConfigError
from minidiff.schedule import NoiseSchedule

Draw = Callable[[Tensor], Tensor]
"""Standard normal noise with the shape, dtype and device of the tensor it is given. Called only when noise is used."""


P = TypeVar("P", bound="Plan")
S = TypeVar("S")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Plan:
    """Every number of one run: row i belongs to the i-th model call.

    ``timesteps`` (n,) is what the model is told, int64 or float32 as in the reference; ``alpha_bars`` (n,) the share
    of the picture's variance there; ``init_noise_sigma`` what standard normal noise is multiplied by to give the
    first x: 1 where x keeps unit variance (DDPM, DDIM, PNDM), the largest sigma where x is the picture plus noise
    (Euler: 14.6146 for Stable Diffusion, its sigma at timestep 999). Subclasses add the rows of their method.
    """

    timesteps: Tensor
    alpha_bars: Tensor
    init_noise_sigma: Tensor
    prediction: Prediction

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self: P, device: torch.device | str) -> P:
        """The plan with its timesteps on ``device``, moved once before the loop. The coefficients stay on the host."""
        return replace(self, timesteps=self.timesteps.to(device))

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Clean ``x0`` with as much ``noise`` as the sample has at row ``i``: where image to image begins."""
        alpha_bar = self.alpha_bars[i].to(x0.dtype)
        return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        """The columns of the printed table, (n,) each: name -> values."""
        sigmas = ((1 - self.alpha_bars) / self.alpha_bars) ** 0.5
        return {"timestep": self.timesteps, "sigma": sigmas, "alpha_bar": self.alpha_bars}

    def __repr__(self) -> str:
        start = f"x starts as noise * {self.init_noise_sigma.item():.6g}"
        return f"{type(self).__name__}: {len(self)} model calls, prediction {self.prediction}, {start}"

    def __str__(self) -> str:
        table = {"row": range(len(self)), **self.columns()}
        shown = [[name, *map(_cell, values)] for name, values in table.items()]
        widths = [max(map(len, column)) for column in shown]
        lines = zip(*([cell.rjust(w) for cell in column] for column, w in zip(shown, widths, strict=True)), strict=True)
        return "\n".join([repr(self), *("  ".join(line) for line in lines)])


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Sampler(Protocol[P, S]):
    """The methods of a sampler. ``i`` is a row of the plan, x and out are (B, ...) tensors on one device."""

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> P:
        """One row per model call, for exactly one of ``steps``, ``timesteps`` and ``sigmas``.

        Raises ConfigError for a number or list that the method can't run, quoting the limit."""

    def start(self) -> S:
        """The state before the first step, whichever row that is."""

    def scale_input(self, plan: P, i: int, x: Tensor) -> Tensor:
        """What the model sees for sample ``x``: models are trained on unit variance, and where x is picture plus
        noise (Euler) its variance is sigma**2 + 1, so it is divided by the root of that. Else x itself."""

    def denoised(self, plan: P, i: int, x: Tensor, out: Tensor, state: S) -> Tensor | None:
        """The picture x0 that the model sees in ``x``; None where the method has no such estimate. Previews show
        this: x itself is noisy until the end."""

    def step(self, plan: P, i: int, x: Tensor, out: Tensor, state: S, draw: Draw) -> tuple[Tensor, S]:
        """The sample at the next row and the state that goes with it."""


@dataclass(frozen=True, kw_only=True)
class Options(Sampler[Any, Any]):
    """The base of every sampler: its options are checked when they are given.

    ``like_diffusers`` repeats the places where the pinned reference departs from the mathematics (each sampler says
    which). It is set for samplers that are read from a scheduler_config.json, and off for those chosen by name.
    """

    order: ClassVar[int] = 1  # model calls per step, where a step takes several
    in_sigma: ClassVar[bool] = False  # whether x is picture plus noise (a SigmaPlan), not of unit variance
    own_levels: ClassVar[bool] = False  # whether it brings its own noise levels, and needs no NoiseSchedule

    like_diffusers: bool = False

    def __post_init__(self) -> None:
        own: type = type(self)
        for name, kind in _option_types(own).items():
            _check_option(f"{own.__name__}.{name}", getattr(self, name), kind)


LARGEST = 1e9  # of a number in an option: its square and more are to be finite in float32


@cache
def _option_types(sampler: type) -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(sampler).items() if get_origin(kind) is not ClassVar}


def _check_option(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless ``value`` is of type ``kind``: a Literal, bool, int, float, one of these or None, or a
    tuple of one of these."""
    if get_origin(kind) is Literal:
        known = get_args(kind)
        return one_of(known, **{name: value})
    if get_origin(kind) is tuple:  # of any length, of one type
        check(isinstance(value, tuple), f"{name}={quote(value)} must be a tuple")
        for entry in value:
            _check_option(name, entry, get_args(kind)[0])
        return None
    kinds = get_args(kind) or (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    check(fits, f"{name}={quote(value)} must be of type {getattr(kind, '__name__', kind)}")
    if isinstance(value, (int, float)):
        within(*((-LARGEST, LARGEST) if float in kinds else (-(2**63), 2**63 - 1)), **{name: value})
    return None


def need_schedule(schedule: NoiseSchedule | None, sampler: Options) -> NoiseSchedule:
    """The schedule with its table on the host. Raises ConfigError for None: this method brings no sigmas of its own."""
    if schedule is None:
        raise ConfigError(f"{type(sampler).__name__} needs the model's noise schedule, got None")
    return schedule.to("cpu")


def unit() -> Tensor:
    """A 0-dim 1 on the host, whatever torch's default device and dtype are at the moment."""
    return torch.tensor(1.0, dtype=torch.float32, device="cpu")


def check_chosen(sampler: Options, takes: str = "steps", by_name: str = "", **given: Any) -> None:
    """Raise ConfigError unless exactly one of ``given`` (steps, timesteps, sigmas) is there, and ``takes`` lists it; or
    ``by_name``, which the reference can't take and a sampler chosen by name can."""
    takes = takes if sampler.like_diffusers else f"{takes} {by_name}".strip()
    chosen = [name for name, value in given.items() if value is not None]
    name = type(sampler).__name__
    check(len(chosen) == 1, f"{name} needs exactly one of {takes}; got {' and '.join(chosen) or 'none of them'}")
    check(chosen[0] in takes.split(), f"{name} can't take {chosen[0]}; give {takes.replace(' ', ' or ')}")


def check_timesteps(sampler: Options, timesteps: Any, train_steps: int) -> None:
    """Raise ConfigError unless ``timesteps`` (a list or array) fall strictly and lie in 0..train_steps - 1.

    The reference has a last row of -1 for some step counts of trailing spacing, and only there (see ``spaced``)."""
    t = [float(v) for v in timesteps]
    name = type(sampler).__name__
    check(len(t) > 0, f"{name}: timesteps is empty")
    falls = all(a > b for a, b in pairwise(t))
    check(falls, f"{name}: timesteps must fall strictly, got {t[:6]}")
    lowest = -1 if sampler.like_diffusers else 0
    hint = "; use fewer steps or steps_offset=0" if t[0] == train_steps else ""
    inside = lowest <= t[-1] and t[0] <= train_steps - 1
    check(inside, f"{name}: timesteps run from {t[0]:g} to {t[-1]:g}, the model knows 0 to {train_steps - 1}{hint}")


def whole(sampler: Options, timesteps: Sequence[float], lowest: int | None = None) -> NDArray[Any]:
    """``timesteps`` as int64. Raises ConfigError for fractions, and for any below ``lowest``."""
    fits = all(float(t).is_integer() and (lowest is None or t >= lowest) for t in timesteps)
    range_ = "" if lowest is None else f", {lowest} or above"
    check(fits, f"{type(sampler).__name__}: timesteps must be whole numbers{range_}, got {list(timesteps)[:6]}")
    return np.array([int(t) for t in timesteps], dtype=np.int64)


def root(x: Tensor, sampler: Options, what: str) -> Tensor:
    """sqrt(x) of a (n,) row that rounding may have pushed below 0, where the reference gives NaN.

    Entries down to -1e-6 count as 0 for a sampler chosen by name; anything else below 0 is a ConfigError."""
    lowest = 0.0 if sampler.like_diffusers else -1e-6
    bad = (~(x >= lowest)).nonzero().flatten().tolist()
    check(not bad, f"{type(sampler).__name__}: {what} is the root of a negative number or NaN at rows {bad[:4]}")
    return x.clamp(min=0) ** 0.5


def check_finite(sampler: Options, rows: Tensor) -> None:
    """Raise ConfigError where ``rows`` (n, ...) of coefficients are not finite: 0 / 0, at two equal sigmas. The
    reference gives NaN there."""
    finite = rows.reshape(len(rows), -1).isfinite().all(dim=1)
    bad = (~finite).nonzero().flatten().tolist()[:4]
    where = f"{type(sampler).__name__}: no finite coefficients at rows {bad} of {len(rows)}, where two sigmas are equal"
    check(not bad, f"{where}; use fewer steps or steps_offset=0")


def check_some_noise(sampler: Options, timesteps: Tensor, alpha_bars: Tensor) -> None:
    """Raise ConfigError where a method that divides by 1 - alpha_bar visits a timestep at which there is no noise."""
    rows = (alpha_bars == 1).nonzero().flatten().tolist()
    where = f"row {rows[0]}, timestep {timesteps[rows[0]].item():g}" if rows else ""
    check(not rows, f"{type(sampler).__name__}: alpha_bar is 1 at {where}: no noise to take away; use betas above 0")


PURE_NOISE = (
    "for alpha_bar is 0 there, and prediction='epsilon' says nothing of the picture (zero_snr); use a v_prediction "
    "model, or leading spacing"
)


def check_no_pure_noise(
    sampler: Options, timesteps: Tensor, alpha_bars: Tensor, prediction: Prediction, bounded: bool = False
) -> None:
    """Raise ConfigError where an epsilon model is asked for the picture in pure noise (alpha_bar 0: zero terminal
    SNR), which divides by 0. ``bounded``: x0 is clamped, so that the first row may: there x is fresh noise, and x0
    infinite. Later (trailing spacing may end with a row at timestep -1) x is a picture that the model's answer meets,
    and 0 / 0 can't be clamped."""
    pure = (alpha_bars == 0).nonzero().flatten().tolist()
    rows = [row for row in pure if row > 0 or not bounded]
    if prediction == "epsilon" and rows:
        t, name = timesteps[rows[0]].item(), type(sampler).__name__
        other = "" if rows[0] == 0 else ", or another number of steps"
        raise ConfigError(f"{name}: x0 is not finite at row {rows[0]}, timestep {t:g}, {PURE_NOISE}{other}")
