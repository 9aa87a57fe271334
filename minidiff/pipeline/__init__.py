"""From prompt to picture: what was asked, what was decided, the denoising, the picture.

    Request --job--> Job --denoise--> Step ... Step --decode--> Picture

``request.py`` lists every option of a run, ``stable_diffusion.py`` and ``unconditional.py`` turn a request into a job,
``denoise.py`` runs it. Names are imported on first use, so that ``minidiff --help`` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidiff.pipeline.base import Pipeline
    from minidiff.pipeline.opening import assemble, bundled, from_parts, load, random_model
    from minidiff.pipeline.stable_diffusion import BUNDLED_SCALE, StableDiffusion
    from minidiff.pipeline.unconditional import Unconditional

HOMES = {
    "base": ("Pipeline",),
    "opening": ("assemble", "bundled", "from_parts", "load", "random_model"),
    "stable_diffusion": ("BUNDLED_SCALE", "StableDiffusion"),
    "unconditional": ("Unconditional",),
}

__all__ = [
    "BUNDLED_SCALE",
    "Pipeline",
    "StableDiffusion",
    "Unconditional",
    "assemble",
    "bundled",
    "from_parts",
    "load",
    "random_model",
]


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"minidiff.pipeline.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'minidiff.pipeline' has no attribute {name!r}")
