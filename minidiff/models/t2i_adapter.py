"""T2I-Adapter: a small network whose features of a picture are added to the UNet's way down (Mou et al. 2023).

It reads the picture once, not at every step: squares of pixels become channels, and a few residual blocks a level give
one feature for each level of the UNet.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.config import T2IAdapterConfig


class T2IAdapter(nn.Module):
    """Features of a picture, finest first: the ``features`` of a UNet."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        light, channels = config.kind == "light", config.image_channels * config.factor**2
        self.conv_in = None if light else nn.Conv2d(channels, config.channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        channels = channels if light else config.channels[0]
        for i, width in enumerate(config.channels):
            down = i == 2 if config.kind == "xl" else i > 0
            self.levels.append(AdapterLevel(channels, width, config.layers, down=down, light=light))
            channels = width

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Compute the features of a picture (B, image_channels, H, W) in [0, 1], with sides divisible by ``factor``."""
        x = F.pixel_unshuffle(picture, self.config.factor)
        if self.conv_in is not None:
            x = self.conv_in(x)
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class AdapterLevel(nn.Module):
    """Half the side by averaging (``down``), then blocks, at the level's width or (``light``) at a quarter of it."""

    def __init__(self, channels: int, out: int, blocks: int, *, down: bool, light: bool) -> None:
        super().__init__()
        width = out // 4 if light else out
        self.down = down
        self.conv_in = nn.Conv2d(channels, width, 1) if light or channels != out else nn.Identity()
        self.res = nn.ModuleList(AdapterBlock(width, 3 if light else 1) for _ in range(blocks))
        self.conv_out = nn.Conv2d(width, out, 1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.conv_in(x)
        for res in self.res:
            x = res(x)
        out: Tensor = self.conv_out(x)
        return out


class AdapterBlock(nn.Module):
    """Two convolutions with ReLU between them, added to their input; the second with a kernel of ``size``."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.relu(self.conv1(x))) + x
        return out
