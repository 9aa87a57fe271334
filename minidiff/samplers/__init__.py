"""Samplers by name, as JSON, or from diffusers' scheduler configs; one file a family of methods.

A sampler chosen by name follows the mathematics, with defaults for Stable Diffusion. A sampler read from a
scheduler_config.json does what diffusers does, including its slips (``like_diffusers``).

``SAMPLERS`` has them all. Everything but the names is imported on first use, so a list of them needs no PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minidiff.config import check, from_json, quote
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.samplers.elsewhere import suggestion
from minidiff.samplers.registry import PLACES, SAMPLERS, imported
from minidiff.samplers.registry import name_of as name_of

if TYPE_CHECKING:
    from minidiff.samplers.consistency import CM, LCM, TCD
    from minidiff.samplers.ddim import DDIM, DDIMInverse
    from minidiff.samplers.ddpm import DDPM
    from minidiff.samplers.deis import DEIS
    from minidiff.samplers.diffusers.config import sampler_from_diffusers, schedule_from_diffusers
    from minidiff.samplers.diffusers.scheduler import Scheduler
    from minidiff.samplers.dpm_singlestep import DPMSolverSinglestep
    from minidiff.samplers.dpm_solver import DPMSolver, DPMSolver2MSDE, DPMSolver3MSDE, DPMSolverInverse
    from minidiff.samplers.dpmpp_sde import DPMSDE
    from minidiff.samplers.edm import EDMEuler, EDMMultistep
    from minidiff.samplers.euler import Euler, EulerAncestral
    from minidiff.samplers.heun import DPM2, DPM2Ancestral, Heun
    from minidiff.samplers.lms import LMS
    from minidiff.samplers.method import Draw, Levels, Method, Plan, Sampler
    from minidiff.samplers.pndm import IPNDM, PNDM
    from minidiff.samplers.sa_solver import SASolver
    from minidiff.samplers.unipc import UniPC

__all__ = [
    "CM", "DDIM", "DDPM", "DEIS", "DPM2", "DPMSDE", "IPNDM", "LCM", "LMS", "PNDM", "SAMPLERS", "TCD", "DDIMInverse",
    "DPM2Ancestral", "DPMSolver", "DPMSolver2MSDE", "DPMSolver3MSDE", "DPMSolverInverse", "DPMSolverSinglestep", "Draw",
    "EDMEuler", "EDMMultistep", "Euler", "EulerAncestral", "Heun", "Levels", "Method", "Plan", "SASolver", "Sampler",
    "Scheduler", "UniPC", "sampler_from_config", "sampler_from_diffusers", "sampler_to_config",
    "schedule_from_diffusers",
]  # fmt: skip

HOMES = {place.rsplit(".", 1)[1]: place for place in PLACES.values()} | {
    "Scheduler": "diffusers.scheduler.Scheduler",
    **{f"{what}_from_diffusers": f"diffusers.config.{what}_from_diffusers" for what in ("sampler", "schedule")},
    **{name: f"method.{name}" for name in ("Draw", "Levels", "Method", "Plan", "Sampler")},
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'minidiff.samplers' has no attribute {name!r}")
    return imported(HOMES[name])


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
    return from_json(kind, options)


def sampler_to_config(sampler: Any) -> dict[str, Any]:
    """Return the sampler as a dict with all options, which :func:`sampler_from_config` reads back to an equal one."""
    name = name_of(sampler)
    if name is not None:
        options = dataclasses.asdict(sampler).items()
        return {"name": name, **{k: list(v) if isinstance(v, tuple) else v for k, v in options}}  # as JSON has it
    raise ConfigError(f"{type(sampler).__name__} is none of the named samplers: {', '.join(SAMPLERS)}")
