"""Autoencoder: converts pixels to latents, with an eighth of the side length and four channels, and back.

Diffusion runs on latents because they are 48 times smaller and keep the perceptually relevant content (Rombach et al.
2022, section 3.1). ``encode`` returns a Gaussian, weakly regularized towards N(0, 1) in training (Kingma & Welling
2014). The latents of Stable Diffusion 1 have a standard deviation of 1 / 0.18215, and diffusion needs 1: callers
multiply by ``config.scaling_factor`` after ``encode``, and divide by it before ``decode``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.config import VAEConfig
from minidiff.models.attention import SpatialSelfAttention
from minidiff.models.blocks import Downsample, ResBlock, Upsample

EPS = 1e-6  # every norm of the VAE; the UNet's ResBlocks use 1e-5


@dataclass(frozen=True)
class DiagonalGaussian:
    """Output of the encoder: mean and log-variance of each latent, both (B, latent_channels, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Return mean + std * noise, unscaled. The noise is drawn on the generator's device unless it is given."""
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class VAE(nn.Module):
    """The KL autoencoder of every Stable Diffusion."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant = nn.Conv2d(2 * latent, 2 * latent, 1) if config.quant_convs else nn.Identity()
        self.post_quant = nn.Conv2d(latent, latent, 1) if config.quant_convs else nn.Identity()

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Encode (B, image_channels, H, W) in [-1, 1] to an unscaled Gaussian over (B, latent_channels, H/8, W/8)."""
        mean, logvar = self.quant(self.encoder(pixels)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Decode unscaled latents (B, latent_channels, h, w) to pixels (B, image_channels, 8h, 8w) in about [-1, 1]."""
        pixels: Tensor = self.decoder(self.post_quant(z))
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode and decode through the mean, (B, image_channels, H, W) -> the same shape."""
        return self.decode(self.encode(pixels).mean)


class Encoder(nn.Module):
    """Encoder: pixels -> mean and log-variance, (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(config.image_channels, first, 3, padding=1)
        inputs = (first, *config.channels[:-1])
        self.down = nn.ModuleList(
            EncoderLevel(config, c, out, last=i == len(inputs) - 1)
            for i, (c, out) in enumerate(zip(inputs, config.channels, strict=True))
        )
        self.mid = Middle(config)
        self.norm_out = nn.GroupNorm(config.groups, last, eps=EPS)
        self.conv_out = nn.Conv2d(last, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """Decoder: latents -> pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, last, 3, padding=1)
        self.mid = Middle(config)
        outs = config.channels[::-1]
        self.up = nn.ModuleList(
            DecoderLevel(config, c, out, last=i == len(outs) - 1)
            for i, (c, out) in enumerate(zip((last, *outs[:-1]), outs, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.groups, first, eps=EPS)
        self.conv_out = nn.Conv2d(first, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class EncoderLevel(nn.Module):
    """ResBlocks, then downsampling (except in the last level)."""

    def __init__(self, config: VAEConfig, channels: int, out: int, *, last: bool) -> None:
        super().__init__()
        self.res = res_blocks(config, channels, out, config.layers)
        self.down = nn.Identity() if last else Downsample(out, asymmetric=True)

    def forward(self, x: Tensor) -> Tensor:
        for res in self.res:
            x = res(x)
        out: Tensor = self.down(x)
        return out


class DecoderLevel(nn.Module):
    """One ResBlock more than in the encoder, then upsampling (except in the last level)."""

    def __init__(self, config: VAEConfig, channels: int, out: int, *, last: bool) -> None:
        super().__init__()
        self.res = res_blocks(config, channels, out, config.layers + 1)
        self.up = None if last else Upsample(out)

    def forward(self, x: Tensor) -> Tensor:
        for res in self.res:
            x = res(x)
        if self.up is not None:
            height, width = x.shape[-2:]
            x = self.up(x, (2 * height, 2 * width))
        return x


class Middle(nn.Module):
    """ResBlock, attention of every latent to all others with a single head, ResBlock."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config.channels[-1]
        self.res1 = ResBlock(c, c, config.groups, EPS)
        self.attn = SpatialSelfAttention(c, 1, config.groups, EPS) if config.mid_attention else nn.Identity()
        self.res2 = ResBlock(c, c, config.groups, EPS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.res2(self.attn(self.res1(x)))
        return out


def res_blocks(config: VAEConfig, channels: int, out: int, count: int) -> nn.ModuleList:
    """Create ``count`` ResBlocks without a time embedding, the first from ``channels`` to ``out``."""
    return nn.ModuleList(ResBlock(channels if i == 0 else out, out, config.groups, EPS) for i in range(count))
