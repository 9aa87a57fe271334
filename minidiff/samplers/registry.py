"""The samplers by name. The module of a method is imported on first use, since a run needs only one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, cast

from minidiff.samplers.method import Method

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
    "dpm2": ("heun", "DPM2"),
    "dpm2_ancestral": ("heun", "DPM2Ancestral"),
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
    place = kind.__module__, kind.__qualname__
    return next((n for n, (file, own) in PLACES.items() if (f"minidiff.samplers.{file}", own) == place), None)
