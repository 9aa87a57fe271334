"""The samplers by name. The module of a method is imported on first use: a run needs one, a list of names none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidiff.samplers.method import Method

PLACES = {
    "ddpm": "ddpm.DDPM",
    "ddim": "ddim.DDIM",
    "pndm": "pndm.PNDM",
    "euler": "euler.Euler",
    "euler_ancestral": "euler.EulerAncestral",
    "heun": "heun.Heun",
    "lms": "lms.LMS",
    "dpmpp_2m": "dpm_solver.DPMSolver",
    "dpmpp_2m_sde": "dpm_solver.DPMSolver2MSDE",
    "dpmpp_3m_sde": "dpm_solver.DPMSolver3MSDE",
    "dpm2": "heun.DPM2",
    "dpm2_ancestral": "heun.DPM2Ancestral",
    "deis": "deis.DEIS",
    "unipc": "unipc.UniPC",
    "lcm": "consistency.LCM",
    "tcd": "consistency.TCD",
    "ddim_inverse": "ddim.DDIMInverse",
    "edm_euler": "edm.EDMEuler",
    "edm_dpmpp_2m": "edm.EDMMultistep",
    "dpmpp_2s": "dpm_singlestep.DPMSolverSinglestep",
    "dpmpp_2m_inverse": "dpm_solver.DPMSolverInverse",
    "cm": "consistency.CM",
    "ipndm": "pndm.IPNDM",
    "sa_solver": "sa_solver.SASolver",
    "dpmpp_sde": "dpmpp_sde.DPMSDE",
}
"""Module and class of each sampler."""


def imported(place: str) -> Any:
    """Import ``module.name``, given from ``minidiff.samplers`` on."""
    module, name = place.rsplit(".", 1)
    return getattr(import_module(f"minidiff.samplers.{module}"), name)


class Registry(Mapping[str, "type[Method[Any, Any]]"]):
    """Sampler classes by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> type[Method[Any, Any]]:
        kind: type[Method[Any, Any]] = imported(PLACES[name])
        return kind

    def __contains__(self, name: object) -> bool:
        return name in PLACES

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


SAMPLERS = Registry()


def name_of(sampler: Any) -> str | None:
    """Return the name under which the class of ``sampler`` is registered; None for any other sampler."""
    kind = f"{type(sampler).__module__}.{type(sampler).__qualname__}"
    return next((name for name, place in PLACES.items() if f"minidiff.samplers.{place}" == kind), None)
