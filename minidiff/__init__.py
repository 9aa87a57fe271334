"""minidiff: Stable Diffusion from scratch in pure PyTorch.

import minidiff
sd = minidiff.load("model.safetensors")
sd.generate("a photo of an astronaut riding a horse", seed=0)[0].save("astronaut.png")
"""

from minidiff.denoise import Prediction, Run, Step, denoise
from minidiff.errors import CheckpointError, ConfigError, MinidiffError, UnsupportedError
from minidiff.picture import read_recipe, save_png
from minidiff.pipeline import StableDiffusion, Unconditional, load
from minidiff.schedule import NoiseSchedule
from minidiff.version import VERSION as __version__

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MinidiffError",
    "NoiseSchedule",
    "Prediction",
    "Run",
    "StableDiffusion",
    "Step",
    "Unconditional",
    "UnsupportedError",
    "__version__",
    "denoise",
    "load",
    "read_recipe",
    "save_png",
]
