"""Names of the samplers in other programs: AUTOMATIC1111, ComfyUI, k-diffusion, and the classes of diffusers.

They are used only in error messages, to suggest the name here. No name is translated silently, because the same method
visits other noise levels there (``minidiff.programs`` reproduces other programs).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from minidiff.console.spelling import near

Method = tuple[str, Mapping[str, Any]]

# Names of A1111 and ComfyUI that differ from ours, in lower case and without punctuation, "++" as "pp": see _plain. The
# name of the levels (Karras, Exponential) follows.
METHODS: Mapping[str, Method] = {
    "eulera": ("euler_ancestral", {}),
    "eulerancestral": ("euler_ancestral", {}),
    "plms": ("pndm", {}),
    "dpm2a": ("dpm2_ancestral", {}),
    "dpm2ancestral": ("dpm2_ancestral", {}),
    "dpmpp2msdeheun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
    "unipcbh1": ("unipc", {"solver_type": "bh1"}),
    "unipcbh2": ("unipc", {"solver_type": "bh2"}),
}
LEVELS = {"karras": "karras", "ka": "karras", "exponential": "exponential", "beta": "beta"}
# Samplers here without such levels, or with a choice of others.
OTHER_LEVELS: tuple[str, ...] = ("ddpm", "ddim", "pndm", "euler_ancestral", "lcm", "tcd", "cm", "ipndm", "ddim_inverse")
OTHER_LEVELS += ("edm_euler", "edm_dpmpp_2m")
# Methods that are not implemented, and the nearest one that is.
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
    """Return the sampler, one of ``own``, and the options that other programs call ``name``; None if there is none."""
    from minidiff.samplers.diffusers.classes import READERS

    classes: dict[str, Method] = {kind: (reader.name, {}) for kind, reader in READERS.items()}
    theirs = {_plain(called): method for called, method in {**METHODS, **classes}.items() if method[0] in own}
    methods: dict[str, Method] = {_plain(known): (known, {}) for known in own} | theirs
    plain = _plain(name)
    if plain in methods:
        return methods[plain][0], dict(methods[plain][1])
    for ending, levels in LEVELS.items():
        found = methods.get(plain.removesuffix(ending)) if plain.endswith(ending) else None
        if found is not None and found[0] not in OTHER_LEVELS:
            return found[0], {**found[1], "sigma_spacing": levels}
    return None


def suggestion(name: object, own: Collection[str], settable: bool = True) -> str:
    """Return the end of an error message about ``name`` with a suggestion from ``own``; "" if there is none.

    ``settable``: options of the sampler can be given where the name was.
    """
    found = meant(name, own) if isinstance(name, str) else None
    if found is None:
        other = ABSENT.get(re.sub(f"({'|'.join(LEVELS)})$", "", _plain(name))) if isinstance(name, str) else None
        return f"; it is not here, and {other} is the nearest" if other in own else near(name, own)
    sampler, options = found
    if options and not settable:
        more = ", ".join(f"{option}={value}" for option, value in options.items())
        return f"; did you mean {sampler}? (with {more}, which cannot be set here)"
    typed = " ".join([f"--sampler {sampler}", *(f"--set {option}={value}" for option, value in options.items())])
    asked = {"name": sampler, **options} if options else sampler
    return f"; did you mean {typed}? (in Python: sampler={asked!r})"


def _plain(name: str) -> str:
    found = re.sub(r"[^a-z0-9]", "", name.casefold().replace("+", "p"))
    return re.sub(r"^(sample|k)(?=euler|heun|lms|dpm|ddim)(?!.*scheduler)|gpu$", "", found)
