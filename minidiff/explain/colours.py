"""Colours of a sample as a linear function of its numbers, so that a script can show any mixture of samples at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = 3, 4  # of the square of latents that colours are fitted to, and of the square of pixels that one latent becomes


@dataclass(frozen=True, eq=False)
class Colours:
    """Linear map from samples to pictures: the ``side`` x ``side`` numbers of each channel around a place, and 1, give
    the ``block`` x ``block`` pixels that stand there. ``map``: (C * side**2 + 1, 3 * block**2)."""

    side: int
    block: int
    map: Tensor

    @classmethod
    def fitted(cls, samples: list[Tensor], pictures: list[Tensor]) -> Colours:
        """Return the best map by least squares, for samples (1, C, h, w) and their pictures (3, H, W)."""
        height, width = int(samples[0].shape[2]), int(samples[0].shape[3])
        sharp = pictures[0].shape[1] >= SIDES[1] * height
        side, block = SIDES if sharp else (1, 1)
        features = torch.cat([around(s, side) for s in samples])
        pooled = [F.adaptive_avg_pool2d(p[None], (height * block, width * block)) for p in pictures]
        wanted = torch.cat([F.pixel_unshuffle(p, block)[0].flatten(1).t() for p in pooled])
        return cls(side, block, torch.linalg.lstsq(features, wanted).solution)


def around(sample: Tensor, side: int) -> Tensor:
    """Return the numbers around each place of (1, C, h, w), zeros beyond the edges, and 1: (h * w, C * side**2 + 1)."""
    columns = F.unfold(sample.float().cpu(), side, padding=side // 2)[0].t()
    return F.pad(columns, (0, 1), value=1.0)
