"""Conversion of other projects' checkpoints: ``convert`` a file, or ``load`` it directly.

import weights_convert
print(weights_convert.convert("stable-diffusion-v1-5", "sd15.safetensors"))
sd = weights_convert.load("v1-5-pruned-emaonly.safetensors")
"""

from weights_convert.conversion import convert, load, open_control, open_source
from weights_convert.decoder import open_decoder
from weights_convert.detection import detect
from weights_convert.read_embedding import read_embedding
from weights_convert.read_lora import read_lora
from weights_convert.report import Report

__all__ = [
    "Report",
    "convert",
    "detect",
    "load",
    "open_control",
    "open_decoder",
    "open_source",
    "read_embedding",
    "read_lora",
]
