"""The smallest models of each family for exports, which take minutes to compile at more than that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from minidiff.config import CLIPTextConfig, Level, ModelConfig, ScheduleConfig, TAESDConfig, text
from minidiff.export.manifest import open_export
from minidiff.pipeline import StableDiffusion
from tests.support.tiny import DDPM, SD, UNET, XL

# The least that has everything: two levels, a skip, attention to text.
SMALL = replace(UNET, levels=(text(8, 2), Level(channels=8)), mid=Level(channels=8, attention="text", heads=2))
MINI = replace(
    SD,
    unet=SMALL,
    vae=replace(SD.vae, channels=(8, 8)) if SD.vae else None,
    text_encoder=CLIPTextConfig(width=16, layers=1, heads=2, mlp=16),
)
FAMILIES: dict[str, ModelConfig] = {
    "sd1": MINI,
    "sd2": replace(
        MINI,
        unet=replace(SMALL, linear_proj=True),
        text_layer="penultimate",
        schedule=ScheduleConfig(prediction="v_prediction"),
    ),
    "inpainting": replace(MINI, unet=replace(SMALL, in_channels=9)),
    "lcm": replace(MINI, unet=replace(SMALL, guidance_dim=6)),
    "sdxl": replace(
        XL,
        unet=replace(SMALL, context_dim=16 + 8, added_dim=4 + 6 * 2, added_sinusoid=2, linear_proj=True),
        vae=MINI.vae,
        text_encoder=MINI.text_encoder,
    ),
    "taesd": replace(MINI, vae=TAESDConfig(width=8, blocks=(1, 1))),
    "ddpm": replace(
        DDPM,
        unet=replace(
            DDPM.unet,
            levels=(Level(channels=8), Level(channels=8, attention="self", heads=1)),
            mid=Level(channels=8, attention="self", heads=1),
        ),
    ),
}

# Programs in which a family differs from sd1.
PARTICULAR = {
    "sd2": ["unet", "text_encoder"],
    "inpainting": ["unet"],
    "lcm": ["unet"],
    "sdxl": ["unet", "text_encoder_2"],
    "taesd": ["vae_encoder", "vae_decoder"],
    "ddpm": ["unet"],
}


@contextmanager
def one_weight_changed(model: StableDiffusion, made: Path) -> Iterator[str]:
    """Change a weight of the model that ``made`` is an export of, without its identity: as if nobody knew. The stage
    that must be named."""
    weight = model.unet.get_parameter("up.1.res.0.conv1.weight")
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0, 0, 0] += 0.1
        model.source = open_export(made).manifest["model"]
        yield "unet/unet.up.1.res.0.conv1"
    finally:
        model.source = ""
        with torch.no_grad():
            weight.copy_(kept)
