"""Building blocks of the UNet and the VAE: the ResBlock, down- and upsampling, and the time embedding.

ResBlocks follow He et al. 2016, with group norms (Wu & He 2018) and SiLU. The sinusoidal time embedding comes from
Vaswani et al. 2017, section 3.5, and was introduced to diffusion models by Ho et al. 2020.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int, *, sin_first: bool = False, freq_shift: int = 0) -> Tensor:
    """Compute the sinusoidal embedding of Vaswani et al.: (N,) -> float32 (N, dim), ``dim`` even.

    Frequencies fall geometrically from 1 to 1/10000 (exactly with ``freq_shift=1``, as in DDPM; Stable Diffusion stops
    one short). Stable Diffusion puts the cosines first, DDPM the sines.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(exponent / (half - freq_shift))[None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    return torch.cat([sin, cos] if sin_first else [cos, sin], dim=-1)


class Embedding(nn.Module):
    """Two-layer network over a sinusoid: (B, dim) -> (B, out). ``condition_dim``: size of LCM's guidance embedding."""

    def __init__(self, dim: int, out: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, out)
        self.linear2 = nn.Linear(out, out)
        self.condition = nn.Linear(condition_dim, dim, bias=False) if condition_dim else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.condition is not None and condition is not None:
            x = x + self.condition(condition)
        out: Tensor = self.linear2(F.silu(self.linear1(x)))
        return out


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input; the time embedding (B, T) shifts the channels in between.

    With ``time_dim`` None (the VAE) there is no shift. If the widths differ, a 1x1 convolution adapts the input.
    """

    def __init__(self, channels: int, out: int, groups: int, eps: float, time_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time_dim, out) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out, eps=eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None and temb is not None:
            h = h + self.time(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.skip(x) + h
        return out


class Downsample(nn.Module):
    """Downsampling by a convolution with stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)).

    ``asymmetric`` pads right and bottom only, as TensorFlow's "same" does in the original code of DDPM and the VAE (odd
    sides are then rounded down).
    """

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to ``size`` (H, W), then a convolution. The size is given since sides may be odd."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return out
