"""Base classes of the samplers: noise levels, a plan with the coefficients of each row, and a pure step function.

A sampler turns noise into a picture by calling the model a few dozen times.

* :class:`Levels` are the noise levels at which the model is called and on which each step lands. They are all that has
  to be chosen, be it by a spacing, a slip of diffusers, given timesteps or sigmas, or another program.
* A :class:`Method` is the mathematics. Its options are the fields of a frozen dataclass, equivalent to JSON. ``rows``
  computes every coefficient from the levels, before the first step; ``step`` applies one row.
* A :class:`Plan` combines levels and rows as data, one row for each model call. ``print(plan)`` shows all of it.
* The state is passed from one step to the next: ``()`` for one-step methods, the history for multistep methods. There
  are no hidden counters: any step can be run alone, from any row.

``x`` is the current noisy sample, and ``out`` the raw model output for ``scale_input(plan, i, x)``, so that each call
can be compared to ``scheduler.step`` of the reference.

Coefficients are 0-dim float32 tensors on the host, indexed by row. Python floats would be rounded in other places, and
tensors on the device would have to be fetched. A CUDA sample is multiplied by them without synchronization.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.config import Prediction, check, one_of, quote, within
from minidiff.errors import ConfigError
from minidiff.schedule import NoiseSchedule, to_x0

Draw = Callable[[Tensor], Tensor]
"""Standard normal noise with the shape, dtype and device of the tensor it is given. Called only when noise is used."""

Space = Literal["alpha_bar", "sigma", "lambda"]
"""Measure of noise of a method, and scale of its x: ``alpha_bar``, with x of unit variance; ``sigma`` = noise /
signal, with x at the picture's own scale plus noise; ``lambda`` = -log sigma, from sigma, with x of unit variance."""

Put = tuple[Space, Tensor]
"""A level and its measure."""

R = TypeVar("R", bound=tuple[Any, ...])
S = TypeVar("S")


class Levels(NamedTuple):
    """The noise levels of a run: alpha_bar, or sigma for the methods that work in sigma or lambda.

    ``timesteps`` (n,): the model's time input, int64 or float32 as in the reference. ``here`` (n,): the level of the
    sample at each row. ``to`` (n,): the level on which each step lands. ``first`` (0-dim): factor of the standard
    normal noise in the first x: 1 if x keeps unit variance (DDPM, DDIM, PNDM), the largest sigma if x is the picture
    plus noise (Euler: 14.6146 for Stable Diffusion, its sigma at timestep 999). ``landing`` (n,): the timestep of
    ``to`` if there is one; negative: past the end. ``sigmas``: all sigmas as diffusers lists them, if they are not
    ``here`` and the last of ``to``. ``put``: level and measure at which a picture is put back (inpainting), if the
    reference uses another than ``here``. ``beside``: further levels that a method needs, by name.
    """

    timesteps: Tensor
    here: Tensor
    to: Tensor
    first: Tensor
    landing: Tensor | None = None
    sigmas: Tensor | None = None
    put: Put | None = None
    beside: Mapping[str, Tensor] = {}

    @property
    def h(self) -> Tensor:
        """Length of each step in lambda, (n,), for levels in sigma."""
        return lambda_of(self.to) - lambda_of(self.here)

    def part(self, rows: slice) -> Levels:
        """Return the levels of some of the rows, such as ``slice(-1)`` for all but the last."""
        landing = None if self.landing is None else self.landing[rows]
        beside = {name: column[rows] for name, column in self.beside.items()}
        return Levels(self.timesteps[rows], self.here[rows], self.to[rows], self.first, landing, beside=beside)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Plan(Generic[R]):
    """Levels and coefficients of one run: row i belongs to the i-th model call.

    ``rows``: a NamedTuple of the method's own columns, (n, ...) each, tensors on the host or tuples. Computed from the
    levels, (n,) each: ``signal`` and ``noise``, with x = signal * x0 + noise * epsilon if x has unit variance;
    ``variance`` = sigma**2 + 1, its root ``in_scale``, and ``c_out``, for samples at the picture's own scale.
    """

    method: str
    space: Space
    levels: Levels
    prediction: Prediction
    rows: R
    on_device: tuple[str, ...] = ()  # the columns that are used in matrix products with samples
    from_noise: bool = field(init=False)  # the first row divides by a signal of 0: x0 is infinite until it is limited
    signal: Tensor = field(init=False)
    noise: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    in_scale: Tensor = field(init=False)
    c_out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        here = self.levels.here
        variance = here**2 + 1
        signal, noise = (here**0.5, (1 - here) ** 0.5) if self.space == "alpha_bar" else rates(here)
        pure = self.space == "alpha_bar" and self.prediction == "epsilon" and bool(here[0] == 0)
        object.__setattr__(self, "from_noise", pure)
        made = {"signal": signal, "noise": noise, "variance": variance, "in_scale": variance**0.5}
        for name, column in {**made, "c_out": -here / made["in_scale"]}.items():
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def timesteps(self) -> Tensor:
        """Time input of the model at each row, (n,)."""
        return self.levels.timesteps

    @property
    def init_noise_sigma(self) -> Tensor:
        """Factor of the standard normal noise in the first x, 0-dim."""
        return self.levels.first

    @property
    def sigmas(self) -> Tensor:
        """Sigmas as diffusers lists them, (n + 1 or more,). Raises AttributeError for a method that works with
        alpha_bar."""
        if self.space == "alpha_bar":
            raise AttributeError(f"{self.method} has no sigmas: it works with alpha_bar")
        listed = self.levels.sigmas
        return torch.cat([self.levels.here, self.levels.to[-1:]]) if listed is None else listed

    @property
    def alpha_bars(self) -> Tensor:
        """alpha_bar, the picture's share of the variance, at each row, (n,)."""
        if self.space == "alpha_bar":
            return self.levels.here
        return 1 / self.variance if self.space == "sigma" else self.signal**2

    def at(self, i: int) -> R:
        """Return row ``i`` of the method's columns."""
        return type(self.rows)(*(column[i] for column in self.rows))

    def to(self, device: torch.device | str) -> Plan[R]:
        """Return the plan with timesteps on ``device``, moved once before the loop. Coefficients stay on the CPU."""
        moved = {name: getattr(self.rows, name).to(device) for name in self.on_device}
        plan = copy(self)  # everything computed from the levels stays unchanged
        object.__setattr__(plan, "levels", self.levels._replace(timesteps=self.timesteps.to(device)))
        object.__setattr__(plan, "rows", cast(Any, self.rows)._replace(**moved))
        return plan

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Add ``noise`` to clean ``x0`` at the level of row ``i``, as at the start of img2img."""
        space, level = self.levels.put or (self.space, self.levels.here)
        return noisy(space, x0, noise, level[i].to(x0.dtype))

    def columns(self) -> dict[str, Sequence[Any] | Tensor]:
        """Return the columns of the printed table by name, (n,) each. Columns that are 0 throughout are left out."""
        t, here, to, _, landing, *_ = self.levels
        found: dict[str, Any] = {"timestep": t, "sigma": here, "alpha_bar": self.alpha_bars}
        if self.space == "alpha_bar":
            found |= {"sigma": ((1 - here) / here) ** 0.5, "to alpha_bar": to}
        else:
            found |= {"to sigma": to} | (
                {"lambda": lambda_of(here), "h": self.levels.h} if self.space == "lambda" else {}
            )
        if landing is not None:
            found["to timestep"] = landing
        for name, column in zip(type(self.rows)._fields, self.rows, strict=True):  # type: ignore[attr-defined]
            flat = column.ndim == 1 if isinstance(column, Tensor) else isinstance(column[0], (str, int))
            if flat and any(column):
                found[name] = column
        shown = getattr(self.rows, "shown", None)
        return found if shown is None else found | shown()

    def __repr__(self) -> str:
        start = f"x starts as noise * {self.init_noise_sigma.item():.6g}"
        return f"{self.method}: {len(self)} model calls, prediction {self.prediction}, {start}"

    def __str__(self) -> str:
        table = {"row": range(len(self)), **self.columns()}
        shown = [[name, *map(_cell, values)] for name, values in table.items()]
        widths = [max(map(len, column)) for column in shown]
        lines = zip(*([cell.rjust(w) for cell in column] for column, w in zip(shown, widths, strict=True)), strict=True)
        return "\n".join([repr(self), *("  ".join(line) for line in lines)])


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def lambda_of(sigma: Tensor) -> Tensor:
    """Return lambda = log(signal / noise) at ``sigma`` (n,): half the logarithm of the signal-to-noise ratio."""
    signal, noise = rates(sigma)
    return torch.log(signal) - torch.log(noise)


def rates(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (signal, noise) with noise / signal = ``sigma`` (any shape) and signal**2 + noise**2 = 1."""
    signal = 1 / (sigma**2 + 1) ** 0.5
    return signal, sigma * signal


def noisy(space: Space, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Add ``noise`` to ``x0`` at ``level``, which broadcasts against both and has their dtype."""
    if space == "sigma":
        return x0 + noise * level
    signal, amount = rates(level) if space == "lambda" else (level**0.5, (1 - level) ** 0.5)
    return signal * x0 + amount * noise


class Sampler(Protocol[R, S]):
    """Interface of a sampler. ``i`` is a row of the plan; x and out are (B, ...) tensors on one device."""

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Plan[R]:
        """Return the plan, one row per model call, for exactly one of ``steps``, ``timesteps`` and ``sigmas``.

        Raises ConfigError for a number or list that the method cannot run, quoting the limit."""

    def start(self) -> S:
        """Return the state before the first step, whichever row that is."""

    def scale_input(self, plan: Plan[R], i: int, x: Tensor) -> Tensor:
        """Return the model input for sample ``x``. Models are trained on unit variance. If x is the picture plus noise
        (Euler), its variance is sigma**2 + 1, and x is divided by the root of that; otherwise it is returned as is."""

    def denoised(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor | None:
        """Return the model's estimate x0 of the picture; None if the method has no such estimate. Use it for previews:
        x itself is noisy until the end."""

    def step(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S, draw: Draw) -> tuple[Tensor, S]:
        """Return the sample at the next row and the new state."""


class Given(NamedTuple):
    """Input of a plan, exactly one of the three: ``steps``; ``timesteps`` of the model; ``sigmas``, one more than the
    number of steps. Both lists fall."""

    steps: int | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class Method(Sampler[R, S]):
    """Base class of the samplers. Its fields are the options, which are checked on construction.

    ``like_diffusers`` reproduces the deviations of the pinned reference from the mathematics; each method lists them.
    It is set for samplers that are read from a scheduler_config.json, and off for those chosen by name.
    """

    order: ClassVar[int] = 1  # model calls per step, where a step takes several
    space: ClassVar[Space] = "alpha_bar"
    own_levels: ClassVar[bool] = False  # True if the method defines its own noise levels and needs no NoiseSchedule
    predicts: ClassVar[Prediction | None] = None  # the prediction type of the model, whatever the schedule says
    takes: ClassVar[tuple[str, ...]] = ("steps",)  # those of steps, timesteps and sigmas that the reference accepts
    takes_more: ClassVar[tuple[str, ...]] = ()  # those that a sampler chosen by name accepts in addition

    like_diffusers: bool = False

    def __post_init__(self) -> None:
        for name, kind in _option_types(type(self)).items():
            _check_option(f"{self.name}.{name}", getattr(self, name), kind)

    @property
    def name(self) -> str:
        """Name of the class, for messages."""
        return type(self).__name__

    @property
    def on_device(self) -> tuple[str, ...]:
        """See :class:`Plan`."""
        return ()

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Plan[R]:
        """See :class:`Sampler`. ``takes`` and ``takes_more`` list which of the three are accepted."""
        given = Given(steps, timesteps, sigmas)
        takes = self.takes if self.like_diffusers else (*self.takes, *self.takes_more)
        chosen = [name for name, value in given._asdict().items() if value is not None]
        one_of = " or ".join(takes)
        check(len(chosen) == 1, f"{self.name} needs exactly one of {one_of}; got {' and '.join(chosen) or 'none'}")
        check(chosen[0] in takes, f"{self.name} can't take {chosen[0]}; give {one_of}")
        known = self.schedule_of(schedule)
        return self.plan_at(self.levels(known, given), self.predicts or known.prediction)

    def schedule_of(self, schedule: NoiseSchedule | None) -> NoiseSchedule:
        """Return the schedule with its table on the host. Raises ConfigError for None unless ``own_levels``."""
        if schedule is None and not self.own_levels:
            raise ConfigError(f"{self.name} needs the model's noise schedule, got None")
        return NOTHING if schedule is None else schedule.to("cpu")

    def plan_at(self, at: Levels, prediction: Prediction) -> Plan[R]:
        """Return the plan for ready levels, whoever chose them: ``levels``, perhaps changed by
        :meth:`Levels._replace` or :meth:`Levels.part`, or another program. Raises ConfigError as :meth:`plan`."""
        rows = self.rows(at, prediction)
        self.require_usable(rows)
        return Plan(
            method=self.name, space=self.space, levels=at, prediction=prediction, rows=rows, on_device=self.on_device
        )

    def require_usable(self, rows: R) -> None:
        """Raise ConfigError for rows that exist but cannot be run."""

    @abstractmethod
    def levels(self, schedule: NoiseSchedule, given: Given) -> Levels:
        """Return the levels that a run visits. Raises ConfigError for a number or list that cannot be run."""

    @abstractmethod
    def rows(self, at: Levels, prediction: Prediction) -> R:
        """Return all coefficients of the steps between these levels. Raises ConfigError if one is not finite."""

    def start(self) -> S:
        """See :class:`Sampler`; one-step methods need no state."""
        return cast(S, ())

    def scale_input(self, plan: Plan[R], i: int, x: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return x / plan.in_scale[i] if self.space == "sigma" else x

    def limit(self, x0: Tensor) -> Tensor:
        """Return ``x0`` within the limits set by the options; see limits.py."""
        return x0

    def denoised(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        """See :class:`Sampler`."""
        if self.space == "sigma":
            return self.limit(sigma_x0(plan, i, x, out, plan.levels.here[i]))
        return self.limit(to_x0(plan.prediction, x, out, plan.signal[i], plan.noise[i]))

    @abstractmethod
    def step(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S, draw: Draw) -> tuple[Tensor, S]:
        """See :class:`Sampler`."""


NOTHING = NoiseSchedule(torch.ones(1, dtype=torch.float32, device="cpu"))
"""Placeholder for the schedule of a method that defines its own levels."""


LARGEST = 1e9  # bound of numeric options: the square and more must be finite in float32


@cache
def _option_types(method: type) -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(method).items() if get_origin(kind) is not ClassVar}


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


# --- arithmetic that methods share -----------------------------------------------------------------------------------


def sigma_x0(plan: Plan[Any], i: int, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 for ``x`` at row ``i``, whose noise has standard deviation ``sigma`` (0-dim), in the wider dtype."""
    if plan.prediction == "epsilon":
        return x - meet(sigma * out, x)
    return meet(out * plan.c_out[i], x) + x / plan.variance[i] if plan.prediction == "v_prediction" else out


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in float32: in half precision the sum of picture and noise would lose the picture at large sigma."""
    return x.to(torch.float32)


def meet(y: Tensor, x: Tensor) -> Tensor:
    """Convert ``y`` to the wider dtype of both, as their sum would."""
    return y.to(torch.promote_types(y.dtype, x.dtype))


def unit() -> Tensor:
    """Return a 0-dim 1 on the host, whatever torch's current default device and dtype are."""
    return torch.tensor(1.0, dtype=torch.float32, device="cpu")


def earlier(column: Tensor) -> Tensor:
    """Shift ``column`` (n,) by one row: each entry becomes that of the row before. The first one stays."""
    return torch.cat([column[:1], column[:-1]])


def root(x: Tensor, method: Method[Any, Any], what: str) -> Tensor:
    """Return sqrt(x) of a (n,) row that rounding may have pushed below 0, for which the reference gives NaN.

    For a sampler chosen by name, entries down to -1e-6 count as 0. Raises ConfigError for other negative entries."""
    lowest = 0.0 if method.like_diffusers else -1e-6
    bad = (~(x >= lowest)).nonzero().flatten().tolist()
    check(not bad, f"{method.name}: {what} is the root of a negative number or NaN at rows {bad[:4]}")
    return x.clamp(min=0) ** 0.5


def whole(method: Method[Any, Any], timesteps: Sequence[float], lowest: int | None = None) -> NDArray[Any]:
    """Return ``timesteps`` as int64. Raises ConfigError for fractions, and for any below ``lowest``."""
    fits = all(float(t).is_integer() and (lowest is None or t >= lowest) for t in timesteps)
    range_ = "" if lowest is None else f", {lowest} or above"
    check(fits, f"{method.name}: timesteps must be whole numbers{range_}, got {list(timesteps)[:6]}")
    return np.array([int(t) for t in timesteps], dtype=np.int64)


def check_timesteps(method: Method[Any, Any], timesteps: Any, train_steps: int) -> None:
    """Raise ConfigError unless ``timesteps`` (a list or array) fall strictly and lie in 0..train_steps - 1.

    The reference has a last row of -1 for some step counts of trailing spacing only (see ``spaced``)."""
    t = [float(v) for v in timesteps]
    check(len(t) > 0, f"{method.name}: timesteps is empty")
    falls = all(a > b for a, b in pairwise(t))
    check(falls, f"{method.name}: timesteps must fall strictly, got {t[:6]}")
    lowest = -1 if method.like_diffusers else 0
    hint = "; use fewer steps or steps_offset=0" if t[0] == train_steps else ""
    inside = lowest <= t[-1] and t[0] <= train_steps - 1
    check(
        inside, f"{method.name}: timesteps run from {t[0]:g} to {t[-1]:g}, the model knows 0 to {train_steps - 1}{hint}"
    )


def check_finite(method: Method[Any, Any], column: Tensor) -> None:
    """Raise ConfigError if a ``column`` (n, ...) of coefficients is not finite: 0 / 0, from two equal sigmas. The
    reference gives NaN there."""
    finite = column.reshape(len(column), -1).isfinite().all(dim=1)
    bad = (~finite).nonzero().flatten().tolist()[:4]
    where = f"{method.name}: no finite coefficients at rows {bad} of {len(column)}, where two sigmas are equal"
    check(not bad, f"{where}; use fewer steps or steps_offset=0")


def check_some_noise(method: Method[Any, Any], timesteps: Tensor, alpha_bars: Tensor) -> None:
    """Raise ConfigError if a method that divides by 1 - alpha_bar visits a timestep without noise."""
    rows = (alpha_bars == 1).nonzero().flatten().tolist()
    where = f"row {rows[0]}, timestep {timesteps[rows[0]].item():g}" if rows else ""
    check(not rows, f"{method.name}: alpha_bar is 1 at {where}: no noise to take away; use betas above 0")


PURE_NOISE = (
    "for alpha_bar is 0 there, and prediction='epsilon' says nothing of the picture (zero_snr); use a v_prediction "
    "model, or leading spacing"
)


def check_no_pure_noise(
    method: Method[Any, Any], timesteps: Tensor, alpha_bars: Tensor, prediction: Prediction, bounded: bool = False
) -> None:
    """Raise ConfigError if x0 of an epsilon model is needed at pure noise (alpha_bar 0: zero terminal SNR), which
    divides by 0. ``bounded``: x0 is clamped, and the first row is allowed, where x is fresh noise and x0 infinite. In
    later rows (trailing spacing may end with a row at timestep -1) x is a picture that may equal the model's output,
    and 0 / 0 cannot be clamped."""
    pure = (alpha_bars == 0).nonzero().flatten().tolist()
    rows = [row for row in pure if row > 0 or not bounded]
    if prediction == "epsilon" and rows:
        t = timesteps[rows[0]].item()
        other = "" if rows[0] == 0 else ", or another number of steps"
        raise ConfigError(f"{method.name}: x0 is not finite at row {rows[0]}, timestep {t:g}, {PURE_NOISE}{other}")
