"""Thin wrapper with the interface of diffusers' schedulers: the loop known from tutorials runs with any sampler.

    s = Scheduler.from_diffusers(config)
    s.set_timesteps(50)
    x = noise * s.init_noise_sigma
    for t in s.timesteps:
        out = unet(s.scale_model_input(x, t), t)
        x = s.step(out, t, x)          # diffusers: .prev_sample

It keeps what that loop does not pass along: the row of t and the sampler's state. In new code prefer ``sampler.plan``
and ``sampler.step``, which have no hidden state and need no synchronization to read t from the device.

Before ``set_timesteps`` it has all of training's timesteps (fresh.py), which is enough for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from minidiff.config import check, quote
from minidiff.errors import ConfigError
from minidiff.noise import Generators, source
from minidiff.samplers.arithmetic import noisy
from minidiff.samplers.diffusers import habits
from minidiff.samplers.diffusers.config import read_sampler, schedule_from_diffusers, warn_of_unknown
from minidiff.samplers.diffusers.fresh import Listed, fresh, listed
from minidiff.samplers.method import Plan, Sampler
from minidiff.schedule import NoiseSchedule

T = TypeVar("T")


class Scheduler:
    """A sampler and its noise schedule with the methods of diffusers' schedulers.

    Before ``set_timesteps``, the timesteps are those of training, falling (for 1000: 999 ... 0), and noise can be added
    at any of them. DDPM, iPNDM, CM and the methods that work in sigma can also do steps; the others raise ConfigError
    at a step, and PNDM for its timesteps. Values that match diffusers match it bit for bit.
    """

    @habits.hinting(habits.MADE_BY_CONFIG)
    def __init__(self, sampler: Sampler[Any, Any], schedule: NoiseSchedule | None) -> None:
        check(hasattr(sampler, "plan"), f"Scheduler needs a sampler, got {quote(sampler)}: {habits.MAKE}")
        known = schedule is None or isinstance(schedule, NoiseSchedule)
        check(known, f"Scheduler needs a NoiseSchedule, got {quote(schedule)}: {habits.MAKE}")
        self.sampler = sampler
        self.schedule = schedule
        self._begun = False  # by set_timesteps
        self._listed: Listed | None = None  # before that, created on first access
        self._latest: tuple[int, Tensor, Tensor, Any] | None = None  # inputs of the latest step

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Scheduler:
        """Create a scheduler from a ``scheduler_config.json``, given as a dict. Raises as
        :func:`sampler_from_diffusers` does."""
        check(isinstance(config, Mapping), f"config={quote(config)} must be a dict, as scheduler_config.json holds it")
        warn_of_unknown(config)
        return cls(read_sampler(config), NoiseSchedule.from_config(schedule_from_diffusers(config)))

    from_config = habits.absent("from_config")
    from_pretrained = habits.absent("from_pretrained")

    if not TYPE_CHECKING:  # type checkers should report unknown names themselves

        def __getattr__(self, name: str) -> NoReturn:
            raise habits.missing(type(self), name)

    def __repr__(self) -> str:
        steps = f"{len(self.timesteps)} timesteps" if self._begun else "before set_timesteps"
        return f"Scheduler({self.sampler!r}, {steps})"

    @habits.hinting(habits.PLAN)
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Start a new run with exactly one of steps, timesteps and sigmas. Raises ConfigError as ``sampler.plan``."""
        plan = self.sampler.plan(self.schedule, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        self._begin(plan)
        self._begun, self._listed = True, listed(plan if device is None else plan.to(device))

    def _begin(self, plan: Plan[Any]) -> None:
        self._at: list[float] = plan.timesteps.tolist()
        self._next, self._state, self._latest = 0, self.sampler.start(), None

    @property
    def _now(self) -> Listed:
        if self._listed is None:
            self._listed = fresh(self.sampler, self.schedule)
            self._begin(self._listed.plan)
        return self._listed

    def _known(self, value: T | None, what: str) -> T:
        """Return ``value``. Raises ConfigError, saying ``what`` is the case, if it is None."""
        if value is None:
            raise ConfigError(f"{type(self.sampler).__name__} {what}")
        return value

    @property
    def plan(self) -> Plan[Any]:
        """Plan of the current run; print it. Raises ConfigError before ``set_timesteps`` if there is no run yet."""
        plan = self._now.plan if self._now.steps else None
        return self._known(plan, "can't step before it has timesteps: call set_timesteps(50) first")

    @property
    def timesteps(self) -> Tensor:
        """Timesteps, one for each model call, (n,)."""
        return self._known(self._now.timesteps, "has no timesteps yet: call set_timesteps(50) first")

    @property
    def init_noise_sigma(self) -> Tensor:
        """Factor of the first noise, 0-dim."""
        return self._now.plan.init_noise_sigma

    @property
    def sigmas(self) -> Tensor:
        """Sigmas, (n + 1,). Raises ConfigError if the method does not work in sigma. Before ``set_timesteps`` the
        methods in lambda have (n,), rising if they were read from a config of diffusers."""
        return self._known(self._now.sigmas, "has no sigmas: it works with alpha_bar")

    @property
    def order(self) -> int:
        """Model calls per step."""
        return self.sampler.order

    @property
    def last_x0(self) -> Tensor | None:
        """Denoised estimate of the latest step, computed on access; None if there is none."""
        if self._latest is None:
            return None
        i, x, out, state = self._latest
        return self.sampler.denoised(self.plan, i, x, out, state)

    @habits.hinting(habits.SCALE)
    def scale_model_input(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the model input for sample ``x`` at ``t``, one of ``timesteps``."""
        plan = self._now.plan
        return self.sampler.scale_input(plan, self._row(t), x)

    @habits.hinting(habits.STEP)
    def step(
        self,
        model_output: Tensor,
        t: Tensor | float,
        x: Tensor,
        generator: Generators | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the sample after ``x`` at ``t`` as a plain tensor: ``.prev_sample`` in diffusers (whose
        ``.pred_original_sample`` is ``last_x0`` here).

        Noise is drawn from ``generator`` (or a list, one per image) on its own device, unless ``noise`` is given.
        Raises ConfigError if both are given, if t is not in ``timesteps``, and before ``set_timesteps`` if the method
        needs the number of steps.
        """
        check(generator is None or noise is None, "generator and noise are both given: step draws from one of them")
        plan = self.plan
        i = self._row(t)
        if i < self._next:  # back to an earlier row: a new run
            self._state = self.sampler.start()
        self._latest = (i, x, model_output, self._state)
        self._next = i + 1

        def draw(like: Tensor) -> Tensor:
            return noise if noise is not None else _randn(like, generator)

        x, self._state = self.sampler.step(plan, i, x, model_output, self._state, draw)
        return x

    @habits.hinting(habits.ADD_NOISE)
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Add ``noise`` to ``x0`` (B, ...) at timestep ``t``, scalar or one per image.

        Methods that work in sigma or lambda accept the timesteps of the current run (before ``set_timesteps``: all of
        training's); the others accept any timestep of training."""
        times = (t if isinstance(t, Tensor) else torch.tensor(t, device="cpu")).reshape(-1)
        plan = self._now.plan
        space = plan.levels.put[0] if plan.levels.put is not None else plan.space
        if space == "alpha_bar" and not self.sampler.own_levels:  # any timestep of training
            return cast(NoiseSchedule, self.schedule).add_noise(x0, noise, times)
        levels, nth = (plan.levels.here, 0) if space == "alpha_bar" else (self.sigmas, 1)  # of two rows, the second
        rows = [self._rows_of(t)[: nth + 1][-1] for t in times.tolist()]
        level = levels.to(x0.dtype)[rows].to(x0.device)
        return noisy(space, x0, noise, level.reshape(-1, *(1 for _ in x0.shape[1:])))

    def _row(self, t: Tensor | float) -> int:
        """Return the row of ``t``: the first match after the row of the latest step, else the first of all. (PNDM has
        one timestep twice.) A run of intervals of several rows starts where an interval does."""
        rows = self._rows_of(float(t))
        later = [i for i in rows if i >= self._next]
        begins = self._next == 0 or not later
        return rows[:2][-1] if begins and self.order > 1 else (later or rows)[0]

    def _rows_of(self, t: float) -> list[int]:
        """Return all rows of ``t``. Raises ConfigError if there are none."""
        rows = [i for i, listed in enumerate(self._at) if listed == t]
        shown = ", ".join(f"{v:g}" for v in self._at[:4])
        check(bool(rows), f"t={t:g} is none of the scheduler's timesteps ({shown}, ...): pass one of s.timesteps")
        return rows


def _randn(like: Tensor, generator: Generators | None) -> Tensor:
    """Draw noise as diffusers does: from torch's global generator, or as :func:`~minidiff.noise.source` does."""
    if generator is None:
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    return source(len(like), None, generator)(tuple(like.shape), like.dtype, like.device)
