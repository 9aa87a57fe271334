"""Tiny models of each family for the tests, built in a fraction of a second."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from minidiff import ControlModel
from minidiff.config import (
    CLIPTextConfig,
    ControlConfig,
    ControlNetConfig,
    Level,
    ModelConfig,
    ScheduleConfig,
    T2IAdapterConfig,
    TokenizerConfig,
    UNetConfig,
    VAEConfig,
    text,
)
from minidiff.pipeline import StableDiffusion, Unconditional, random_model
from minidiff.pipeline.request import Request
from minidiff.pipeline.rows import choose_rows
from minidiff.programs import img2img
from minidiff.storage.checkpoint import build

UNET = UNetConfig(
    levels=(text(16, 2), Level(channels=24)), mid=text(24, 3), context_dim=16, layers=1, groups=8, sample_size=8
)
SD = ModelConfig(
    family="tiny sd",
    unet=UNET,
    schedule=ScheduleConfig(),
    sampler={"name": "pndm"},
    vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=8, sample_size=64),
    text_encoder=CLIPTextConfig(width=16, layers=2, heads=2, mlp=32),
    tokenizer=TokenizerConfig(),
)
XL = replace(  # SDXL: two text encoders, pooled text and sizes
    SD,
    family="tiny sdxl",
    unet=replace(UNET, context_dim=16 + 8, added_dim=4 + 6 * 2, added_sinusoid=2),
    text_encoder_2=CLIPTextConfig(width=8, layers=2, heads=2, mlp=16, projection=4, activation="gelu"),
    tokenizer_2=TokenizerConfig(pad=0),
    text_layer="penultimate",
    zero_empty=True,
)
DDPM = ModelConfig(
    family="tiny ddpm",
    unet=replace(
        UNET,
        levels=(Level(channels=16), Level(channels=24, attention="self", heads=3)),
        mid=Level(channels=24, attention="self", heads=1),
        context_dim=None,
        in_channels=3,
        out_channels=3,
        sin_first=True,
        freq_shift=1,
        asymmetric_down=True,
        eps=1e-6,
    ),
    schedule=ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    sampler={"name": "ddpm"},
)


def redraw(module: nn.Module, seed: int = 0) -> None:
    """Every parameter drawn anew, so that none is left at a 0 or a 1 behind which a slip could hide.

    The sizes are such that the prompt counts: in a small model with small weights it would drown in rounding.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, p in part.named_parameters(recurse=False):
                noise = torch.randn(p.shape, generator=g)
                if isinstance(part, (nn.GroupNorm, nn.LayerNorm)) and name == "weight":
                    p.copy_(1 + 0.3 * noise)
                elif p.ndim == 1:
                    p.copy_(0.3 * noise)
                else:
                    p.copy_(noise if isinstance(part, nn.Embedding) else noise / p[0].numel() ** 0.5)


def tiny_sd(seed: int = 0) -> StableDiffusion:
    """A text-to-image model: 8 x 8 latents, 64 x 64 pixels."""
    return cast(StableDiffusion, drawn(SD, seed))


def tiny_xl(seed: int = 0) -> StableDiffusion:
    """The same with SDXL's two text encoders."""
    return cast(StableDiffusion, drawn(XL, seed))


def tiny_ddpm(seed: int = 0) -> Unconditional:
    """An unconditional model on 8 x 8 pixels."""
    return cast(Unconditional, drawn(DDPM, seed))


def drawn(config: ModelConfig, seed: int = 0) -> StableDiffusion | Unconditional:
    model = random_model(config, seed)
    for part in model.parts.values():
        redraw(part, seed)
    return model


def rows_of(
    plan: Any,
    steps: int,
    sampler: Any,
    strength: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> range:
    """The rows of a plan that a run executes: all, the last ones of img2img, or a part of the way."""
    image = None if strength is None and start is None else torch.zeros(1, 3, 8, 8)
    request = Request(None, steps=steps, image=image, strength=strength, denoising_start=start, denoising_end=end)
    order = getattr(sampler, "order", 1)
    entry = img2img.whole(steps) if strength is None else img2img.entry("diffusers", steps, strength)
    return choose_rows(plan, order, entry, request, 1000)[0]


def tiny_controlnet(seed: int = 5, config: ModelConfig = SD, **options: Any) -> ControlModel:
    """A ControlNet for the tiny models."""
    c = config.unet
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    return tiny_control(ControlNetConfig(**{**fields, "hint_widths": (4, 4, 8, 8), **options}), seed)


def tiny_adapter(seed: int = 6, **options: Any) -> ControlModel:
    """A T2I-Adapter for the tiny text-to-image model."""
    return tiny_control(T2IAdapterConfig(**{"channels": (16, 24), "layers": 1, **options}), seed)


def tiny_control(config: ControlNetConfig | T2IAdapterConfig, seed: int) -> ControlModel:
    """A control with every weight drawn anew."""
    known = ControlConfig(family="tiny control", control=config)
    parts = {name: part.to_empty(device="cpu") for name, part in build(known).items()}
    for part in parts.values():
        redraw(part, seed)
    return ControlModel(known, parts)
