"""minidiff: Stable Diffusion from scratch in pure PyTorch.

    import minidiff
    sd = minidiff.bundled()  # a small model of coloured shapes; minidiff.load("sd15.safetensors") opens a large one
    image = sd.generate("a large red star on a blue background", seed=0)[0]
    minidiff.save_png(image, "star.png")

Public names are imported on first use, so ``import minidiff`` and ``minidiff --help`` do not wait for PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from minidiff.version import VERSION as __version__

if TYPE_CHECKING:
    from minidiff import programs as conventions  # noqa: F401
    from minidiff.adapters import lora  # noqa: F401
    from minidiff.adapters import words as embeddings  # noqa: F401
    from minidiff.adapters.control import Control, ControlModel
    from minidiff.errors import Cancelled, CheckpointError, ConfigError, MinidiffError, UnsupportedError
    from minidiff.pipeline.denoise import Run, Step
    from minidiff.pipeline.estimate import Estimate
    from minidiff.pipeline.job import Prediction
    from minidiff.pipeline.opening import bundled, estimate, load
    from minidiff.pipeline.png import read_recipe, save_picture, save_png
    from minidiff.pipeline.request import Request, Sizes
    from minidiff.pipeline.stable_diffusion import StableDiffusion
    from minidiff.pipeline.unconditional import Unconditional
    from minidiff.schedule import NoiseSchedule

HOMES = {
    "adapters.control": ("Control", "ControlModel"),
    "errors": ("Cancelled", "CheckpointError", "ConfigError", "MinidiffError", "UnsupportedError"),
    "pipeline.denoise": ("Run", "Step"),
    "pipeline.job": ("Prediction",),
    "pipeline.estimate": ("Estimate",),
    "pipeline.opening": ("bundled", "estimate", "load"),
    "pipeline.png": ("read_recipe", "save_picture", "save_png"),
    "pipeline.request": ("Request", "Sizes"),
    "pipeline.stable_diffusion": ("StableDiffusion",),
    "pipeline.unconditional": ("Unconditional",),
    "schedule": ("NoiseSchedule",),
}

# Modules that programs import by the name of an earlier release, and where they are now.
ALIASES = {
    "conventions": "programs",
    "embeddings": "adapters.words",
    "lora": "adapters.lora",
    "pipeline.picture": "pipeline.png",
}

__all__ = [
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "Control",
    "ControlModel",
    "Estimate",
    "MinidiffError",
    "NoiseSchedule",
    "Prediction",
    "Request",
    "Run",
    "Sizes",
    "StableDiffusion",
    "Step",
    "Unconditional",
    "UnsupportedError",
    "__version__",
    "bundled",
    "estimate",
    "load",
    "read_recipe",
    "save_picture",
    "save_png",
]


class _Aliases:
    """Finder and loader for ``import minidiff.lora``: the one module, under its earlier name as well.

    Not derived from ``importlib.abc``'s classes, whose import takes as long as the rest of this file.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for old, new in ALIASES.items():
            start = f"{__name__}.{old}"
            if fullname == start or fullname.startswith(start + "."):
                return ModuleSpec(fullname, cast(Any, self), origin=f"{__name__}.{new}{fullname[len(start) :]}")
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(str(spec.origin))
        spec.loader_state = module.__spec__  # the import system replaces it by the alias's
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _Aliases())


def __getattr__(name: str) -> Any:
    if name in ALIASES:
        return import_module(f"{__name__}.{ALIASES[name]}")
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
