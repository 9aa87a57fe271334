"""The half of a VAE that decodes, alone and beside a model that has a VAE of its own: TAESD, for previews."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from minidiff.config import ModelConfig
from minidiff.errors import CheckpointError, ConfigError
from minidiff.models.taesd import TAESD
from minidiff.models.vae import VAE
from minidiff.pipeline import images
from minidiff.pipeline.png import to_unit
from minidiff.precision import apply_policy
from minidiff.storage import checkpoint
from weights_convert.component import meta_model
from weights_convert.swap import read_decoder

ENCODING = ("encoder.", "quant.")  # weights that are not read

Decode = Callable[[Tensor], Tensor]


def open_decoder(path: str | os.PathLike[str], config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decode:
    """Return a function from latents (B, C, h, w) of a model of ``config`` to pixels (B, 3, H, W) in [0, 1].

    ``path``: a VAE in any form that ``swap={"vae": path}`` of :func:`weights_convert.load` takes; of TAESD, its
    author's file of the decoder is enough. Raises :class:`CheckpointError` for a path without a VAE, or with one that
    does not fit the model, and :class:`ConfigError` for a model without latents.
    """
    if config.vae is None:
        raise ConfigError(f"{path}: is for latents, and a {config.family} model works on pixels")
    found, tensors = read_decoder(Path(path), config.vae)
    for what, theirs, ours in (
        ("channels of latents", found.latent_channels, config.unet.out_channels),
        ("pixels for one latent along a side", found.factor, config.vae.factor),
        ("channels of pixels", found.image_channels, config.vae.image_channels),
    ):
        if theirs != ours:
            raise CheckpointError(f"{path}: has {theirs} {what}, and this {config.family} model {ours}")
    vae = cast(VAE | TAESD, meta_model(found))
    state = {k: checkpoint.convert(t.load(), device, dtype) for k, t in tensors.items() if not k.startswith(ENCODING)}
    vae.load_state_dict(state, strict=False, assign=True)
    del vae.encoder
    apply_policy(replace(config, vae=found), {"vae": vae})

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return to_unit(images.decode(vae, latents))

    return decode
