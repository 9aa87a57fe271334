"""Export of a model as an original single file (CompVis and Stability), by ``keys_original.py`` in reverse.

Such a file contains only tensors, and other programs must be told what these do not show: heads, prediction type,
sampler. minidiff writes its own config into the header, which other programs ignore.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from minidiff.config import ModelConfig, TAESDConfig, to_json
from minidiff.errors import UnsupportedError
from minidiff.storage.checkpoint import CONFIG_KEY
from minidiff.storage.files import Lazy, write_tensors
from minidiff.storage.writing import Existing
from weights_convert import single_schedule
from weights_convert.engine import restore
from weights_convert.export_folder import full_tables
from weights_convert.report import Report
from weights_convert.single import TEXTS, key_pairs

SILENT = "single files show no prediction type ({}) and no sampler ({}): other programs must be told"

NO_CONSUMER = "its UNet reads the guidance scale (LCM): diffusers reads such models from folders only"


def write_original(
    dst: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    report: Report,
    existing: Existing = "replace",
) -> str:
    """Write the model as the safetensors file ``dst``; return its content hash. ``existing``: as for ``atomic``.

    Raises :class:`UnsupportedError` for a model that the layout has no names for.
    """
    config, tensors = full_tables(config, tensors, report)
    layout = _layout(config)
    pairs = key_pairs(config, TEXTS[layout], {})
    missing = tensors.keys() - {p.ours for p in pairs}
    if missing:
        raise UnsupportedError(f"{config.family}: the original layout has no place for {min(missing)!r}")
    report.notes.append(SILENT.format(config.schedule.prediction, config.sampler.get("name", "none")))
    if config.unet.guidance_dim is not None:
        report.notes.append(NO_CONSUMER)
    marks = single_schedule.markers(config.schedule, layout)
    if marks:
        report.notes.append(f"markers {' and '.join(map(repr, marks))}: programs that know them need no settings")
    header = {"format": "pt", CONFIG_KEY: to_json(config)}
    return write_tensors(dst, restore(pairs, tensors) | marks, header, existing)


def _layout(config: ModelConfig) -> str:
    """Return the family whose layout fits the model's parts."""
    first, second = config.text_encoder, config.text_encoder_2
    if isinstance(config.vae, TAESDConfig):
        raise UnsupportedError(f"{config.family}: a tiny autoencoder has no place in an original file")
    if config.vae is None or (first is None and second is None):
        raise UnsupportedError(f"{config.family}: an original file holds a UNet, a VAE and a text encoder")
    if second is not None:
        return "sdxl-refiner" if first is None else "sdxl"
    return "sd2" if first is not None and first.activation == "gelu" else "sd1"
