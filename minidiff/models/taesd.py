"""Tiny autoencoder: decodes in a fraction of the time at slightly lower quality, for previews and slow machines.

TAESD (Ollin Boer Bohan, https://github.com/madebyollin/taesd, MIT) was trained to imitate the large autoencoder of
Stable Diffusion with 1/30 of its parameters: ReLU blocks of a single width, no norms and no attention. It works on
scaled latents, so its ``scaling_factor`` is 1, and on pixels in [0, 1], which are converted from and to the range
[-1, 1] used elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.config import TAESDConfig
from minidiff.models.vae import DiagonalGaussian

LARGEST = 3  # latents are softly limited to -3..3 before decoding


@dataclass(frozen=True)
class Point(DiagonalGaussian):
    """Deterministic latents: this encoder does not return a distribution."""

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Return the latents; nothing is drawn."""
        return self.mean


class TAESD(nn.Module):
    """Encoder and decoder, used like the large autoencoder."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Encode (B, image_channels, H, W) in [-1, 1] to deterministic latents (B, latent_channels, H/8, W/8)."""
        latents = self.encoder(pixels)
        return Point(latents, torch.full_like(latents, -30.0))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, latent_channels, h, w) to pixels (B, image_channels, 8h, 8w), about in [-1, 1]."""
        pixels: Tensor = self.decoder(z)
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode and decode, (B, image_channels, H, W) -> the same shape."""
        return self.decode(self.encode(pixels).mean)


class TinyEncoder(nn.Module):
    """Pixels to latents: blocks, then half the side, three times."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        width = config.width
        self.conv_in = nn.Conv2d(config.image_channels, width, 3, padding=1)
        self.down = nn.ModuleList(DownLevel(width, n, first=i == 0) for i, n in enumerate(config.blocks))
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels.add(1).div(2))
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(x)
        return out


class TinyDecoder(nn.Module):
    """Latents to pixels: blocks, then twice the side, three times."""

    def __init__(self, config: TAESDConfig) -> None:
        super().__init__()
        width, blocks = config.width, config.blocks[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.up = nn.ModuleList(UpLevel(width, n, last=i == len(blocks) - 1) for i, n in enumerate(blocks))
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.conv_in(torch.tanh(z / LARGEST) * LARGEST))
        for level in self.up:
            x = level(x)
        out: Tensor = self.conv_out(x).mul(2).sub(1)
        return out


class DownLevel(nn.Module):
    """Downsampling (except in the first level), then blocks."""

    def __init__(self, width: int, blocks: int, *, first: bool) -> None:
        super().__init__()
        self.conv = nn.Identity() if first else nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
        self.res = nn.ModuleList(TinyBlock(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for res in self.res:
            x = res(x)
        return x


class UpLevel(nn.Module):
    """Blocks, then nearest-neighbour upsampling (except in the last level)."""

    def __init__(self, width: int, blocks: int, *, last: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(TinyBlock(width) for _ in range(blocks))
        self.conv = None if last else nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for res in self.res:
            x = res(x)
        if self.conv is not None:
            x = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between them, added to their input, and ReLU again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + x)
