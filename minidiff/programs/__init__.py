"""Programs: the choices that the papers leave open, as minidiff, diffusers, CompVis, k-diffusion, AUTOMATIC1111 and
ComfyUI make them.

``profiles.py`` holds the data: the choices of each program with their source files, minidiff's own first. A new program
is one more profile there. ``read("a1111:karras")`` returns a :class:`Program`, which applies them: it chooses the noise
levels of a sampler, draws the noise, decides when guidance is skipped and where image to image starts. It reproduces
the choice of numbers, not their rounding: the arithmetic of a step is that of our own sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidiff import noise
from minidiff.config import ScheduleConfig, check
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.philox import A100, Card
from minidiff.programs import img2img
from minidiff.programs.profiles import PROFILES, Method, Profile
from minidiff.programs.program_sampler import LEVELS, ProgramSampler
from minidiff.programs.streams import Streams, streams
from minidiff.samplers import check_name, name_of, sampler_from_config, sampler_from_diffusers, sampler_to_config
from minidiff.samplers.elsewhere import suggestion
from minidiff.samplers.method import Sampler

OWN = "minidiff"
DEVICES = ("cpu", "gpu", "nv")


@dataclass(frozen=True)
class Program:
    """A program with the user's choices: ``scheduler`` (None: its default), ``device`` of the noise ("cpu", "gpu", "nv"
    or None: its default), ``card`` whose CUDA stream is drawn on a GPU."""

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

    def entry(self, sampler: str, steps: int, strength: float, total: int = 1000) -> img2img.Entry:
        """Return where img2img with the sampler of that name enters a plan: see :class:`img2img.Entry`."""
        rule = self.profile.start.value
        strided = rule == "a1111" and sampler in ("ddim", "pndm")
        return img2img.entry("a1111 strided" if strided else rule, steps, strength, total)

    def streams(
        self, seed: int | Sequence[int] | None, count: int, generator: noise.Generators | None = None
    ) -> Streams:
        """Return the noise streams of ``count`` pictures; a ``generator`` takes their place."""
        if generator is not None:
            given = noise.source(count, seed, generator)
            return Streams(given, given, [], given.shared)
        return streams(self.profile, seed, count, self.device, self.card)

    def sampler(
        self,
        schedule: ScheduleConfig,
        choice: str | Mapping[str, Any] | Sampler[Any, Any] | None,
        own: Mapping[str, Any] | None = None,
    ) -> ProgramSampler:
        """Return a sampler as the program runs it on a model with this schedule.

        ``choice``: our name, or {"name": ..., options}; the options take precedence over the program's. None: that of
        the checkpoint, ``own``. minidiff itself also takes a sampler that is ready, and the options of ``own``. Raises
        :class:`ConfigError` for a sampler that the program does not have.
        """
        profile, free = self.profile, self.profile.name == OWN
        if choice is None and own is not None:
            choice = own if free else str(own.get("name"))
        if choice is None:
            raise ConfigError("no sampler is given, and the model names none of its own; name one with sampler=")
        if not isinstance(choice, (str, Mapping)):
            kind = type(choice).__name__
            check(free, f'{kind} is ready as it is; with like= give {{"name": ..., options}}')
            check(callable(getattr(choice, "plan", None)), f"sampler={choice!r} is neither a name nor a Sampler")
            return ProgramSampler(profile, kind, Method(kind), {}, choice, described(choice), schedule)
        choice = {"name": choice} if isinstance(choice, str) else choice
        given = {key: value for key, value in choice.items() if key != "name"}
        name, methods = str(choice.get("name")), profile.methods
        if free:
            check_name(choice.get("name"))
        if name not in methods:
            known = ", ".join(methods)
            raise ConfigError(
                f"{profile.name} has no sampler {name!r}; choose one of {known}{suggestion(name, methods)}"
            )
        method = methods[name]
        strided = name in ("ddim", "pndm") and method.sampler == name
        if self.scheduler is not None and strided:
            raise ConfigError(f"{profile.name} gives {name} no {self.scheduler!r}: its timesteps are T // steps apart")
        clash = LEVELS & given.keys() if self.scheduler is not None else set()
        if clash:
            raise ConfigError(
                f"{', '.join(sorted(clash))} would replace the sigmas of {profile.name}:{self.scheduler}; give one"
            )
        if "_class_name" in method.options:
            inner = sampler_to_config(sampler_from_diffusers(method.options))
        else:
            inner = {"name": method.sampler, **method.options}
        sampler = sampler_from_config({**inner, **given})
        return ProgramSampler(
            profile=profile,
            name=name,
            method=method,
            given=given,
            inner=sampler,
            note=described(sampler) if free else {"name": name, **given},
            config=schedule,
            scheduler=self.scheduler,
        )


def described(sampler: Sampler[Any, Any]) -> dict[str, Any]:
    """Return a recipe's entry for a sampler: its name and options, or class name and text form for a caller's own."""
    if name_of(sampler) is None:
        return {"name": type(sampler).__name__, "options": str(sampler)}
    return sampler_to_config(sampler)


Convention = Program  # its name in earlier releases


def read(like: str | Program | None) -> Program:
    """Return a program; None is minidiff itself.

    ``like``: ``NAME``, optionally followed by choices after colons: a scheduler of the program, and cpu, gpu or nv for
    its noise, such as ``comfyui:karras`` or ``a1111:cpu``. Raises :class:`ConfigError`, quoting the known values.
    """
    if isinstance(like, Program):
        return like
    like = OWN if like is None else like
    check(isinstance(like, str), f"like={like!r} must be a name or a Program")
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
    return Program(profile, scheduler, device)


def checked(like: str, choice: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """Return ``choice`` unchanged if the program has that sampler, and the sampler those options.

    Raises :class:`ConfigError` as :func:`read` and :meth:`Program.sampler` do.
    """
    program = read(like)
    if choice is not None:
        program.sampler(ScheduleConfig(), choice)
    return choice
