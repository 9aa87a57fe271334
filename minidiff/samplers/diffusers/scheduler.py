"""The scheduler that people know, as a thin shell: the familiar loop of the tutorials runs on any sampler.

    s = Scheduler.from_diffusers(config)
    s.set_timesteps(50)
    x = noise * s.init_noise_sigma
    for t in s.timesteps:
        out = unet(s.scale_model_input(x, t), t)
        x = s.step(out, t, x)          # diffusers: .prev_sample

It keeps what that loop leaves out: the row that t stands for and the sampler's state. Code of one's own is better off
with ``sampler.plan`` and ``sampler.step``, which hide nothing and never wait for the device to tell what t is.

Before ``set_timesteps`` it knows all of training's timesteps (fresh.py): enough to train with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from minidiff.config import check, quote
from minidiff.errors import ConfigError
from minidiff.noise import Generators, source
from minidiff.samplers.diffusers import habits
from minidiff.samplers.method import Method, Plan, Sampler, noisy
from minidiff.schedule import NoiseSchedule

if TYPE_CHECKING:
    from minidiff.samplers.diffusers.fresh import Fresh


class Scheduler:
    """A sampler and its noise schedule behind the familiar methods.

    Before ``set_timesteps``: the timesteps are those of training, falling (1000: 999 ... 0), and noise can be added at
    any of them; DDPM, iPNDM, CM and the methods that work in sigma can walk them, the others raise ConfigError at a
    step, as PNDM does for its timesteps. What is equal to diffusers then is equal to the bit.
    """

    @habits.hinting(habits.MADE_BY_CONFIG)
    def __init__(self, sampler: Sampler[Any, Any], schedule: NoiseSchedule | None) -> None:
        check(hasattr(sampler, "plan"), f"Scheduler needs a sampler, got {quote(sampler)}: {habits.MAKE}")
        known = schedule is None or isinstance(schedule, NoiseSchedule)
        check(known, f"Scheduler needs a NoiseSchedule, got {quote(schedule)}: {habits.MAKE}")
        self.sampler = sampler
        self.schedule = schedule
        self._plan: Plan[Any] | None = None  # of the run that set_timesteps began
        self._fresh: Fresh | None = None  # what there is before
        self._latest: tuple[int, Tensor, Tensor, Any] | None = None  # what the latest step was given

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Scheduler:
        """From a ``scheduler_config.json`` as a dict. Raises as :func:`sampler_from_diffusers` does."""
        from minidiff.samplers.diffusers.read import sampler_from_diffusers, schedule_from_diffusers

        check(isinstance(config, Mapping), f"config={quote(config)} must be a dict, as scheduler_config.json holds it")
        sampler = cast(Sampler[Any, Any], sampler_from_diffusers(config))
        return cls(sampler, NoiseSchedule.from_config(schedule_from_diffusers(config)))

    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ConfigError: diffusers' name for :meth:`from_diffusers`, which reads the class from the config."""
        raise ConfigError(f"Scheduler has no from_config: {habits.FROM_CONFIG}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ConfigError: a folder is read by :func:`weights_convert.load`, a config by :meth:`from_diffusers`."""
        raise ConfigError(f"Scheduler has no from_pretrained: {habits.FROM_PRETRAINED}")

    if not TYPE_CHECKING:  # a type checker is to find unknown names itself

        def __getattr__(self, name: str) -> NoReturn:
            raise habits.missing(type(self), name)

    def __repr__(self) -> str:
        steps = "before set_timesteps" if self._plan is None else f"{len(self._plan)} timesteps"
        return f"Scheduler({self.sampler!r}, {steps})"

    @habits.hinting(habits.PLAN)
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Plan a run and forget the one before. Exactly one of steps, timesteps and sigmas; ConfigError as ``plan``."""
        plan = self.sampler.plan(self.schedule, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        self._begin(plan)
        self._plan = plan if device is None else plan.to(device)

    def _begin(self, plan: Plan[Any]) -> None:
        self._at: list[float] = plan.timesteps.tolist()
        self._next, self._state, self._latest = 0, self.sampler.start(), None

    @property
    def _before(self) -> Fresh:
        """What there is before ``set_timesteps``, made when it is first asked for."""
        if self._fresh is None:
            from minidiff.samplers.diffusers.fresh import fresh

            self._fresh = fresh(self.sampler, self.schedule)
            self._begin(self._fresh.plan)
        return self._fresh

    @property
    def _rows(self) -> Plan[Any]:
        """The plan that tells timesteps and noise, whether it can be walked or not."""
        return self._before.plan if self._plan is None else self._plan

    @property
    def plan(self) -> Plan[Any]:
        """The plan of the current run; print it. ConfigError before ``set_timesteps`` where there is no run yet."""
        if self._plan is None and not self._before.steps:
            raise ConfigError(f"{self._name} can't step before it has timesteps: call set_timesteps(50) first")
        return self._rows

    @property
    def timesteps(self) -> Tensor:
        """(n,): one for each model call."""
        if self._plan is not None:
            return self._plan.timesteps
        if self._before.timesteps is None:
            raise ConfigError(f"{self._name} has no timesteps yet: call set_timesteps(50) first")
        return self._before.timesteps

    @property
    def init_noise_sigma(self) -> Tensor:
        """0-dim: what the first noise is multiplied by."""
        return self._rows.init_noise_sigma

    @property
    def sigmas(self) -> Tensor:
        """(n + 1,), where the method works in sigma; else ConfigError. Before ``set_timesteps`` the methods in lambda
        have (n,), rising where they are read from diffusers' configs."""
        sigmas = self._plan.sigmas if self._plan is not None else self._before.sigmas
        if sigmas is None:
            raise ConfigError(f"{self._name} has no sigmas: it works with alpha_bar")
        return sigmas

    @property
    def _name(self) -> str:
        return type(self.sampler).__name__

    @property
    def order(self) -> int:
        """Model calls per step."""
        return cast(Method[Any, Any], self.sampler).order

    @property
    def last_x0(self) -> Tensor | None:
        """The denoised estimate of the latest step, computed when read; None where there is none."""
        if self._latest is None:
            return None
        i, x, out, state = self._latest
        return self.sampler.denoised(self.plan, i, x, out, state)

    @habits.hinting(habits.SCALE)
    def scale_model_input(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the model is to see for sample ``x`` at ``t``, one of ``timesteps``."""
        plan = self._rows
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
        """The sample after ``x`` at ``t``, as a plain tensor: what diffusers returns as ``.prev_sample`` of an object
        (its ``.pred_original_sample`` is ``last_x0`` here). Noise comes from ``generator`` (or a list, one per image),
        drawn on its own device, unless ``noise`` is given to be used instead. ConfigError for both, for a t that is not
        in ``timesteps``, and before ``set_timesteps`` where the method must know the number of steps.
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
        """``x0`` (B, ...) with noise up to timestep ``t``, scalar or one per image.

        Methods that work in sigma or lambda know the timesteps of the current run (before ``set_timesteps``: all of
        training's); the others any timestep of training."""
        times = (t if isinstance(t, Tensor) else torch.tensor(t, device="cpu")).reshape(-1)
        plan = self._rows
        space = plan.levels.put[0] if plan.levels.put is not None else plan.space
        if space == "alpha_bar":
            if not cast(Method[Any, Any], self.sampler).own_levels:  # any timestep of training will do
                return cast(NoiseSchedule, self.schedule).add_noise(x0, noise, times)
            levels, find = plan.levels.here, self._first
        else:
            levels, find = self.sigmas, self._second
        level = levels.to(x0.dtype)[[find(v) for v in times.tolist()]].to(x0.device)
        return noisy(space, x0, noise, level.reshape(-1, *(1 for _ in x0.shape[1:])))

    def _row(self, t: Tensor | float) -> int:
        """The row of ``t``: the first one from the row after the latest step on, else the first of all. (PNDM has
        one timestep twice.)"""
        value = float(t)
        begins = self._next == 0 or value not in self._at[self._next :]
        if begins and self.order > 1:  # a run begins where an interval does
            return self._second(value)
        return self._find(value, self._next)

    def _second(self, value: float) -> int:
        """The later of two rows of ``value``, or the only one."""
        first = self._find(value, 0)
        return self._find(value, first + 1) if value in self._at[first + 1 :] else first

    def _first(self, value: float) -> int:
        return self._find(value, 0)

    def _find(self, value: float, first: int) -> int:
        if value in self._at[first:]:
            return self._at.index(value, first)
        if value in self._at:
            return self._at.index(value)
        shown = ", ".join(f"{v:g}" for v in self._at[:4])
        raise ConfigError(f"t={value:g} is none of the scheduler's timesteps ({shown}, ...): pass one of s.timesteps")


def _randn(like: Tensor, generator: Generators | None) -> Tensor:
    """Noise as diffusers draws it: from torch's global generator, or as :func:`~minidiff.noise.source` does."""
    if generator is None:
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    return source(len(like), None, generator)(tuple(like.shape), like.dtype, like.device)
