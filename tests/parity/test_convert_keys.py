"""The key maps at real size, on the meta device: a bijection between the reference's tensors and minidiff's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from minidiff import config as presets
from weights_convert import configs_diffusers as configs
from weights_convert import keys_diffusers as keys
from weights_convert.component import meta_model
from weights_convert.engine import expand

# The published configs of Stable Diffusion 1.5, 2.1 and XL, and of ddpm-cat-256, as far as they differ from defaults.
SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SD21 = {
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "cross_attention_dim": 2048,
    "sample_size": 128,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CAT256 = {
    "sample_size": 256,
    "attention_head_dim": None,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


def clip(**options: Any) -> dict[str, Any]:
    """A text encoder's options, heads of 64 channels."""
    width = options["hidden_size"]
    return {"num_attention_heads": width // 64, "intermediate_size": 4 * width, "eos_token_id": 49407} | options


CASES: dict[str, tuple[type[nn.Module], dict[str, Any], Any]] = {
    "unet_sd15": (UNet2DConditionModel, SD15, presets.SD15),
    "unet_sd21": (UNet2DConditionModel, SD21, presets.SD21),
    "unet_sdxl": (UNet2DConditionModel, SDXL, presets.SDXL),
    "unet_ddpm": (UNet2DModel, CAT256, presets.DDPM_CAT256),
    "vae_sd": (AutoencoderKL, VAE, presets.VAE_SD),
    "vae_sdxl": (
        AutoencoderKL,
        VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        presets.VAE_SDXL,
    ),
    "clip_l": (CLIPTextModel, clip(hidden_size=768, num_hidden_layers=12), presets.CLIP_L),
    "clip_h": (CLIPTextModel, clip(hidden_size=1024, num_hidden_layers=23, hidden_act="gelu"), presets.OPENCLIP_H),
    "clip_bigg": (
        CLIPTextModelWithProjection,
        clip(hidden_size=1280, num_hidden_layers=32, hidden_act="gelu", projection_dim=1280),
        presets.OPENCLIP_BIGG,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_map_is_a_bijection_at_real_size(name: str) -> None:
    """The published config reads as our preset, and the map pairs every tensor there with one here, shapes too."""
    cls, options, preset = CASES[name]
    with torch.device("meta"):
        reference = cls(CLIPTextConfig(**options)) if name.startswith("clip") else cls(**options)
    read = {"u": configs.unet, "v": configs.vae, "c": configs.clip}[name[0]]
    config = read(configs.Options({**options, "_class_name": cls.__name__}, name))
    assert config == preset

    walk: Any = {"u": keys.unet, "v": keys.vae, "c": keys.clip}[name[0]]
    theirs = {k: tuple(p.shape) for k, p in reference.state_dict().items()}
    prefix = {} if name[0] != "c" or "text_model.final_layer_norm.weight" in theirs else {"prefix": ""}
    model = meta_model(config)
    pairs = expand(walk(config, **prefix), model)
    mine = {k: tuple(p.shape) for k, p in model.state_dict().items()}
    assert len({p.theirs for p in pairs}) == len({p.ours for p in pairs}) == len(pairs)
    assert {p.theirs for p in pairs} == set(theirs)
    assert {p.ours for p in pairs} == set(mine)
    assert all(theirs[p.theirs] == p.form.stored(mine[p.ours]) for p in pairs)
