"""Sampler of ours that runs as another program runs its own: other noise levels, the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from minidiff.config import ScheduleConfig, check
from minidiff.errors import ConfigError
from minidiff.programs.levels import Table, levels, noise_table, strided
from minidiff.programs.profiles import Method, Profile
from minidiff.samplers.method import Plan, Sampler
from minidiff.schedule import NoiseSchedule, check_steps

LEVELS = {"spacing", "steps_offset", "sigma_spacing", "interpolation", "sigma_min", "sigma_max", "final_sigma"}
"""Options that choose levels: with one of them the sampler's own levels are visited, not the program's."""


@dataclass(frozen=True, eq=False, repr=False)
class ProgramSampler:
    """Sampler as a program runs it: ``inner`` takes the steps, the plan is the program's. ``given``: the options that
    the user chose. ``note``: the sampler's entry in a picture's recipe."""

    profile: Profile
    name: str
    method: Method
    given: Mapping[str, Any]
    inner: Sampler[Any, Any]
    note: Mapping[str, Any]
    config: ScheduleConfig
    scheduler: str | None = None

    @cached_property
    def table(self) -> Table:
        """The program's table of noise levels for a model with this schedule."""
        return noise_table(self.profile.table.value, self.config)

    def __repr__(self) -> str:
        like = ":".join(filter(None, [self.profile.name, self.scheduler]))
        given = "".join(f", {name}={value!r}" for name, value in self.given.items())
        return f"ProgramSampler: {self.name}{given} as {like} has it, by {self.inner!r}"

    def plan(
        self,
        schedule: NoiseSchedule | None = None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Any:
        """Return the plan, one row per model call. ``schedule``: None, or for a program with another table of noise
        levels, is that table."""
        schedule = schedule if schedule is not None and self.profile.table.value == "float32" else self.table.schedule
        if timesteps is not None:
            return self.inner.plan(schedule, steps, timesteps=timesteps, sigmas=sigmas)
        if sigmas is not None or LEVELS & self.given.keys() or self.profile.spacing.value == "class":
            return self._told(self.inner.plan(schedule, steps, sigmas=sigmas))
        steps = check_steps(steps, len(self.table.sigmas))
        if self.method.sampler in ("ddim", "pndm"):
            return self._strided(steps)
        default = self.profile.schedulers[0]
        walk = levels(self.table, self.scheduler or default, steps, self.method.discard, self.method.last)
        inner = self.inner
        if self.method.sampler == "unipc" and "solver_order" not in self.given:
            inner = replace(inner, solver_order=max(1, min(3, len(walk) - 2)))  # type: ignore[call-arg]
        return self._told(inner.plan(self.table.schedule, sigmas=walk.tolist()))

    def _strided(self, steps: int) -> Any:
        """Return the plan of DDIM or PLMS.

        For some numbers of steps (3, 9, 27, ...) the highest timestep is T, which does not exist: CompVis fails, a1111
        takes T - 1. a1111 makes no step from timestep 1.
        """
        total = len(self.table.sigmas)
        times = strided(total, steps)
        if self.profile.name != "a1111":
            return self.inner.plan(self.table.schedule, timesteps=times)
        times = [min(t, total - 1) for t in times]
        return without_last_row(self.inner.plan(self.table.schedule, timesteps=times))

    def _told(self, plan: Any) -> Any:
        """Return ``plan`` with the timesteps that the program tells the model, and its scale of the first noise."""
        told = self.profile.told.value
        if told not in ("fractional", "nearest") or self.method.sampler in ("ddim", "pndm"):
            return plan
        way = self.table.fractional if told == "fractional" else self.table.nearest
        sigmas = plan.columns()["sigma"]
        top = sigmas[0]
        unit = (top**2 + 1) ** 0.5
        largest = float(self.table.sigmas[-1])
        full = math.isclose(float(top), largest, rel_tol=1e-5) or float(top) > largest
        scale = unit if self.profile.scale.value == "max" and full else top
        if plan.space != "sigma":  # x keeps unit variance: the same sample, divided by sqrt(sigma**2 + 1)
            scale = scale / unit
        return replace(plan, levels=plan.levels._replace(timesteps=way(sigmas), first=scale))

    def seeded(self, seeds: Sequence[int]) -> ProgramSampler:
        """Return this sampler with the seed of the Brownian tree, if the program takes it from the run's.

        Raises :class:`ConfigError` for several pictures if each has a tree: ours has one for the batch.
        """
        rule = self.profile.brownian.value
        mine = self.method.sampler == "dpmpp_sde" and self.given.get("noise_seed") is None
        if not mine or rule not in ("image", "batch"):
            return self
        if rule == "image" and len(seeds) > 1:
            raise ConfigError(
                f"{self.profile.name} gives each picture of {self.name} a Brownian tree; make them one by one"
            )
        return replace(self, inner=replace(self.inner, noise_seed=seeds[0]))  # type: ignore[call-arg]


def without_last_row(plan: Plan[Any]) -> Plan[Any]:
    """Return ``plan`` without its last model call. Raises :class:`ConfigError` for a plan of one."""
    check(len(plan) > 1, "a1111 leaves out the step of timestep 1: with one step nothing remains; use more steps")
    rows = type(plan.rows)(*(column[:-1] for column in plan.rows))
    return replace(plan, levels=plan.levels.part(slice(-1)), rows=rows)
