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

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.errors import ConfigError
from minidiff.samplers.arithmetic import Put, Space, lambda_of, meet, noisy, rates
from minidiff.samplers.diffusers.grid import DIFFUSERS
from minidiff.samplers.grid import OWN, Grid
from minidiff.samplers.options import check_options
from minidiff.schedule import NoiseSchedule, to_epsilon, to_x0

Draw = Callable[[Tensor], Tensor]
"""Standard normal noise with the shape, dtype and device of the tensor it is given. Called only when noise is used."""

R = TypeVar("R", bound=tuple[Any, ...])
S = TypeVar("S")
Next = tuple[Tensor, S]
"""The sample at the next row, and the new state."""
Empty = tuple[()]
"""State of the one-step methods."""
Numbers = Sequence[float] | None
Outputs = tuple[Tensor, ...]
"""The latest outputs, converted to the quantity that a multistep method combines, oldest first."""


class History(NamedTuple):
    """State of the methods that step from a sample more than once. ``outputs``: the latest, converted, oldest first;
    ``base``: the sample at the start of the interval, ``noise``: that drawn there, ``order``: that of the step."""

    outputs: Outputs = ()
    base: Tensor | None = None
    noise: Tensor | None = None
    order: int = 0


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
    levels: ``signal`` and ``noise`` (n,), with x = signal * x0 + noise * epsilon if x has unit variance; and
    ``from_noise``, True if x has no picture in the first row, so that its x0 is infinite until it is limited.
    """

    method: str
    space: Space
    levels: Levels
    prediction: Prediction
    rows: R
    on_device: tuple[str, ...] = ()  # the columns that are used in matrix products with samples
    from_noise: bool = field(init=False)
    signal: Tensor = field(init=False)
    noise: Tensor = field(init=False)

    def __post_init__(self) -> None:
        signal, noise = rates(self.levels.here, self.space)
        from_noise = self.space == "alpha_bar" and bool(self.levels.here[0] == 0)
        vars(self).update(from_noise=from_noise, signal=signal, noise=noise)

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
        here = self.levels.here
        return {"alpha_bar": here, "sigma": 1 / (here**2 + 1), "lambda": self.signal**2}[self.space]

    def at(self, i: int) -> R:
        """Return row ``i`` of the method's columns."""
        return cast(R, _row(self.rows, i))

    def x0(self, i: int, x: Tensor, out: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Return the picture that the model sees in ``x`` at row ``i``, without limits. ``sigma`` (0-dim): that of
        ``x``, at the picture's own scale, if it is not the row's."""
        if self.space != "sigma":
            return to_x0(self.prediction, x, out, self.signal[i], self.noise[i])
        told = self.levels.here[i]
        if self.prediction == "epsilon":
            return x - meet((told if sigma is None else sigma) * out, x)
        if self.prediction == "v_prediction":
            return meet(out * (-told / (told**2 + 1) ** 0.5), x) + x / (told**2 + 1)
        return out

    def epsilon(self, i: int, x: Tensor, out: Tensor) -> Tensor:
        """Return the noise that the model sees in ``x`` of unit variance at row ``i``."""
        return to_epsilon(self.prediction, x, out, self.signal[i], self.noise[i])

    def to(self, device: torch.device | str) -> Plan[R]:
        """Return the plan with timesteps on ``device``, moved once before the loop. Coefficients stay on the CPU."""
        moved = {name: getattr(self.rows, name).to(device) for name in self.on_device}
        plan, rows = copy(self), cast(Any, self.rows)._replace(**moved)
        vars(plan).update(rows=rows, levels=self.levels._replace(timesteps=self.timesteps.to(device)))
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
            found["to sigma"] = to
        if self.space == "lambda":
            found |= {"lambda": lambda_of(here), "h": self.levels.h}
        if landing is not None:
            found["to timestep"] = landing
        for part, name, column in _flat(self.rows):
            single = column.ndim == 1 if isinstance(column, Tensor) else isinstance(column[0], (str, int))
            if single and any(column):
                found[f"{part} {name}" if name in found else name] = column
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


def _row(rows: Any, i: int) -> Any:
    """Return row ``i`` of a NamedTuple of columns, or of further ones inside it."""
    return type(rows)(*(_row(column, i) if hasattr(column, "_fields") else column[i] for column in rows))


def _flat(rows: Any, part: str = "") -> list[tuple[str, str, Any]]:
    """Return the columns with their names, and those of NamedTuples inside ``rows`` with the name of that part."""
    columns = zip(getattr(rows, "_fields", ()), rows, strict=True)
    return [x for name, c in columns for x in (_flat(c, name) if hasattr(c, "_fields") else [(part, name, c)])]


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Given(NamedTuple):
    """Input of a plan, exactly one of the three: ``steps``; ``timesteps`` of the model; ``sigmas``, one more than the
    number of steps. Both lists fall."""

    steps: int | None = None
    timesteps: Numbers = None
    sigmas: Numbers = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC, Generic[R, S]):
    """Base class of the samplers. Its fields are the options, which are checked on construction.

    ``like_diffusers`` reproduces the deviations of the pinned reference from the mathematics: those in the choice of
    levels are listed in diffusers/grid.py, those of a method's steps in its class. It is set for samplers that are read
    from a scheduler_config.json, and off for those chosen by name.
    """

    order: ClassVar[int] = 1  # model calls per step, where a step takes several
    space: ClassVar[Space] = "alpha_bar"
    own_levels: ClassVar[bool] = False  # True if the method defines its own noise levels and needs no NoiseSchedule
    predicts: ClassVar[Prediction | None] = None  # the prediction type of the model, whatever the schedule says
    initial: ClassVar[Any] = ()  # the state before the first step
    takes: ClassVar[tuple[str, ...]] = ("steps",)  # those of steps, timesteps and sigmas that the reference accepts
    takes_more: ClassVar[tuple[str, ...]] = ()  # those that a sampler chosen by name accepts in addition

    like_diffusers: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def name(self) -> str:
        """Name of the class, for messages."""
        return type(self).__name__

    @property
    def reads_variance(self) -> bool:
        """True if the model's output holds a variance as well, in as many channels again."""
        return False

    @property
    def grid(self) -> Grid:
        """Choice of timesteps and sigmas."""
        return DIFFUSERS if self.like_diffusers else OWN

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Numbers = None,
        sigmas: Numbers = None,
    ) -> Plan[R]:
        """Return the plan, one row per model call, for exactly one of ``steps``, ``timesteps`` and ``sigmas``.
        ``takes`` and ``takes_more`` list which of the three are accepted.

        Raises ConfigError for a number or list that the method cannot run, quoting the limit."""
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

    @property
    def on_device(self) -> tuple[str, ...]:
        """Columns that are used in matrix products with samples, and so are moved to their device."""
        return ()

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
        """Return the state before the first step, whichever row that is; one-step methods need none."""
        return cast(S, self.initial)

    def scale_input(self, plan: Plan[R], i: int, x: Tensor) -> Tensor:
        """Return the model input for sample ``x``. Models are trained on unit variance. If x is the picture plus noise
        (Euler), its variance is sigma**2 + 1, and x is divided by the root of that; otherwise it is returned as is."""
        return x / (plan.levels.here[i] ** 2 + 1) ** 0.5 if self.space == "sigma" else x

    def limit(self, x0: Tensor) -> Tensor:
        """Return ``x0`` within the limits set by the options; see limits.py."""
        return x0

    def denoised(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        """Return the model's estimate x0 of the picture. Use it for previews: x itself is noisy until the end."""
        return self.limit(plan.x0(i, x, out))

    @abstractmethod
    def step(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S, draw: Draw) -> Next[S]:
        """Return the sample at the next row and the new state."""


Sampler = Method
"""Type of the samplers that pipelines take. At run time any object will do that has ``plan``, ``start``,
``scale_input``, ``denoised`` and ``step``."""

NOTHING = NoiseSchedule(torch.ones(1, dtype=torch.float32, device="cpu"))
"""Placeholder for the schedule of a method that defines its own levels."""
