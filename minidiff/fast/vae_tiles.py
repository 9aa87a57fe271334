"""Decoding in overlapping tiles that are blended. APPROXIMATE: for pictures that do not fit in memory otherwise.

The memory for decoding grows with the picture; with tiles it is that of one tile for any size. But every group norm of
the decoder uses mean and variance of the whole picture, and the attention in its middle block sees all of it. A tile
sees only itself, so colours and contrast shift a little from tile to tile. Blending hides the seams, not the shift.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.models.replacement import Replacement
from minidiff.models.undo import surely
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.denoise import check_cancelled
from minidiff.pipeline.model import Model

NAME = "vae_tiles"  # in the recipe


def tiled(pipe: Pipeline, side: int = 64) -> None:
    """Let ``pipe`` decode in tiles of ``side`` x ``side`` latents (64 are 512 pixels) that overlap by a quarter.

    A picture that fits in one tile is decoded whole, and exactly. Otherwise this is approximate, and noted in the
    recipes of the pictures. Another call changes the size of the tiles; ``fast.restore`` turns them off. Raises
    :class:`ConfigError` for a model without a VAE, and for a ``side`` below 4.
    """
    check("vae" in pipe.parts, f"a {pipe.config.family} model has no VAE that could decode in tiles")
    check(isinstance(side, int) and side >= 4, f"side={side!r} of a tile must be a whole number of latents, at least 4")
    whole(pipe)
    try:
        pipe.approximations[NAME] = side
        VaeTiles(pipe.parts["vae"], side, side // 4)
    except BaseException:
        surely(lambda: whole(pipe))
        raise


def whole(pipe: Model) -> None:
    """Let ``pipe`` decode whole pictures again."""
    if NAME in pipe.approximations:
        VaeTiles.take_off(pipe.parts["vae"], "decode")
        pipe.approximations.pop(NAME, None)


class VaeTiles(Replacement):
    """Replacement for the ``decode`` of a VAE."""

    def __init__(self, vae: nn.Module, side: int, overlap: int) -> None:
        self.side, self.overlap = side, overlap
        super().__init__(vae, "decode")

    def __call__(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w) to (B, 3, H, W): the mean of the tiles at each pixel, weighted less near their edges."""
        height, width = z.shape[-2:]
        if height <= self.side and width <= self.side:
            return self.inner(z)  # type: ignore[no-any-return]
        tile: Tensor = self.inner(z[..., : self.side, : self.side])
        factor = tile.shape[-1] // min(self.side, width)
        total: Tensor = tile.new_zeros(*tile.shape[:2], height * factor, width * factor)
        weights: Tensor = tile.new_zeros(total.shape[2:])
        for top in self.starts(height):
            for left in self.starts(width):
                if (top, left) != (0, 0):
                    check_cancelled()
                    tile = self.inner(z[..., top : top + self.side, left : left + self.side])
                rows = self.ramp(top, height, tile.shape[2], factor, tile.device)
                columns = self.ramp(left, width, tile.shape[3], factor, tile.device)
                counts = (rows[:, None] * columns).to(tile.dtype)
                y, x = (slice(at * factor, at * factor + len(ramp)) for at, ramp in ((top, rows), (left, columns)))
                total[..., y, x] += tile * counts
                weights[y, x] += counts
        return total / weights

    def starts(self, size: int) -> list[int]:
        """Return the starts of the tiles along ``size`` latents. The last ends with the picture, and overlaps more."""
        return [*range(0, max(size - self.side, 0), self.side - self.overlap), max(size - self.side, 0)]

    def ramp(self, start: int, size: int, pixels: int, factor: int, device: torch.device) -> Tensor:
        """Return the weights of a tile's ``pixels``: 1, falling towards an edge inside the picture."""
        i = torch.arange(pixels, dtype=torch.float32, device=device)
        shared = self.overlap * factor
        counts = torch.ones_like(i)
        if start > 0:
            counts = counts.minimum((i + 0.5) / shared)
        if start + self.side < size:
            counts = counts.minimum((pixels - i - 0.5) / shared)
        return counts
