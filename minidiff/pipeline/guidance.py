"""Classifier-free guidance (Ho & Salimans 2022): amplify the effect of the prompt.

The network predicts twice, with the prompt and with the negative (or empty) prompt. The guided prediction starts at the
second and goes ``scale`` times the difference towards the first. At scale 1 the negative prompt cancels out, at 0 the
prompt does.

Both predictions are computed in one batch, the negative half first, because the exact bits of a result depend on the
size and order of its batch. A model distilled for few steps (LCM, Luo et al. 2023) has learned the guided prediction
itself and takes the guidance scale as an input instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minidiff.config import UNetConfig
from minidiff.pipeline.job import Predict, Prediction


class Network(Protocol):
    """A UNet, or what is called as one and calls it (:class:`minidiff.adapters.control.SteeredUNet`)."""

    @property
    def config(self) -> UNetConfig:
        """Config of the UNet."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict, as :meth:`minidiff.models.unet.UNet.forward` does."""


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return u + scale * (c - u), all of the same shape (Ho & Salimans 2022, equation 6, with scale = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Rescale each guided prediction towards the standard deviation of the conditional one (Lin et al. 2023, 3.4).

    Strong guidance overexposes pictures. ``amount`` in [0, 1] is the share of the rescaled prediction in the result;
    the paper recommends 0.7.
    """
    axes = list(range(1, guided.ndim))
    std, wanted = guided.std(dim=axes, keepdim=True), conditional.std(dim=axes, keepdim=True)
    return amount * (guided * (wanted / std)) + (1 - amount) * guided


class Conditions(NamedTuple):
    """Conditioning of a batch: ``context`` (B, L, D); for SDXL also ``pooled`` (B, D') and ``ids`` (B, 5 or 6)."""

    context: Tensor
    pooled: Tensor | None = None
    ids: Tensor | None = None

    @property
    def added(self) -> tuple[Tensor, Tensor] | None:
        """Pooled text and sizes in the form that the UNet takes."""
        return None if self.pooled is None or self.ids is None else (self.pooled, self.ids)

    def after(self, first: Conditions) -> Conditions:
        """Concatenate ``first`` and this batch into one of twice the size."""
        pairs = zip(first, self, strict=True)
        return Conditions(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]


def predictor(
    unet: Network,
    positive: Conditions,
    negative: Conditions | None,
    scale: float,
    beside: Tensor | None = None,
    rescaled: float = 0.0,
) -> Predict:
    """Return a function (scaled x, t) -> :class:`Prediction`, guided by ``scale`` if ``negative`` is given.

    ``beside`` (B, C', h, w): further input channels of the UNet, mask and masked picture. ``rescaled``: the amount of
    guidance rescaling (:func:`~minidiff.pipeline.guidance.rescale`).
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
    """Return the sinusoidal embedding of a guidance scale, (1, dim), for a UNet that takes it as an input (Meng et al.
    2023, section 3; Luo et al. 2023). It encodes 1000 * w with w = scale - 1, the scale of the papers. An odd ``dim``
    is padded with a 0."""
    w = torch.tensor(scale - 1, dtype=torch.float32, device="cpu") * 1000.0
    half = dim // 2
    # torch.log, not math.log: the logarithm is rounded to float32 before the division, as in the reference
    step = torch.log(torch.tensor(10000.0, dtype=torch.float32, device="cpu")) / (half - 1)
    angles = w * torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * -step)[None]
    code = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(code, (0, dim % 2))


class Conditioned(NamedTuple):
    """A model with what conditions it.

    ``predict`` and ``alone``, guided and with the prompt alone, take the UNet, which may be steered by controls, and
    further input channels (B, C', h, w) or None.
    ``told``: for each picture, the fields of its request that say so. ``text``: the model reads a prompt.
    """

    predict: Callable[[Network, Tensor | None], Predict]
    alone: Callable[[Network, Tensor | None], Predict]
    told: Sequence[Mapping[str, Any]]
    text: bool
