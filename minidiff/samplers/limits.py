"""Keeping the estimate of the picture in range, for models that work on pixels.

Pixels lie in -1..1, so an x0 outside is known to be wrong and may be clamped. Latents have no such bound: for Stable
Diffusion leave both limits off. Dynamic thresholding (Saharia et al. 2022, section 2.3) goes further for large
guidance scales: it takes a high percentile of |x0| in each image as the bound, and divides by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Options


@dataclass(frozen=True, kw_only=True)
class LimitedOptions(Options):
    """Options of samplers that may limit x0.

    ``clip`` clamps to -clip..clip (None: no clamp). ``threshold`` is the percentile of dynamic thresholding as a
    fraction, 0.995 in the paper (None: none; it goes before ``clip``); its bound lies in 1..``threshold_max``.
    """

    clip: float | None = None
    threshold: float | None = None
    threshold_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.clip is None or self.clip > 0, f"clip={self.clip} must be positive, or None")
        fits = self.threshold is None or 0 <= self.threshold <= 1
        check(fits, f"threshold={self.threshold} is a fraction: it must lie in 0..1")

    @property
    def survives_pure_noise(self) -> bool:
        """Whether an x0 of plus or minus infinity comes out finite."""
        return self.clip is not None and self.threshold is None

    def limit(self, x0: Tensor) -> Tensor:
        """``x0`` (B, ...) within the chosen limits."""
        if self.threshold is not None:
            return dynamic_threshold(x0, self.threshold, self.threshold_max)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


def dynamic_threshold(x0: Tensor, fraction: float, maximum: float) -> Tensor:
    """Clamp each image of ``x0`` (B, ...) to its own bound s, the ``fraction`` quantile of |x0| kept within
    1..maximum, and divide by s. Computed in float32, returned in the dtype of ``x0``."""
    wide = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    flat = wide.reshape(len(x0), -1)
    s = torch.quantile(flat.abs(), fraction, dim=1).clamp(min=1, max=maximum)[:, None]
    return (torch.clamp(flat, -s, s) / s).reshape(x0.shape).to(x0.dtype)
