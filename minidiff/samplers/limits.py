"""Limits on the estimate x0, for models that work on pixels.

Pixels lie in -1..1, so an x0 outside that range is wrong and may be clamped. Latents have no such bound: leave both
limits off for Stable Diffusion. Dynamic thresholding (Saharia et al. 2022, section 2.3) goes further, for large
guidance scales: the bound is a high percentile of |x0| in each image, and x0 is divided by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.checks import PURE_NOISE
from minidiff.samplers.method import Method, Plan, R, S
from minidiff.samplers.options import AboveZero, Rule


@dataclass(frozen=True, kw_only=True)
class Clipped(Method[R, S]):
    """Base class of methods that may clamp x0 to -``clip``..``clip`` (None: no clamp)."""

    clip: AboveZero = None

    def limit(self, x0: Tensor) -> Tensor:
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


@dataclass(frozen=True, kw_only=True)
class Thresholded(Method[R, S]):
    """Base class of methods that may threshold x0. ``threshold``: percentile of dynamic thresholding as a fraction,
    0.995 in the paper (None: no thresholding); the bound lies in 1..``threshold_max``."""

    threshold: Annotated[float | None, Rule(lambda v: 0 <= v <= 1, "is a fraction: it must lie in 0..1")] = None
    threshold_max: float = 1.0

    def limit(self, x0: Tensor) -> Tensor:
        if self.threshold is None:
            return super().limit(x0)
        return dynamic_threshold(x0, self.threshold, self.threshold_max)


@dataclass(frozen=True, kw_only=True)
class Limited(Thresholded[R, S], Clipped[R, S]):
    """Base class of methods that may do either. A threshold takes precedence over the clamp."""

    @property
    def bounds_infinity(self) -> bool:
        """Return True if the limits make an infinite x0 finite."""
        return self.clip is not None and self.threshold is None

    def denoised(self, plan: Plan[R], i: int, x: Tensor, out: Tensor, state: S) -> Tensor:
        """Return x0, within the limits. Raises ConfigError if it is 0 / 0, which no clamp bounds: in the first row of a
        zero-SNR schedule, if an epsilon model returns exactly the noise that it sees."""
        x0 = super().denoised(plan, i, x, out, state)
        if i == 0 and plan.prediction == "epsilon" and plan.from_noise:
            known = not bool(x0.isnan().any())
            check(known, f"{self.name}: x0 is 0 / 0 where the model's answer equals x, {PURE_NOISE}")
        return x0


def dynamic_threshold(x0: Tensor, fraction: float, maximum: float) -> Tensor:
    """Clamp each image of ``x0`` (B, ...) to its own bound s, the ``fraction`` quantile of |x0| kept within
    1..maximum, and divide by s. Computed in float32, returned in the dtype of ``x0``."""
    wide = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    flat = wide.reshape(len(x0), -1)
    s = torch.quantile(flat.abs(), fraction, dim=1).clamp(min=1, max=maximum)[:, None]
    return (torch.clamp(flat, -s, s) / s).reshape(x0.shape).to(x0.dtype)
