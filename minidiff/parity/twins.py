"""Tiny models of diffusers with random weights: one of each family, small enough to be kept beside tests.

A twin has the shape of its family in small: two resolutions, one of them without attention, groups of 4 channels, the
family's activation, padding, prediction and scheduler. Its byte-pair table is the beginning of CLIP's: every text can
be encoded, with more tokens. Every parameter is drawn, norms and biases too, so that exchanging two of them, or
forgetting one, changes the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minidiff.models.tokenizer import END, START, clip_table
from minidiff.parity.theirs import import_diffusers

MERGES = 256  # of CLIP's 48,894
SYMBOLS = 512  # bytes, and bytes that end a word
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING: dict[str, Any] = BETAS | {"steps_offset": 1, "set_alpha_to_one": False}

SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
SD2 = SD1 | {"attention_head_dim": [2, 4], "use_linear_projection": True}
SDXL = SD2 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 16 + 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
}
DDPM: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
VAE: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
CLIP: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
OPENCLIP: dict[str, Any] = CLIP | {"hidden_act": "gelu"}
BIGG: dict[str, Any] = OPENCLIP | {"hidden_size": 8, "projection_dim": 8}

FAMILIES = ("sd1", "sd2", "sdxl", "inpaint", "ddpm")


def twin(family: str) -> Any:
    """Return a pipeline of diffusers with a tiny model of ``family``, the same one every time."""
    diffusers = import_diffusers()
    if family == "ddpm":
        return diffusers.DDPMPipeline(drawn(diffusers.UNet2DModel(**DDPM), 0), diffusers.DDPMScheduler())
    return _sdxl(diffusers) if family == "sdxl" else _stable_diffusion(diffusers, family)


def _stable_diffusion(diffusers: Any, family: str) -> Any:
    second = family == "sd2"
    unet = SD2 if second else SD1 | {"in_channels": 9} if family == "inpaint" else SD1
    kind = "StableDiffusionInpaintPipeline" if family == "inpaint" else "StableDiffusionPipeline"
    ddim = {"clip_sample": False, "prediction_type": "v_prediction"}
    scheduler = (
        diffusers.DDIMScheduler(**LEADING | ddim)
        if second
        else diffusers.PNDMScheduler(**LEADING | {"skip_prk_steps": True})
    )
    return getattr(diffusers, kind)(
        vae=drawn(diffusers.AutoencoderKL(**VAE), 1),
        text_encoder=_clip(OPENCLIP if second else CLIP, 2),
        tokenizer=_tokenizer("!" if second else END),
        unet=drawn(diffusers.UNet2DConditionModel(**unet), 0),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(diffusers: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=drawn(diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025, force_upcast=True), 1),
        text_encoder=_clip(CLIP, 2),
        text_encoder_2=_clip(BIGG, 3, projected=True),
        tokenizer=_tokenizer(END),
        tokenizer_2=_tokenizer("!"),
        unet=drawn(diffusers.UNet2DConditionModel(**SDXL), 0),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )


def _clip(options: dict[str, Any], seed: int, *, projected: bool = False) -> Any:
    import transformers

    tokens = SYMBOLS + MERGES + 2
    common = {"vocab_size": tokens, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return drawn(cls(transformers.CLIPTextConfig(**common | options)), seed)


def _tokenizer(pad: str) -> Any:
    import transformers

    vocab, merges = clip_table()
    tokens = (*vocab[: SYMBOLS + MERGES], START, END)
    pairs: Any = list(merges[:MERGES])  # which transformers calls a list of texts
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=pairs,
        pad_token=pad,
        model_max_length=77,
    )


def drawn(model: Any, seed: int) -> Any:
    """Return ``model`` in eval mode with every parameter drawn anew, at a size that keeps activations near 1."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            noise = torch.randn(p.shape, generator=g)
            if isinstance(module, nn.Embedding):
                p.data = noise
            elif p.ndim >= 2:
                p.data = noise / p[0].numel() ** 0.5
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and name == "weight":
                p.data = 1 + 0.3 * noise
            else:
                p.data = 0.3 * noise
    return model.eval()
