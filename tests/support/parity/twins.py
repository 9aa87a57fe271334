"""Twins: tiny random models of the reference, and the same models after a trip through the production converter.

A twin has the shape of its family in small: three levels, one of them without attention, a different number of heads
at each, groups of 8. Every parameter is drawn anew, norms and biases too, so two swapped tensors of one shape, or one
that was left at its initial value, change the output.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minidiff.models.tokenizer import clip_table
from weights_convert.component import meta_model, read_component

SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
SD2 = SD1 | {"attention_head_dim": [2, 4, 8], "use_linear_projection": True, "cross_attention_dim": 40}
SDXL = SD2 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": 72,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
DDPM: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
UNETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd1": (UNet2DConditionModel, SD1),
    "sd2": (UNet2DConditionModel, SD2),
    "sdxl": (UNet2DConditionModel, SDXL),
    "refiner": (
        UNet2DConditionModel,
        SDXL
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 2,
        },
    ),
    "inpaint": (UNet2DConditionModel, SD1 | {"in_channels": 9}),
    "sd2_inpaint": (UNet2DConditionModel, SD2 | {"in_channels": 9}),
    "lcm": (UNet2DConditionModel, SD1 | {"time_cond_proj_dim": 16}),
    "ddpm": (UNet2DModel, DDPM),
    # As the reference's own training script makes them: heads of 8 channels, the sinusoid of Stable Diffusion.
    "ddpm_heads": (
        UNet2DModel,
        DDPM
        | {
            "attention_head_dim": 8,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "downsample_padding": 1,
            "norm_eps": 1e-5,
        },
    ),
}
CLIPS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "l": (CLIPTextModel, {"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "quick_gelu"}),
    "h": (CLIPTextModel, {"hidden_size": 40, "num_attention_heads": 5, "hidden_act": "gelu"}),
    "bigg": (
        CLIPTextModelWithProjection,
        {"hidden_size": 48, "num_attention_heads": 6, "hidden_act": "gelu", "projection_dim": 24},
    ),
}


SCALED_LINEAR: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def redraw(model: nn.Module, seed: int) -> nn.Module:
    """``model`` in eval mode with every parameter drawn anew, at a size that keeps activations near 1.

    Its weights require gradients, as those of the reference's ``from_pretrained`` do: torch picks the kernel of a
    linear layer by that, and processors differ in whether its bits show.
    """
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            noise = torch.randn(p.shape, generator=g)
            if p.ndim >= 2:
                p.data = noise * (0.5 / p[0].numel() ** 0.5)
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and name == "weight":
                p.data = 1 + 0.3 * noise
            else:
                p.data = 0.3 * noise
    return model.eval()


def unet_twin(kind: str, seed: int = 0, **options: Any) -> Any:
    """A tiny UNet of the reference: a kind of ``UNETS``, ``options`` of its class on top."""
    cls, found = UNETS[kind]
    return redraw(cls(**found | options), seed)


def vae_twin(seed: int = 1, **options: Any) -> Any:
    """A tiny autoencoder of the reference, with a factor of 4."""
    found: dict[str, Any] = {
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    return redraw(AutoencoderKL(**found | options), seed)


def clip_twin(kind: str = "l", seed: int = 2, **options: Any) -> Any:
    """A tiny text encoder of the reference with CLIP's real vocabulary: "l", "h" or "bigg" (projected)."""
    cls, found = CLIPS[kind]
    common = {
        "vocab_size": 49408,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    model = redraw(cls(CLIPTextConfig(**common | found | options)), seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data *= 2 * module.embedding_dim**0.5  # rows of size 1: else the norms see bare biases
    return model


def ours(reference: nn.Module) -> Any:
    """minidiff's model with the reference's weights, by way of a folder on disk and the production converter."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        component = read_component(Path(folder))
        model = meta_model(component.config)
        model.load_state_dict({k: t.load().clone() for k, t in component.part.tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def tokenizer_twin(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """The reference's tokenizer with CLIP's real table; SD2 fills up with ``pad="!"``, whose id is 0."""
    vocab, merges = clip_table()
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(vocab)}, merges=list(merges), pad_token=pad, model_max_length=77
    )


def scheduler_twin(**options: Any) -> Any:
    """The scheduler that Stable Diffusion 1 ships: PNDM without its warm-up."""
    found = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    return PNDMScheduler(**found | options)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    return model if dtype == torch.float32 else model.to(dtype)


def pipeline_twin(kind: str = "sd1", scheduler: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """A whole tiny pipeline of the reference: a kind of ``UNETS``, or "sdxl_inpaint"."""
    if kind.startswith(("sdxl", "refiner")):
        return xl_twin(kind, scheduler, dtype)
    unet = unet_twin(kind)
    if kind.startswith("ddpm"):
        return DDPMPipeline(unet=_cast(unet, dtype), scheduler=scheduler or DDPMScheduler())
    sd2 = kind.startswith("sd2")
    width = unet.config.cross_attention_dim
    if kind == "lcm":
        scheduler = scheduler or LCMScheduler(**SCALED_LINEAR)
    kinds = {"lcm": LatentConsistencyModelPipeline}
    kinds |= dict.fromkeys(("inpaint", "sd2_inpaint"), StableDiffusionInpaintPipeline)
    return kinds.get(kind, StableDiffusionPipeline)(
        vae=_cast(vae_twin(), dtype),
        text_encoder=_cast(clip_twin("h" if sd2 else "l", hidden_size=width), dtype),
        tokenizer=tokenizer_twin("!" if sd2 else "<|endoftext|>"),
        unet=_cast(unet, dtype),
        scheduler=scheduler or scheduler_twin(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_twin(kind: str, scheduler: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny SDXL: "sdxl", "sdxl_inpaint" or "refiner"; ``options`` of the pipeline."""
    refiner = kind == "refiner"
    if refiner:  # five sinusoids beside the pooled text, and the second encoder alone
        unet = unet_twin("refiner", projection_class_embeddings_input_dim=24 + 5 * 8, cross_attention_dim=48)
        options = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False} | options
    else:
        unet = unet_twin("sdxl", in_channels=9 if kind == "sdxl_inpaint" else 4, cross_attention_dim=32 + 48)
    classes = {"sdxl": StableDiffusionXLPipeline, "refiner": StableDiffusionXLImg2ImgPipeline}
    return classes.get(kind, StableDiffusionXLInpaintPipeline)(
        vae=_cast(vae_twin(scaling_factor=0.13025, force_upcast=True), dtype),
        text_encoder=None if refiner else _cast(clip_twin("l", hidden_size=32), dtype),
        text_encoder_2=_cast(clip_twin("bigg", seed=5), dtype),
        tokenizer=None if refiner else tokenizer_twin(),
        tokenizer_2=tokenizer_twin("!"),
        unet=_cast(unet, dtype),
        scheduler=scheduler or EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading", steps_offset=1),
        **options,
    )


def folder_twin(
    path: str | Path, kind: str = "sd1", *, scheduler: Any = None, dtype: torch.dtype = torch.float32, **save: Any
) -> Any:
    """Write :func:`pipeline_twin` as a folder (``save``: options of ``save_pretrained``), and return it."""
    pipeline = pipeline_twin(kind, scheduler, dtype)
    pipeline.save_pretrained(str(path), **save)
    return pipeline
