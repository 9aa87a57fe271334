"""A whole model as an original single file (CompVis and Stability): the key maps of ``keys_original.py``, backwards.

Such a file holds tensors alone, and other programs must be told what they do not show: heads, prediction type, sampler.
minidiff writes its own config into the header, where it finds it again and others look past it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import nn

from minidiff.checkpoint import CONFIG_KEY, build
from minidiff.config import ModelConfig, TAESDConfig, to_json
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.files import Lazy, write_tensors
from weights_convert import keys_original as keys
from weights_convert.engine import Module, expand, restore
from weights_convert.export_folder import full_tables
from weights_convert.report import Report

SILENT = "single files show no prediction type ({}) and no sampler ({}): other programs must be told"


def write_original(
    dst: str | os.PathLike[str], config: ModelConfig, tensors: Mapping[str, Lazy], report: Report
) -> str:
    """Write the model as the safetensors file ``dst``; returns its content hash.

    Raises :class:`UnsupportedError` for a model that the layout has no names for, :class:`ConfigError` for a target
    that is named like a pickle.
    """
    if os.fspath(dst).lower().endswith((".ckpt", ".pt", ".pth", ".bin")):
        raise ConfigError(f"{dst}: single files are written as safetensors, never as pickles; name it .safetensors")
    config, tensors = full_tables(config, tensors, report)
    parts = build(config)
    modules = _modules(config)
    pairs = expand([m._replace(ours=f"{part}.{m.ours}") for part, m in modules], nn.ModuleDict(parts))
    report.notes.append(SILENT.format(config.schedule.prediction, config.sampler.get("name", "none")))
    return write_tensors(dst, restore(pairs, tensors), {"format": "pt", CONFIG_KEY: to_json(config)})


def _modules(config: ModelConfig) -> Iterable[tuple[str, Module]]:
    """The layout's map for every part of the model."""
    unet, vae, text = config.unet, config.vae, config.text_encoder
    if config.text_encoder_2 is not None:
        raise UnsupportedError(f"{config.family}: two text encoders can't be written as a single file yet")
    if isinstance(vae, TAESDConfig):
        raise UnsupportedError(f"{config.family}: a tiny autoencoder has no place in an original file")
    if vae is None or text is None:
        raise UnsupportedError(f"{config.family}: an original file holds a UNet, a VAE and a text encoder")
    if text.activation != "quick_gelu":
        raise UnsupportedError(f"{config.family}: OpenCLIP text encoders can't be written as a single file yet")
    for part, found in (("unet", keys.unet(unet)), ("vae", keys.vae(vae)), ("text_encoder", keys.clip(text))):
        yield from ((part, module) for module in found)
