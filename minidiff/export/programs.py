"""Networks of a model as programs: functions of named tensors, with the axes that may have any size.

    unet            x (batch, C, height, width), t (batch), ...      -> out
    vae_encoder     pixels (batch, 3, height, width) in [-1, 1]      -> mean, logvar
    vae_decoder     latents (batch, C, height, width), unscaled      -> pixels in about [-1, 1]
    text_encoder    ids (batch, length) int64                        -> context, pooled
    text_encoder_2  the same for SDXL's second encoder

The UNet further takes context (batch, length, width) where it reads a prompt, pooled and sizes for SDXL, and guidance
for models that are distilled with it. Scaling by ``scaling_factor``, guidance and the sampler's steps are left to the
caller, who needs the numbers of the manifest and the plan for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.config import CLIPTextConfig, ModelConfig, UNetConfig

Axes = tuple["str | int", ...]
"""Shape of a tensor; a name stands for any size."""
Tensors = Mapping[str, Tensor]

LEAST = 8  # side of the smallest latents for which programs are made and checked; more for UNets with many levels
LONGEST = 77  # tokens of a text for which they are; fewer where the text encoder takes fewer


@dataclass(frozen=True, eq=False)
class Program:
    """A network as a function: ``module`` takes the ``inputs`` by name and returns the ``outputs`` in this order.
    ``scale``: what a side of its picture is in sides of latents. ``least``: the smallest side that is sure to run.
    ``longest``: the most tokens of a text."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Axes]
    outputs: Sequence[str]
    scale: int = 1
    vocab: int = 0
    least: int = LEAST
    longest: int = LONGEST

    @property
    def sizes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Batch, height and width of latents, and length of the text, for which it is made (the first) and checked."""
        n, most = self.least, min(self.longest, LONGEST)
        return (2, n, n + n // 2, most), (1, n, n, most), (3, n + 1, n + 3, (most + 3) // 2)

    def example(self, batch: int, height: int, width: int, length: int, seed: int = 0) -> dict[str, Tensor]:
        """Return random inputs for latents of this size."""
        g = torch.Generator().manual_seed(seed)
        sizes = {"batch": batch, "height": height * self.scale, "width": width * self.scale, "length": length}
        found = {}
        for name, axes in self.inputs.items():
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
            if name == "ids":
                found[name] = torch.randint(self.vocab, shape, generator=g)
            elif name == "t":
                found[name] = 1000 * torch.rand(shape, generator=g)
            elif name == "sizes":
                found[name] = 1024.0 * torch.rand(shape, generator=g)
            else:
                found[name] = torch.randn(shape, generator=g)
        return found

    @torch.no_grad()
    def eager(self, inputs: Tensors) -> dict[str, Tensor]:
        """Return what the network itself computes, by name."""
        return self.named(self.module(**inputs))

    def named(self, found: Any) -> dict[str, Tensor]:
        """Return outputs by name."""
        found = (found,) if isinstance(found, Tensor) else tuple(found)
        return dict(zip(self.outputs, found, strict=True))


def programs(config: ModelConfig, parts: Mapping[str, nn.Module]) -> list[Program]:
    """Return the programs of a model's parts."""
    found = [_unet(config.unet, 5 if config.reads_score else 6, parts["unet"])]
    if config.vae is not None:
        picture: Axes = ("batch", config.vae.image_channels, "height", "width")
        latents: Axes = ("batch", config.vae.latent_channels, "height", "width")
        encoder = _Encoder(parts["vae"])
        found.append(Program("vae_encoder", encoder, {"pixels": picture}, ("mean", "logvar"), config.vae.factor))
        found.append(Program("vae_decoder", _Decoder(parts["vae"]), {"latents": latents}, ("pixels",)))
    encoders = {"text_encoder": config.text_encoder, "text_encoder_2": config.text_encoder_2}
    found += [_text(name, own, parts[name], config.text_layer) for name, own in encoders.items() if own is not None]
    return found


def _unet(config: UNetConfig, numbers: int, unet: nn.Module) -> Program:
    inputs: dict[str, Axes] = {"x": ("batch", config.in_channels, "height", "width"), "t": ("batch",)}
    if config.context_dim is not None:
        inputs["context"] = ("batch", "length", config.context_dim)
    if config.added_dim is not None:
        inputs["pooled"] = ("batch", config.added_dim - numbers * config.added_sinusoid)
        inputs["sizes"] = ("batch", numbers)
    if config.guidance_dim is not None:
        inputs["guidance"] = ("batch", config.guidance_dim)
    # A side is halved between levels. Where one number is left of it at the lowest, torch.export takes it for a side
    # that can never be more, and the program runs at no other size.
    least = max(LEAST, 2 ** len(config.levels))
    return Program("unet", _Denoiser(unet), inputs, ("out",), least=least)


def _text(name: str, config: CLIPTextConfig, encoder: nn.Module, layer: str) -> Program:
    inputs: dict[str, Axes] = {"ids": ("batch", "length")}
    outputs = ("context", "pooled")
    return Program(name, _Text(encoder, layer), inputs, outputs, vocab=config.vocab, longest=config.positions)


class _Denoiser(nn.Module):
    """The UNet with named inputs."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        added = None if pooled is None or sizes is None else (pooled, sizes)
        out: Tensor = self.unet(x, t, context, added, guidance)
        return out


class _Encoder(nn.Module):
    """The way into an autoencoder."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.vae.encode(pixels)  # type: ignore[operator]
        return found.mean, found.logvar


class _Decoder(nn.Module):
    """The way out of it."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents)  # type: ignore[operator]
        return pixels


class _Text(nn.Module):
    """A text encoder, with the layer that the family reads."""

    def __init__(self, encoder: nn.Module, layer: str) -> None:
        super().__init__()
        self.encoder, self.layer = encoder, layer

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.encoder(ids)
        return getattr(found, self.layer), found.pooled
