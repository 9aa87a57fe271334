"""Samplers by name, as JSON, or from diffusers' scheduler configs; one file per method.

A sampler chosen by name follows the mathematics, with defaults that suit Stable Diffusion; one that is read from a
scheduler_config.json does what diffusers does, its slips included (``like_diffusers``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from minidiff.config import check, from_json
from minidiff.errors import ConfigError
from minidiff.samplers import from_diffusers as _readers
from minidiff.samplers.base import Draw, Options, Plan, Sampler
from minidiff.samplers.ddim import DDIM
from minidiff.samplers.ddpm import DDPM
from minidiff.samplers.dpm2 import DPM2, DPM2Ancestral
from minidiff.samplers.dpm_solver import DPMSolver, DPMSolver2MSDE, DPMSolver3MSDE
from minidiff.samplers.euler import Euler
from minidiff.samplers.euler_ancestral import EulerAncestral
from minidiff.samplers.from_diffusers import schedule_from_diffusers
from minidiff.samplers.heun import Heun
from minidiff.samplers.lms import LMS
from minidiff.samplers.pndm import PNDM
from minidiff.samplers.scheduler import Scheduler

__all__ = [
    "DDIM",
    "DDPM",
    "DPM2",
    "LMS",
    "PNDM",
    "SAMPLERS",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMSolver2MSDE",
    "DPMSolver3MSDE",
    "Draw",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Options",
    "Plan",
    "Sampler",
    "Scheduler",
    "sampler_from_config",
    "sampler_from_diffusers",
    "sampler_to_config",
    "schedule_from_diffusers",
]

SAMPLERS: dict[str, type[Options]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "pndm": PNDM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "lms": LMS,
    "dpmpp_2m": DPMSolver,
    "dpmpp_2m_sde": DPMSolver2MSDE,
    "dpmpp_3m_sde": DPMSolver3MSDE,
    "dpm2": DPM2,
    "dpm2_ancestral": DPM2Ancestral,
}


def sampler_from_diffusers(config: Mapping[str, Any]) -> Sampler[Any, Any]:
    """The sampler that a ``scheduler_config.json`` (as a dict) describes: ``_class_name`` and its options.

    Raises UnsupportedError for a class that is not known and for flow matching, ConfigError for unknown or impossible
    options.
    """
    return cast(Sampler[Any, Any], _readers.sampler_from_diffusers(config))


def sampler_from_config(config: Mapping[str, Any]) -> Sampler[Any, Any]:
    """The sampler of ``{"name": "pndm", ...options}``; options that are left out have their defaults.

    Raises ConfigError for an unknown name or option, quoting the known ones.
    """
    name = config.get("name")
    known = ", ".join(SAMPLERS)
    if name not in SAMPLERS:
        raise ConfigError(f"no sampler is called {name!r}; known are {known}")
    kind = SAMPLERS[name]
    options = {key: value for key, value in config.items() if key != "name"}
    fields = [f.name for f in dataclasses.fields(kind)]
    unknown = [key for key in options if key not in fields]
    check(not unknown, f"{name} has no option {', '.join(map(repr, unknown))}; it knows {', '.join(fields)}")
    return cast(Sampler[Any, Any], from_json(kind, options))


def sampler_to_config(sampler: Any) -> dict[str, Any]:
    """The sampler as a dict that :func:`sampler_from_config` reads back equal, every option spelled out."""
    for name, kind in SAMPLERS.items():
        if type(sampler) is kind:
            return {"name": name, **dataclasses.asdict(sampler)}
    raise ConfigError(f"{type(sampler).__name__} is none of the named samplers: {', '.join(SAMPLERS)}")
