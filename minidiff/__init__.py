"""minidiff: Stable Diffusion from scratch in pure PyTorch.

    import minidiff
    sd = minidiff.bundled()  # a small model of coloured shapes; minidiff.load("sd15.safetensors") opens a large one
    image = sd.generate("a large red star on a blue background", seed=0)[0]
    minidiff.save_png(image, "star.png")

Public names are imported on first use, so ``import minidiff`` and ``minidiff --help`` do not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minidiff.version import VERSION as __version__

if TYPE_CHECKING:
    from minidiff.denoise import Prediction, Run, Step
    from minidiff.errors import Cancelled, CheckpointError, ConfigError, MinidiffError, UnsupportedError
    from minidiff.picture import read_recipe, save_png
    from minidiff.pipeline import StableDiffusion, Unconditional, bundled, load
    from minidiff.prompts import Sizes
    from minidiff.schedule import NoiseSchedule

HOMES = {
    "denoise": ("Prediction", "Run", "Step"),
    "errors": ("Cancelled", "CheckpointError", "ConfigError", "MinidiffError", "UnsupportedError"),
    "picture": ("read_recipe", "save_png"),
    "pipeline": ("StableDiffusion", "Unconditional", "bundled", "load"),
    "prompts": ("Sizes",),
    "schedule": ("NoiseSchedule",),
}

__all__ = [
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "MinidiffError",
    "NoiseSchedule",
    "Prediction",
    "Run",
    "Sizes",
    "StableDiffusion",
    "Step",
    "Unconditional",
    "UnsupportedError",
    "__version__",
    "bundled",
    "load",
    "read_recipe",
    "save_png",
]


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"minidiff.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
