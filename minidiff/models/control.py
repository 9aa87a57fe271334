"""ControlNet: a copy of the UNet's way down that reads a picture and adds to its skips (Zhang et al. 2023).

The picture (edges, depth, a pose) is brought to the size of the latents by a small network, the hint, and added to the
output of the first convolution. From there the copy runs like the original. Each of its skips, and the output of its
middle, goes through a 1x1 convolution that was zero when training began, and is added to the UNet's own.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.config import ControlNetConfig
from minidiff.models.unet import WayDown, skip_widths


class ControlNet(WayDown):
    """The copy of the way down, with the network before its picture (``hint``) and the convolutions behind it."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.hint = Hint(config)
        self.zero = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skip_widths(config))
        self.zero_mid = nn.Conv2d(config.mid.channels, config.mid.channels, 1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None,
        hint: Tensor,
        added: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the ``residuals`` of a UNet that is called with the same ``x``, ``t``, ``context`` and ``added``.

        ``hint`` (B, C, H, W): what ``self.hint`` returned for the picture.
        """
        temb = self.embed_time(x, t, added)
        x = self.conv_in(x) + hint
        skips = [x]
        for level in self.down:
            x = level(x, temb, context, skips)
        x = self.mid(x, temb, context)
        return [zero(skip) for zero, skip in zip(self.zero, skips, strict=True)], self.zero_mid(x)


class Hint(nn.Module):
    """Picture (B, image_channels, H, W) in [0, 1] to (B, C, H/8, W/8): 3x3 convolutions, every other with stride 2."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.hint_widths
        self.bgr = config.bgr
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.convs = nn.ModuleList()
        for width, next_width in pairwise(widths):
            self.convs.append(nn.Conv2d(width, width, 3, padding=1))
            self.convs.append(nn.Conv2d(width, next_width, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], config.levels[0].channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture.flip(1) if self.bgr else picture))
        for conv in self.convs:
            x = F.silu(conv(x))
        out: Tensor = self.conv_out(x)
        return out
