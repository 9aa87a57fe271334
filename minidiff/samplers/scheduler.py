"""The scheduler that people know, as a thin shell: the familiar loop of the tutorials runs on any sampler.

    s = Scheduler.from_diffusers(config)
    s.set_timesteps(50)
    x = noise * s.init_noise_sigma
    for t in s.timesteps:
        out = unet(s.scale_model_input(x, t), t)
        x = s.step(out, t, x)          # diffusers: .prev_sample

It keeps what that loop leaves out: the row that t stands for and the sampler's state. Code of one's own is better off
with ``sampler.plan`` and ``sampler.step``, which hide nothing and never wait for the device to tell what t is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.noise import Generators, source
from minidiff.samplers.base import Options, Plan, Sampler
from minidiff.samplers.lambda_plan import LambdaPlan, rates
from minidiff.samplers.sigma_plan import SigmaPlan
from minidiff.schedule import NoiseSchedule


class Scheduler:
    """A sampler and its noise schedule behind the familiar methods. ConfigError before ``set_timesteps``."""

    def __init__(self, sampler: Sampler[Any, Any], schedule: NoiseSchedule | None) -> None:
        self.sampler = sampler
        self.schedule = schedule
        self._plan: Plan | None = None
        self._latest: tuple[int, Tensor, Tensor, Any] | None = None  # what the latest step was given

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Scheduler:
        """From a ``scheduler_config.json`` as a dict. Raises as :func:`sampler_from_diffusers` does."""
        from minidiff.samplers.from_diffusers import sampler_from_diffusers, schedule_from_diffusers

        sampler = cast(Sampler[Any, Any], sampler_from_diffusers(config))
        return cls(sampler, NoiseSchedule.from_config(schedule_from_diffusers(config)))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Plan a run and forget the one before. Exactly one of steps, timesteps and sigmas; ConfigError as ``plan``."""
        plan = self.sampler.plan(self.schedule, num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        self._at: list[float] = plan.timesteps.tolist()
        self._plan = plan if device is None else plan.to(device)
        self._next, self._state, self._latest = 0, self.sampler.start(), None

    @property
    def plan(self) -> Plan:
        """The plan of the current run; print it."""
        if self._plan is None:
            raise ConfigError("the scheduler has no timesteps yet: call set_timesteps(50) first")
        return self._plan

    @property
    def timesteps(self) -> Tensor:
        """(n,): one for each model call."""
        return self.plan.timesteps

    @property
    def init_noise_sigma(self) -> Tensor:
        """0-dim: what the first noise is multiplied by."""
        return self.plan.init_noise_sigma

    @property
    def sigmas(self) -> Tensor:
        """(n + 1,), where the method works in sigma; else ConfigError."""
        plan = self.plan
        if not isinstance(plan, (SigmaPlan, LambdaPlan)):
            raise ConfigError(f"{type(self.sampler).__name__} has no sigmas: it works with alpha_bar")
        return plan.sigmas

    @property
    def order(self) -> int:
        """Model calls per step."""
        return cast(Options, self.sampler).order

    @property
    def last_x0(self) -> Tensor | None:
        """The denoised estimate of the latest step, computed when read; None where there is none."""
        if self._latest is None:
            return None
        i, x, out, state = self._latest
        return self.sampler.denoised(self.plan, i, x, out, state)

    def scale_model_input(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the model is to see for sample ``x`` at ``t``, one of ``timesteps``."""
        return self.sampler.scale_input(self.plan, self._row(t), x)

    def step(
        self,
        model_output: Tensor,
        t: Tensor | float,
        x: Tensor,
        generator: Generators | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The sample after ``x`` at ``t``. Noise comes from ``generator`` (or a list, one per image), drawn on its own
        device, unless ``noise`` is given to be used instead. ConfigError for both, or a t that is not in ``timesteps``.
        """
        check(generator is None or noise is None, "generator and noise are both given: step draws from one of them")
        i = self._row(t)
        if i < self._next:  # back to an earlier row: a new run
            self._state = self.sampler.start()
        self._latest = (i, x, model_output, self._state)
        self._next = i + 1

        def draw(like: Tensor) -> Tensor:
            return noise if noise is not None else _randn(like, generator)

        x, self._state = self.sampler.step(self.plan, i, x, model_output, self._state, draw)
        return x

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """``x0`` (B, ...) with noise up to timestep ``t``, scalar or one per image.

        Methods that work in sigma know the timesteps of the current run; the others any timestep of training, also
        before ``set_timesteps``."""
        times = torch.as_tensor(t).reshape(-1)
        in_lambda = isinstance(self._plan, LambdaPlan) and not self._plan.noise_by_timestep
        sampler = cast(Options, self.sampler)
        if not in_lambda and not sampler.in_sigma:
            if not sampler.own_levels:  # any timestep of training will do
                return cast(NoiseSchedule, self.schedule).add_noise(x0, noise, times)
            plan = self.plan
            rows = [self._find(v, 0) for v in times.tolist()] * (len(x0) // len(times))
            return torch.cat([plan.add_noise(x0[k : k + 1], noise[k : k + 1], i) for k, i in enumerate(rows)])
        sigmas = self.sigmas.to(x0.dtype)
        sigma = torch.stack([sigmas[self._find(v, 0)] for v in times.tolist()]).to(x0.device)
        sigma = sigma.reshape(-1, *(1 for _ in x0.shape[1:]))
        if in_lambda:
            signal, sigma = rates(sigma)
            x0 = signal * x0
        return x0 + noise * sigma

    def _row(self, t: Tensor | float) -> int:
        """The row of ``t``: the first one from the row after the latest step on, else the first of all. (PNDM has
        one timestep twice.)"""
        _ = self.plan  # an error if there is none
        value = float(t)
        begins = self._next == 0 or value not in self._at[self._next :]
        if begins and self.order > 1:  # a run begins where an interval does: the later of two equal rows
            rows = [i for i, at in enumerate(self._at) if at == value]
            if rows:
                return rows[:2][-1]
        return self._find(value, self._next)

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
