"""Samplers by name, as JSON, or from diffusers' scheduler configs; one file per method.

A sampler chosen by name follows the mathematics, with defaults for Stable Diffusion. A sampler read from a
scheduler_config.json does what diffusers does, including its slips (``like_diffusers``).

``SAMPLERS`` is the registry. The module of a method is imported on first use, since a run needs only one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from minidiff.config import check, from_json, quote
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.samplers.elsewhere import suggestion
from minidiff.samplers.method import Draw, Levels, Method, Plan, Sampler

if TYPE_CHECKING:
    from minidiff.samplers.consistency import CM, LCM, TCD
    from minidiff.samplers.ddim import DDIM, DDIMInverse
    from minidiff.samplers.ddpm import DDPM
    from minidiff.samplers.deis import DEIS
    from minidiff.samplers.diffusers.read import schedule_from_diffusers
    from minidiff.samplers.diffusers.scheduler import Scheduler
    from minidiff.samplers.dpm2 import DPM2, DPM2Ancestral
    from minidiff.samplers.dpm_singlestep import DPMSolverSinglestep
    from minidiff.samplers.dpm_solver import DPMSolver, DPMSolver2MSDE, DPMSolver3MSDE, DPMSolverInverse
    from minidiff.samplers.dpmpp_sde import DPMSDE
    from minidiff.samplers.edm import EDMEuler, EDMMultistep
    from minidiff.samplers.euler import Euler, EulerAncestral
    from minidiff.samplers.heun import Heun
    from minidiff.samplers.lms import LMS
    from minidiff.samplers.pndm import IPNDM, PNDM
    from minidiff.samplers.sa_solver import SASolver
    from minidiff.samplers.unipc import UniPC

__all__ = [
    "CM",
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "DPMSDE",
    "IPNDM",
    "LCM",
    "LMS",
    "PNDM",
    "SAMPLERS",
    "TCD",
    "DDIMInverse",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMSolver2MSDE",
    "DPMSolver3MSDE",
    "DPMSolverInverse",
    "DPMSolverSinglestep",
    "Draw",
    "EDMEuler",
    "EDMMultistep",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Levels",
    "Method",
    "Plan",
    "SASolver",
    "Sampler",
    "Scheduler",
    "UniPC",
    "sampler_from_config",
    "sampler_from_diffusers",
    "sampler_to_config",
    "schedule_from_diffusers",
]

# name: the file and the class
PLACES = {
    "ddpm": ("ddpm", "DDPM"),
    "ddim": ("ddim", "DDIM"),
    "pndm": ("pndm", "PNDM"),
    "euler": ("euler", "Euler"),
    "euler_ancestral": ("euler", "EulerAncestral"),
    "heun": ("heun", "Heun"),
    "lms": ("lms", "LMS"),
    "dpmpp_2m": ("dpm_solver", "DPMSolver"),
    "dpmpp_2m_sde": ("dpm_solver", "DPMSolver2MSDE"),
    "dpmpp_3m_sde": ("dpm_solver", "DPMSolver3MSDE"),
    "dpm2": ("dpm2", "DPM2"),
    "dpm2_ancestral": ("dpm2", "DPM2Ancestral"),
    "deis": ("deis", "DEIS"),
    "unipc": ("unipc", "UniPC"),
    "lcm": ("consistency", "LCM"),
    "tcd": ("consistency", "TCD"),
    "ddim_inverse": ("ddim", "DDIMInverse"),
    "edm_euler": ("edm", "EDMEuler"),
    "edm_dpmpp_2m": ("edm", "EDMMultistep"),
    "dpmpp_2s": ("dpm_singlestep", "DPMSolverSinglestep"),
    "dpmpp_2m_inverse": ("dpm_solver", "DPMSolverInverse"),
    "cm": ("consistency", "CM"),
    "ipndm": ("pndm", "IPNDM"),
    "sa_solver": ("sa_solver", "SASolver"),
    "dpmpp_sde": ("dpmpp_sde", "DPMSDE"),
}
HOMES = {kind: file for file, kind in PLACES.values()} | {
    "Scheduler": "diffusers.scheduler",
    "schedule_from_diffusers": "diffusers.read",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'minidiff.samplers' has no attribute {name!r}")
    return getattr(import_module(f"minidiff.samplers.{HOMES[name]}"), name)


class Registry(Mapping[str, type[Method[Any, Any]]]):
    """Sampler classes by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> type[Method[Any, Any]]:
        file, kind = PLACES[name]
        return cast(type[Method[Any, Any]], getattr(import_module(f"minidiff.samplers.{file}"), kind))

    def __contains__(self, name: object) -> bool:
        return name in PLACES

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


SAMPLERS = Registry()


def name_of(sampler: Any) -> str | None:
    """Return the name under which the class of ``sampler`` is registered; None for any other sampler."""
    kind = type(sampler)
    names = (n for n, (file, own) in PLACES.items() if (f"minidiff.samplers.{file}", own) == _place(kind))
    return next(names, None)


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def sampler_from_diffusers(config: Mapping[str, Any]) -> Sampler[Any, Any]:
    """Create a sampler from a ``scheduler_config.json``, given as a dict with ``_class_name`` and options.

    Warns about options that no class of diffusers has, and ignores them. Raises UnsupportedError for an unknown class
    and for flow matching, ConfigError for invalid options.
    """
    from minidiff.samplers.diffusers import read

    return cast(Sampler[Any, Any], read.sampler_from_diffusers(config))


def check_name(name: object, *, settable: bool = True) -> str:
    """Return ``name`` if a sampler has it. Raises ConfigError with a suggestion otherwise.

    ``settable``: options of the sampler can be given where the name was.
    """
    if isinstance(name, str) and name in SAMPLERS:
        return name
    raise ConfigError(
        f"no sampler is called {quote(name)}; known are {', '.join(SAMPLERS)}{suggestion(name, SAMPLERS, settable)}"
    )


def sampler_from_config(config: Mapping[str, Any]) -> Sampler[Any, Any]:
    """Create a sampler from ``{"name": "pndm", ...options}``; omitted options have their defaults.

    Raises ConfigError for an unknown name or option, quoting the known ones.
    """
    name = check_name(config.get("name"))
    kind = SAMPLERS[name]
    options = {key: value for key, value in config.items() if key != "name"}
    fields = [f.name for f in dataclasses.fields(kind)]
    unknown = [key for key in options if key not in fields]
    guess = near(unknown[0], fields) if unknown else ""
    check(not unknown, f"{name} has no option {', '.join(map(repr, unknown))}; it knows {', '.join(fields)}{guess}")
    return cast(Sampler[Any, Any], from_json(kind, options))


def sampler_to_config(sampler: Any) -> dict[str, Any]:
    """Return the sampler as a dict with all options, which :func:`sampler_from_config` reads back to an equal one."""
    name = name_of(sampler)
    if name is not None:
        options = dataclasses.asdict(sampler).items()
        return {"name": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options}}  # as JSON has it
    raise ConfigError(f"{type(sampler).__name__} is none of the named samplers: {', '.join(SAMPLERS)}")
