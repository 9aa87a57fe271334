"""What other programs call the samplers: AUTOMATIC1111, ComfyUI and k-diffusion, and the classes of diffusers.

Only for the line that refuses such a name: it says what to ask for here. No name is translated in silence, because the
same method visits other noise levels there (``minidiff.conventions`` does as another program does).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from minidiff.spelling import near

Method = tuple[str, Mapping[str, Any]]

# Spelt without capitals and signs, "++" as "pp": see _plain. A program's levels (Karras, Exponential) come behind.
METHODS: Mapping[str, Method] = {
    # A1111's and ComfyUI's, where they are not ours already
    "eulera": ("euler_ancestral", {}),
    "eulerancestral": ("euler_ancestral", {}),
    "plms": ("pndm", {}),
    "dpm2a": ("dpm2_ancestral", {}),
    "dpm2ancestral": ("dpm2_ancestral", {}),
    "dpmpp2msdeheun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "unipcbh1": ("unipc", {"solver_type": "bh1"}),
    "unipcbh2": ("unipc", {"solver_type": "bh2"}),
    # diffusers' classes
    "ddpmscheduler": ("ddpm", {}),
    "ddimscheduler": ("ddim", {}),
    "ddiminversescheduler": ("ddim_inverse", {}),
    "pndmscheduler": ("pndm", {}),
    "eulerdiscretescheduler": ("euler", {}),
    "eulerancestraldiscretescheduler": ("euler_ancestral", {}),
    "heundiscretescheduler": ("heun", {}),
    "lmsdiscretescheduler": ("lms", {}),
    "kdpm2discretescheduler": ("dpm2", {}),
    "kdpm2ancestraldiscretescheduler": ("dpm2_ancestral", {}),
    "dpmsolvermultistepscheduler": ("dpmpp_2m", {}),
    "dpmsolvermultistepinversescheduler": ("dpmpp_2m_inverse", {}),
    "dpmsolversinglestepscheduler": ("dpmpp_2s", {}),
    "dpmsolversdescheduler": ("dpmpp_sde", {}),
    "deismultistepscheduler": ("deis", {}),
    "unipcmultistepscheduler": ("unipc", {}),
    "sasolverscheduler": ("sa_solver", {}),
    "edmeulerscheduler": ("edm_euler", {}),
    "edmdpmsolvermultistepscheduler": ("edm_dpmpp_2m", {}),
    "cmstochasticiterativescheduler": ("cm", {}),
    "ipndmscheduler": ("ipndm", {}),
    "lcmscheduler": ("lcm", {}),
    "tcdscheduler": ("tcd", {}),
}
LEVELS = {"karras": "karras", "ka": "karras", "exponential": "exponential", "beta": "beta"}
# Ours that have no such levels, or choose among others.
OTHER_LEVELS: tuple[str, ...] = ("ddpm", "ddim", "pndm", "euler_ancestral", "lcm", "tcd", "cm", "ipndm", "ddim_inverse")
OTHER_LEVELS += ("edm_euler", "edm_dpmpp_2m")
# Methods that are not here at all, and which of ours is the nearest.
ABSENT: Mapping[str, str] = {
    "dpmpp2sa": "dpmpp_2s",
    "dpmpp2sancestral": "dpmpp_2s",
    "dpmfast": "dpmpp_2s",
    "dpmadaptive": "dpmpp_2m",
    "restart": "heun",
    "heunpp2": "heun",
    "ersde": "dpmpp_3m_sde",
}


def meant(name: str, own: Collection[str]) -> tuple[str, dict[str, Any]] | None:
    """The sampler of ours, one of ``own``, with its options, that other programs call ``name``; None for no such."""
    plain = _plain(name)
    ours: dict[str, Method] = {_plain(known): (known, {}) for known in own}
    methods = {**ours, **{called: method for called, method in METHODS.items() if method[0] in own}}
    if plain in methods:
        return methods[plain][0], dict(methods[plain][1])
    for ending, levels in LEVELS.items():
        found = methods.get(plain.removesuffix(ending)) if plain.endswith(ending) else None
        if found is not None and found[0] not in OTHER_LEVELS:
            return found[0], {**found[1], "sigma_spacing": levels}
    return None


def absent(name: str, own: Collection[str]) -> str | None:
    """The nearest of ``own`` to a method of other programs that is not here; None for any other name."""
    found = ABSENT.get(re.sub(f"({'|'.join(LEVELS)})$", "", _plain(name)))
    return found if found in own else None


def suggestion(name: object, own: Collection[str]) -> str:
    """The end of a line that refuses ``name``: which of ``own`` it is here, or may have meant; "" for none."""
    found = meant(name, own) if isinstance(name, str) else None
    if found is None:
        other = absent(name, own) if isinstance(name, str) else None
        return near(name, own) if other is None else f"; it is not here, and {other} is the nearest"
    sampler, options = found
    typed = " ".join([f"--sampler {sampler}", *(f"--set {option}={value}" for option, value in options.items())])
    asked = {"name": sampler, **options} if options else sampler
    return f"; did you mean {typed}? (in Python: sampler={asked!r})"


def _plain(name: str) -> str:
    found = re.sub(r"[^a-z0-9]", "", name.casefold().replace("+", "p"))
    return re.sub(r"^(sample|k)(?=euler|heun|lms|dpm|ddim)(?!.*scheduler)|gpu$", "", found)
