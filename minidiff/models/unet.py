"""The UNet: predicts epsilon (or v, or x0) from noisy latents, a timestep and a prompt. One class for all families.

It goes down through several resolutions, through a middle block, and up again. The outputs of the way down are passed
to the way up at the same resolution as skip connections (Ronneberger et al. 2015; Ho et al. 2020, appendix B; Rombach
et al. 2022; Podell et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.config import Level, UNetConfig, check
from minidiff.models.attention import SpatialSelfAttention, SpatialTransformer
from minidiff.models.blocks import Downsample, Embedding, ResBlock, Upsample, sinusoid

Residuals = tuple[Iterable[Tensor], Tensor]


class WayDown(nn.Module):
    """The half of a UNet that ends in the middle, which its ControlNets copy: time, way down, middle block.

    Submodules are named by their place: ``down.0.res.1.conv2``, ``mid.attn``.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, temb = config.levels[0].channels, config.time_dim
        self.time = Embedding(first, temb, config.guidance_dim)
        self.added = Embedding(config.added_dim, temb) if config.added_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)

        self.down = nn.ModuleList()
        channels = first
        for i, level in enumerate(config.levels):
            self.down.append(DownLevel(config, level, channels, last=i == len(config.levels) - 1))
            channels = level.channels
        self.mid = Middle(config)

    def embed_time(
        self, x: Tensor, t: Tensor | float, added: tuple[Tensor, Tensor] | None, guidance: Tensor | None = None
    ) -> Tensor:
        """Embed the timestep and the further conditions as one vector per picture, (B, time_dim)."""
        c = self.config
        # One row per picture even if all have the same timestep: computed once and broadcast, the bits would differ.
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        code = sinusoid(t, c.levels[0].channels, sin_first=c.sin_first, freq_shift=c.freq_shift)
        temb: Tensor = self.time(code.to(x.dtype), guidance)
        if self.added is not None and added is not None:
            pooled, ids = added
            sizes = sinusoid(ids.flatten(), c.added_sinusoid).reshape(pooled.shape[0], -1)
            temb = temb + self.added(torch.cat([pooled.to(temb.dtype), sizes.to(temb.dtype)], dim=-1))
        return temb


class UNet(WayDown):
    """The noise predictor."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, channels, skips = config.levels[0].channels, config.levels[-1].channels, skip_widths(config)
        self.up = nn.ModuleList()
        for i, level in enumerate(reversed(config.levels)):
            inputs = [skips.pop() for _ in range(config.layers + 1)]
            self.up.append(UpLevel(config, level, channels, inputs, last=i == len(config.levels) - 1))
            channels = level.channels

        self.norm_out = nn.GroupNorm(config.groups, first, eps=config.eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
        residuals: Residuals | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict from noisy ``x`` (B, in_channels, H, W) at timestep ``t`` ((B,) or scalar): (B, out_channels, H, W).

        ``context`` (B, L, context_dim): the encoded prompt. ``added``: SDXL's pooled text (B, D) and sizes (B, 6).
        ``guidance`` (B, guidance_dim): LCM's embedding of the guidance scale. ``residuals``: outputs of a ControlNet,
        one tensor for every skip in the order of the way down, and one for the middle. ``features``: outputs of a
        T2I-Adapter, one tensor for every level of the way down, and perhaps one for the middle. Raises
        :class:`ConfigError` if the prompt or the sizes are missing and this UNet needs them.
        """
        c = self.config
        check(c.context_dim is None or context is not None, "this UNet reads a prompt: context (B, L, D) is missing")
        check(c.added_dim is None or added is not None, "this UNet reads sizes: added (pooled, ids) is missing")
        temb = self.embed_time(x, t, added, guidance)
        x = self.conv_in(x)
        skips = [x]
        each = [*(features or ()), *[None] * (len(self.down) + 1)]
        for level, feature in zip(self.down, each, strict=False):
            x = level(x, temb, context, skips, feature)
        x = self.mid(x, temb, context)
        turn = each[len(self.down)]
        x = x if turn is None else x + turn
        if residuals is not None:
            skips = [s + r for s, r in zip(skips, residuals[0], strict=True)]
            x = x + residuals[1]
        for level in self.up:
            x = level(x, temb, context, skips)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class DownLevel(nn.Module):
    """One resolution on the way down: ResBlocks with attention, then downsampling (except in the last level)."""

    def __init__(self, config: UNetConfig, level: Level, channels: int, *, last: bool) -> None:
        super().__init__()
        inputs = [channels] + [level.channels] * (config.layers - 1)
        self.res = nn.ModuleList(res_block(config, c, level) for c in inputs)
        self.attn = nn.ModuleList(attentions(config, level, config.down_depths(level)))
        self.down = None if last else Downsample(level.channels, asymmetric=config.asymmetric_down)

    def forward(
        self, x: Tensor, temb: Tensor, context: Tensor | None, skips: list[Tensor], feature: Tensor | None = None
    ) -> Tensor:
        for i, res in enumerate(self.res):
            x = res(x, temb)
            if self.attn:
                x = self.attn[i](x, context)
            skips.append(x)
        if feature is not None and self.attn:
            x = skips[-1] = x + feature
        if self.down is not None:
            x = self.down(x)
            skips.append(x)
        if feature is not None and not self.attn:  # at half the size: T2I-Adapters for SDXL begin there
            x = skips[-1] = x + feature
        return x


class Middle(nn.Module):
    """Middle block at the coarsest resolution: ResBlock, attention, ResBlock; or one ResBlock, or nothing."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        layers, c = config.mid_layers, config.mid.channels
        self.res1 = res_block(config, c, config.mid) if layers > 0 else None
        self.attn = nn.ModuleList(attentions(config, config.mid, (config.mid.depth,)))
        self.res2 = res_block(config, c, config.mid) if layers > 1 else None

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None) -> Tensor:
        if self.res1 is not None:
            x = self.res1(x, temb)
        for attn in self.attn:
            x = attn(x, context)
        if self.res2 is not None:
            x = self.res2(x, temb)
        return x


class UpLevel(nn.Module):
    """One resolution on the way up: ResBlocks, each of which also takes a skip from the way down; then upsampling."""

    def __init__(self, config: UNetConfig, level: Level, channels: int, skips: list[int], *, last: bool) -> None:
        super().__init__()
        inputs = [channels] + [level.channels] * config.layers
        self.res = nn.ModuleList(res_block(config, c + s, level) for c, s in zip(inputs, skips, strict=True))
        self.attn = nn.ModuleList(attentions(config, level, config.up_depths(level)))
        self.up = None if last else Upsample(level.channels)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | None, skips: list[Tensor]) -> Tensor:
        for i, res in enumerate(self.res):
            x = res(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attn:
                x = self.attn[i](x, context)
        if self.up is not None:
            x = self.up(x, skips[-1].shape[-2:])
        return x


def skip_widths(config: UNetConfig) -> list[int]:
    """Return the channels of every skip, in the order of the way down."""
    widths = [config.levels[0].channels]
    for i, level in enumerate(config.levels):
        widths += [level.channels] * (config.layers + (i < len(config.levels) - 1))
    return widths


def res_block(config: UNetConfig, channels: int, level: Level) -> ResBlock:
    """Create a ResBlock from ``channels`` to the level's width, with this UNet's norms and time embedding."""
    return ResBlock(channels, level.channels, config.groups, config.eps, config.time_dim)


def attentions(config: UNetConfig, level: Level, depths: tuple[int, ...]) -> list[nn.Module]:
    """Create the attention modules of a level, one for each of ``depths``, or none."""
    if level.attention == "text":
        context = config.context_dim
        assert context is not None  # UNetConfig checks it
        each = [replace(level, depth=depth) for depth in depths]
        return [SpatialTransformer(one, context, config.groups, config.linear_proj) for one in each]
    if level.attention == "self":
        return [SpatialSelfAttention(level.channels, level.heads, config.groups, config.eps) for _ in depths]
    return []
