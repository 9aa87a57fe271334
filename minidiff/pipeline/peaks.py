"""The most memory that each network takes while it runs, counted from its config.

Every function follows the ``forward`` of the same name in ``models/`` line by line, adds up the tensors that are alive,
and returns the largest sum in numbers (not bytes), beyond the input, which its caller keeps. A tensor lives as long as
a name refers to it: the input of a layer until the layer returns, what is computed for the next call until that
returns. ``tests/unit/test_estimate.py`` compares the sums with those of the modules themselves.

Not counted: norms' statistics, embeddings of the timestep, and the scores of attention, which kernels never hold whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from minidiff.config import (
    CLIPTextConfig,
    ControlNetConfig,
    Level,
    T2IAdapterConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
)
from minidiff.models.unet import skip_widths


@dataclass(frozen=True)
class Peaks:
    """Counter for batches of ``rows``. ``copies``: convolutions reorder input and weights into another layout first,
    and their output afterwards, as oneDNN does on the CPU; 1x1 convolutions do not."""

    rows: int
    copies: bool = True

    # --- layers: channels, and area of the picture (height * width) ---

    def conv(self, channels: int, out: int, area: int, out_area: int | None = None) -> int:
        """3x3 convolution, its output included."""
        made = self.rows * out * (area if out_area is None else out_area)
        return made + (max(self.rows * channels * area + 9 * channels * out, made) if self.copies else 0)

    def res_block(self, channels: int, out: int, area: int) -> int:
        one, other = self.rows * channels * area, self.rows * out * area
        first = one + self.conv(channels, out, area)
        return max(2 * one, first, 3 * other, 2 * other + self.conv(out, out, area))

    def transformer(self, level: Level, area: int, tokens: int, linear: bool) -> int:
        """Spatial transformer: at its peak are its normalized input, that of the feed-forward before and after its
        norm, value and gate (8 widths), the gate's gelu and their product (4 each)."""
        one, text = self.rows * level.channels * area, self.rows * level.channels * tokens
        ways_in = 3 * one if linear else 2 * one
        return max(ways_in, (2 + 6) * one, (3 + 4) * one + 2 * text, (3 + 8 + 4 + 4) * one)

    def self_attention(self, channels: int, area: int) -> int:
        return 6 * self.rows * channels * area

    def attention(self, c: UNetConfig, level: Level, area: int, tokens: int) -> int:
        """Attention behind a ResBlock; 0 if there is none."""
        if level.attention == "text":
            return self.transformer(level, area, tokens, c.linear_proj)
        return self.self_attention(level.channels, area) if level.attention == "self" else 0

    # --- the UNet and the ControlNet ---

    def unet(
        self, c: UNetConfig, height: int, width: int, tokens: int, *, steered: bool = False, features: bool = False
    ) -> int:
        """UNet on ``height`` x ``width`` latents. ``steered``: a ControlNet adds to the skips,
        ``features``: a T2I-Adapter to the way down. What they add is the caller's, and not counted."""
        sizes = way_down(c, height, width)
        top, skips = self._down(c, height, width, tokens, features)
        widths, held = skip_widths(c), sum(skips)
        top = max(top, 2 * held + 2 * skips[-1]) if steered else top
        x, below = skips[-1], c.levels[-1].channels
        for k in reversed(range(len(c.levels))):
            level, area = c.levels[k], sizes[k][0] * sizes[k][1]
            made, given = self.rows * level.channels * area, x
            for i in range(c.layers + 1):
                skip = skips.pop()
                both = x + skip
                here = held + given + (x if i else 0) + both
                top, held, here = max(top, here), held - skip, here - skip
                top = max(top, here + self.res_block(below + widths.pop(), level.channels, area))
                x, below = made, level.channels
                top = max(top, held + given + made + self.attention(c, level, area, tokens))
            if k > 0:
                larger = sizes[k - 1][0] * sizes[k - 1][1]
                x = self.rows * level.channels * larger
                top = max(top, held + given + made + x + self.conv(level.channels, level.channels, larger))
        first = c.levels[0].channels
        return max(top, 3 * x, 2 * x + self.conv(first, c.out_channels, height * width))

    def control_net(self, c: ControlNetConfig, height: int, width: int, tokens: int) -> int:
        """ControlNet without the network before its picture; its outputs, as many as the skips, are included."""
        top, skips = self._down(c, height, width, tokens, False)
        h, w = way_down(c, height, width)[-1]
        return max(top, 2 * sum(skips) + 2 * self.rows * c.mid.channels * h * w)

    def hint(self, c: ControlNetConfig, height: int, width: int) -> int:
        """Network before a ControlNet's picture, on ``height`` x ``width`` pixels."""
        widths, area = c.hint_widths, height * width
        top = max(self.conv(c.image_channels, widths[0], area), 2 * self.rows * widths[0] * area)
        for one, other in pairwise(widths):
            x, smaller = self.rows * one * area, ceil(height / 2) * ceil(width / 2)
            top = max(top, x + self.conv(one, one, area), 3 * x, x + self.conv(one, other, area, smaller))
            height, width, area = ceil(height / 2), ceil(width / 2), smaller
        return max(top, self.rows * widths[-1] * area + self.conv(widths[-1], c.levels[0].channels, area))

    def features(self, c: T2IAdapterConfig, height: int, width: int) -> int:
        """T2I-Adapter, on pixels. Its features are included."""
        h, w = height // c.factor, width // c.factor
        first = self.rows * c.image_channels * c.factor**2 * h * w
        top, made = first + self.conv(c.image_channels * c.factor**2, c.channels[0], h * w), 0
        before = first if c.kind == "light" else self.rows * c.channels[0] * h * w
        for k, out in enumerate(c.channels):
            if (k == 2) if c.kind == "xl" else (k > 0):
                h, w = ceil(h / 2), ceil(w / 2)
            inner = out // 4 if c.kind == "light" else out
            x = self.rows * inner * h * w
            top = max(top, before + made + x + max(2 * x, x + self.conv(inner, inner, h * w)))
            made, before = made + self.rows * out * h * w, 0
        return max(top, made)

    def _down(self, c: UNetConfig, height: int, width: int, tokens: int, features: bool) -> tuple[int, list[int]]:
        """Way down and middle: the peak, and the sizes of the skips, of which all are alive at the end."""
        sizes = way_down(c, height, width)
        channels, area = c.levels[0].channels, height * width
        top = self.conv(c.in_channels, channels, area)
        skips = [self.rows * channels * area]
        for k, level in enumerate(c.levels):
            area = sizes[k][0] * sizes[k][1]
            made = self.rows * level.channels * area
            for _ in range(c.layers):
                held = sum(skips)
                top = max(top, held + self.res_block(channels, level.channels, area))
                top = max(top, held + made + self.attention(c, level, area, tokens))
                skips.append(made)
                channels = level.channels
            held = sum(skips)
            if features:
                top = max(top, held + made)
            if k < len(c.levels) - 1:
                after = sizes[k + 1][0] * sizes[k + 1][1]
                padded = self.rows * channels * (sizes[k][0] + 1) * (sizes[k][1] + 1) if c.asymmetric_down else 0
                top = max(top, held + padded + self.conv(channels, channels, area, after))
                skips.append(self.rows * channels * after)
        held, x = sum(skips), self.rows * channels * area
        if c.mid_layers > 0:
            top = max(top, held + self.res_block(channels, channels, area))
            top = max(top, held + x + self.attention(c, c.mid, area, tokens))
        if c.mid_layers > 1:
            top = max(top, held + x + self.res_block(channels, channels, area))
        return top, skips

    # --- autoencoders, on latents for the decoder and on pixels for the encoder ---

    def decoder(self, c: VAEConfig | TAESDConfig, height: int, width: int) -> int:
        if isinstance(c, TAESDConfig):
            return self._tiny_decoder(c, height, width)
        area, outs = height * width, c.channels[::-1]
        channels = outs[0]
        x = self.rows * channels * area
        top = max(self.conv(c.latent_channels, channels, area), 2 * x + self._middle(c, area))
        for k, out in enumerate(outs):
            given = self.rows * channels * area
            made = self.rows * out * area
            for i in range(c.layers + 1):
                top = max(top, given + (made if i else 0) + self.res_block(channels, out, area))
                channels = out
            if k < len(outs) - 1:
                area *= 4
                top = max(top, given + made + 4 * made + self.conv(out, out, area))
                x = self.rows * out * area
            else:
                x = made
        beside = self.rows * c.latent_channels * height * width if c.quant_convs else 0
        return beside + max(top, 3 * x, 2 * x + self.conv(channels, c.image_channels, area))

    def encoder(self, c: VAEConfig | TAESDConfig, height: int, width: int) -> int:
        if isinstance(c, TAESDConfig):
            return max(self._tiny_blocks(c, n, height * width >> 2 * k) for k, n in enumerate(c.blocks))
        area, channels = height * width, c.channels[0]
        top = self.conv(c.image_channels, channels, area)
        for k, out in enumerate(c.channels):
            given, made = self.rows * channels * area, self.rows * out * area
            for i in range(c.layers):
                top = max(top, given + (made if i else 0) + self.res_block(channels, out, area))
                channels = out
            if k < len(c.channels) - 1:
                padded = self.rows * out * (height + 1) * (width + 1)
                height, width = height // 2, width // 2
                after = height * width
                top = max(top, given + made + padded + self.conv(out, out, area, after))
                area = after
        x = self.rows * channels * area
        return max(top, x + self._middle(c, area), 3 * x)

    def _middle(self, c: VAEConfig, area: int) -> int:
        channels = c.channels[-1]
        attention = self.self_attention(channels, area) if c.mid_attention else 0
        return self.rows * channels * area + max(attention, self.res_block(channels, channels, area))

    def _tiny_decoder(self, c: TAESDConfig, height: int, width: int) -> int:
        area, top = height * width, 0
        for k, blocks in enumerate(reversed(c.blocks)):
            x = self.rows * c.width * area
            top = max(top, self._tiny_blocks(c, blocks, area))
            if k < len(c.blocks) - 1:
                area *= 4
                top = max(top, x + min(blocks, 1) * x + 4 * x + self.conv(c.width, c.width, area))
        return top

    def _tiny_blocks(self, c: TAESDConfig, blocks: int, area: int) -> int:
        """Blocks of a level, with the level's input."""
        x = self.rows * c.width * area
        return 0 if blocks == 0 else x + min(blocks - 1, 1) * x + max(2 * x, x + self.conv(c.width, c.width, area))

    # --- text ---

    def text_encoder(self, c: CLIPTextConfig) -> int:
        """CLIP: the states of all layers, and one layer at work, whose feed-forward computes gelu in three steps."""
        one = self.rows * c.positions * c.width
        inside = self.rows * c.positions * c.mlp * (3 if c.activation == "quick_gelu" else 2)
        return (c.layers + 1) * one + max(inside, 5 * one)


def way_down(c: UNetConfig, height: int, width: int) -> list[tuple[int, int]]:
    """Return height and width of every level."""
    sizes = [(height, width)]
    for _ in c.levels[1:]:
        h, w = sizes[-1]
        sizes.append((h // 2, w // 2) if c.asymmetric_down else (ceil(h / 2), ceil(w / 2)))
    return sizes
