"""Small checkpoints in the layouts of diffusers and of the original code, as input of the converter's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiff.models.tokenizer import clip_table
from minidiff.storage.files import lazy
from tests.support.tiny import DDPM, SD, tiny_ddpm, tiny_sd
from weights_convert import keys_diffusers, keys_original
from weights_convert.engine import expand, restore

UNET_JSON: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "block_out_channels": [16, 24],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 3],
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
}
VAE_JSON: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "block_out_channels": [8, 8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}
TEXT_JSON: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
SCHEDULER_JSON: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DDPM_JSON: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [16, 24],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "add_attention": True,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "sample_size": 8,
}
# What shapes can't tell of the tiny model: it is no SD1, so the family's rule does not fit.
OVERRIDE: dict[str, Any] = {
    "unet": {"levels": [{"heads": 2}, {}], "mid": {"heads": 3}, "groups": 8, "sample_size": 8},
    "vae": {"groups": 8, "sample_size": 64},
    "text_encoder": {"heads": 2},
}


def translated(modules: Any, model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors in another layout: the key map read backwards."""
    state = {k: lazy(t) for k, t in model.state_dict().items()}
    return {k: t.load().contiguous() for k, t in restore(expand(modules, model), state).items()}


def write_json(path: Path, content: Any) -> None:
    """``content`` as JSON, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_folder(folder: Path) -> Path:
    """A diffusers pipeline folder with the tiny text-to-image model."""
    sd = tiny_sd()
    assert SD.vae is not None
    assert SD.text_encoder is not None
    for name, config, modules in (
        ("unet", UNET_JSON, keys_diffusers.unet(SD.unet)),
        ("vae", VAE_JSON, keys_diffusers.vae(SD.vae)),
        ("text_encoder", TEXT_JSON, keys_diffusers.clip(SD.text_encoder)),
    ):
        write_json(folder / name / "config.json", config)
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(translated(modules, sd.parts[name]), folder / name / file)
    vocab, merges = clip_table()
    write_json(folder / "tokenizer" / "vocab.json", {t: i for i, t in enumerate(vocab)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_JSON)
    write_json(folder / "model_index.json", INDEX)
    return folder


def original_tensors() -> dict[str, Tensor]:
    """The tiny text-to-image model as an original checkpoint's ``state_dict``, with what such files also hold."""
    sd = tiny_sd()
    assert SD.vae is not None
    assert SD.text_encoder is not None
    return {
        **translated(keys_original.unet(SD.unet), sd.unet),
        **translated(keys_original.vae(SD.vae), sd.vae),
        **translated(keys_original.clip(SD.text_encoder), sd.text_encoder),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.zeros(1000),
        "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
        "posterior_mean_coef2": torch.zeros(1000),
    }


def write_ddpm(folder: Path) -> Path:
    """An unconditional checkpoint as the published ones are: everything at the top of one folder."""
    write_json(folder / "config.json", DDPM_JSON)
    model = tiny_ddpm()
    save_file(translated(keys_diffusers.unet(DDPM.unet), model.unet), folder / "diffusion_pytorch_model.safetensors")
    return folder
