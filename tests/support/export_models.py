"""The smallest models of each family for exports, which take minutes to compile at more than that."""

from __future__ import annotations

from dataclasses import replace

from minidiff.config import CLIPTextConfig, Level, ModelConfig, ScheduleConfig, TAESDConfig, text
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
