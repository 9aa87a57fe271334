"""Conventions of other programs: pictures as from diffusers, CompVis, k-diffusion, AUTOMATIC1111 or ComfyUI.

``profiles.py`` holds the data: the choices of each program with their source files. ``read("a1111:karras")`` returns a
:class:`Convention`, which applies them: it creates the sampler, draws the noise, and decides when guidance is skipped.
It reproduces the choice of numbers, not their rounding: the arithmetic of a step is that of our own sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidiff.config import ScheduleConfig, check
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.philox import A100, Card
from minidiff.programs.levels import noise_table
from minidiff.programs.profiles import PROFILES, Profile
from minidiff.programs.program import LEVELS, ProgramSampler
from minidiff.programs.starts import Start, start
from minidiff.programs.streams import Streams, streams
from minidiff.samplers import sampler_from_config, sampler_from_diffusers, sampler_to_config
from minidiff.samplers.elsewhere import suggestion

DEVICES = ("cpu", "gpu", "nv")


@dataclass(frozen=True)
class Convention:
    """A program, and what the user chose where it offers a choice: ``scheduler`` (None: its default), ``device`` of the
    noise ("cpu", "gpu", "nv" or None: its default), ``card`` whose CUDA stream it is on a GPU."""

    profile: Profile
    scheduler: str | None = None
    device: str | None = None
    card: Card = A100

    def __str__(self) -> str:
        return ":".join(filter(None, [self.profile.name, self.scheduler, self.device]))

    def guided(self, scale: float) -> bool:
        """Return True if both predictions are computed; otherwise only the conditional one is."""
        rule = self.profile.guidance.value
        if rule == "above 1":
            return scale > 1
        return rule == "never" or not (math.isclose(scale, 1) if rule == "about 1" else scale == 1)

    def start(self, sampler: str, steps: int, strength: float, total: int = 1000) -> Start:
        """Return the starting point of img2img with the sampler of that name: see :class:`Start`."""
        rule = self.profile.start.value
        strided = rule == "a1111" and sampler in ("ddim", "pndm")
        return start("a1111 strided" if strided else rule, steps, strength, total)

    def streams(self, seed: int | Sequence[int] | None, count: int) -> Streams:
        """Return the noise streams of ``count`` pictures."""
        return streams(self.profile, seed, count, self.device, self.card)

    def sampler(self, schedule: ScheduleConfig, choice: str | Mapping[str, Any]) -> ProgramSampler:
        """Return the named sampler, as the program runs it on a model with this schedule.

        ``choice``: our name, or {"name": ..., options}; the options take precedence over the program's. Raises
        ConfigError for a sampler that the program does not have.
        """
        choice = {"name": choice} if isinstance(choice, str) else choice
        given = {key: value for key, value in choice.items() if key != "name"}
        name, methods = str(choice.get("name")), self.profile.methods
        if name not in methods:
            known = ", ".join(methods)
            raise ConfigError(
                f"{self.profile.name} has no sampler {name!r}; choose one of {known}{suggestion(name, methods)}"
            )
        method = methods[name]
        strided = name in ("ddim", "pndm") and method.sampler == name
        if self.scheduler is not None and strided:
            raise ConfigError(
                f"{self.profile.name} gives {name} no {self.scheduler!r}: its timesteps are T // steps apart"
            )
        clash = LEVELS & given.keys() if self.scheduler is not None else set()
        if clash:
            raise ConfigError(
                f"{', '.join(sorted(clash))} would replace the sigmas of {self.profile.name}:{self.scheduler}; give one"
            )
        if "_class_name" in method.options:
            inner = sampler_to_config(sampler_from_diffusers(method.options))
        else:
            inner = {"name": method.sampler, **method.options}
        return ProgramSampler(
            profile=self.profile,
            name=name,
            method=method,
            given=given,
            inner=sampler_from_config({**inner, **given}),
            table=noise_table(self.profile.table.value, schedule),
            scheduler=self.scheduler,
        )


def read(like: str | Convention) -> Convention:
    """Parse ``NAME``, optionally followed by choices after colons: a scheduler of the program, and cpu, gpu or nv for
    its noise, such as ``comfyui:karras`` or ``a1111:cpu``. Raises ConfigError, quoting the known values."""
    if isinstance(like, Convention):
        return like
    check(isinstance(like, str), f"like={like!r} must be a name or a Convention")
    name, *choices = like.split(":")
    guess = near(name, PROFILES)
    check(name in PROFILES, f"no program is called {name!r}; known are {', '.join(PROFILES)}{guess}")
    profile = PROFILES[name]
    scheduler = device = None
    for choice in choices:
        known = [*profile.schedulers, *DEVICES]
        check(choice in known, f"{name} has no {choice!r}; known are {', '.join(known)}{near(choice, known)}")
        if choice in DEVICES:
            device = choice
        else:
            scheduler = choice
    return Convention(profile, scheduler, device)


def checked(like: str, choice: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """``choice`` as it is, if the program has that sampler and it those options; what else a run needs is the model's.

    Raises ConfigError as :func:`read` and :meth:`Convention.sampler` do."""
    convention = read(like)
    if choice is not None:
        convention.sampler(ScheduleConfig(), choice)
    return choice
