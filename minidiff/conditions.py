"""The UNet with everything bound but picture and time: what :func:`minidiff.denoise.denoise` calls at every step.

Classifier-free guidance needs two predictions, one with the prompt and one with the negative prompt (Ho & Salimans
2022). They are computed in one batch, the negative half first: the bits of a batch depend on its size and order. A
model that was distilled for few steps (LCM, Luo et al. 2023) has learned the guided prediction itself, and is told the
scale instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.denoise import Predict, Prediction
from minidiff.guidance import guide, rescale
from minidiff.models.unet import UNet


class Conditions(NamedTuple):
    """For every image of a batch: ``context`` (B, L, D); ``pooled`` (B, D') and ``ids`` (B, 5 or 6) of SDXL."""

    context: Tensor
    pooled: Tensor | None = None
    ids: Tensor | None = None

    @property
    def added(self) -> tuple[Tensor, Tensor] | None:
        """Pooled text and sizes as the UNet takes them."""
        return None if self.pooled is None or self.ids is None else (self.pooled, self.ids)

    def after(self, first: Conditions) -> Conditions:
        """One batch of twice the size, ``first`` in front."""
        pairs = zip(first, self, strict=True)
        return Conditions(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]


def predictor(
    unet: UNet,
    positive: Conditions,
    negative: Conditions | None,
    scale: float,
    beside: Tensor | None = None,
    rescaled: float = 0.0,
) -> Predict:
    """(scaled x, t) -> :class:`Prediction`; guided by ``scale`` where there is a ``negative``.

    ``beside`` (B, C', h, w): what the UNet reads in further channels, mask and masked picture. ``rescaled``: how much
    of the spread that guidance adds is taken back (:func:`~minidiff.guidance.rescale`).
    """
    guidance: Tensor | None = None
    if unet.config.guidance_dim is not None:
        guidance = guidance_code(scale, unet.config.guidance_dim).to(positive.context).expand(len(positive.context), -1)

    def widen(x: Tensor, beside: Tensor | None) -> Tensor:
        return x if beside is None else torch.cat([x, beside], dim=1)

    if negative is None:
        return lambda x, t: Prediction(unet(widen(x, beside), t, positive.context, positive.added, guidance))

    both = positive.after(negative)
    twice = None if beside is None else torch.cat([beside, beside])

    def predict(x: Tensor, t: Tensor) -> Prediction:
        out = unet(widen(torch.cat([x, x]), twice), t, both.context, both.added)
        unconditional, conditional = out.chunk(2)
        guided = guide(unconditional, conditional, scale)
        if rescaled > 0:
            guided = rescale(guided, conditional, rescaled)
        return Prediction(guided, conditional, unconditional)

    return predict


def guidance_code(scale: float, dim: int) -> Tensor:
    """The sinusoid of a guidance scale, (1, dim), for a UNet that is told it (Meng et al. 2023, section 3; Luo et al.
    2023). It codes 1000 * w with w = scale - 1, the scale as the authors count it; an odd ``dim`` ends in a 0."""
    w = torch.tensor(scale - 1, dtype=torch.float32, device="cpu") * 1000.0
    half = dim // 2
    # not by math.log: rounded to float32 before the division, as the reference does
    step = torch.log(torch.tensor(10000.0, dtype=torch.float32, device="cpu")) / (half - 1)
    angles = w * torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * -step)[None]
    code = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(code, (0, dim % 2))
