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
from dataclasses import dataclass, field
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

    @staticmethod
    def joined(each: Sequence[Conditions]) -> Conditions:
        """Concatenate several batches into one."""
        fields = zip(*each, strict=True)
        return Conditions(*(None if any(part is None for part in parts) else torch.cat(parts) for parts in fields))  # type: ignore[arg-type]


def predictor(
    unet: Network,
    positive: Sequence[Conditions],
    negative: Conditions | None,
    scale: float,
    beside: Tensor | None = None,
    rescaled: float = 0.0,
    weights: Sequence[Sequence[float]] | None = None,
) -> Predict:
    """Return a function (scaled x, t) -> :class:`Prediction`, guided by ``scale`` if ``negative`` is given.

    ``positive``: one conditional, or several with ``weights`` (for each a number a picture): see :func:`compose`.
    ``beside`` (B, C', h, w): further input channels of the UNet, mask and masked picture. ``rescaled``: the amount of
    guidance rescaling (:func:`~minidiff.pipeline.guidance.rescale`).
    """
    batches = [*positive] if negative is None else [negative, *positive]
    conditions = batches[0] if len(batches) == 1 else Conditions.joined(batches)
    guidance: Tensor | None = None
    if unet.config.guidance_dim is not None:
        code = guidance_code(scale, unet.config.guidance_dim)
        guidance = code.to(conditions.context).expand(len(conditions.context), -1)

    def each(x: Tensor) -> Tensor:
        return x if len(batches) == 1 else torch.cat([x] * len(batches))

    wide = None if beside is None else each(beside)

    def call(x: Tensor, t: Tensor) -> Sequence[Tensor]:
        rows = each(x) if wide is None else torch.cat([each(x), wide], dim=1)
        return unet(rows, t, conditions.context, conditions.added, guidance).chunk(len(batches))

    if weights is not None:
        return compose(call, weights, scale, guided=negative is not None, rescaled=rescaled)
    if negative is None:
        return lambda x, t: Prediction(*call(x, t))

    def predict(x: Tensor, t: Tensor) -> Prediction:
        unconditional, conditional = call(x, t)
        guided = guide(unconditional, conditional, scale)
        if rescaled > 0:
            guided = rescale(guided, conditional, rescaled)
        return Prediction(guided, conditional, unconditional)

    return predict


def compose(
    call: Callable[[Tensor, Tensor], Sequence[Tensor]],
    weights: Sequence[Sequence[float]],
    scale: float,
    *,
    guided: bool,
    rescaled: float = 0.0,
) -> Predict:
    """Return a function (scaled x, t) -> :class:`Prediction` of u + scale * sum of w (c - u), over several conditionals
    c with weights w (composable diffusion, Liu et al. 2022, equation 11).

    ``call`` gives u and then every c. Unless ``guided`` it gives no u; then u is the first c, and the scale 1.
    """

    def total(base: Tensor, conditionals: Sequence[Tensor], scale: float) -> Tensor:
        out = base
        for conditional, own in zip(conditionals, weights, strict=True):
            # a picture at a time: its weight is a number, not a tensor that a card would have to wait for
            more = [(c - u) * (w * scale) for c, u, w in zip(conditional, base, own, strict=True)]
            out = out + torch.stack(more)
        return out

    def predict(x: Tensor, t: Tensor) -> Prediction:
        first, *others = call(x, t)
        if not guided:
            return Prediction(total(first, [first, *others], 1.0))
        conditional, out = total(first, others, 1.0), total(first, others, scale)
        return Prediction(rescale(out, conditional, rescaled) if rescaled > 0 else out, conditional, first)

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


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A model with what conditions it.

    ``predict`` and ``alone``, guided and with the prompt alone, take the UNet, which may be steered by controls, and
    further input channels (B, C', h, w) or None.
    ``told``: for each picture, the fields of its request that say so. ``text``: the model reads a prompt. ``guided``:
    the first prediction of ``predict`` is that without the prompt. ``later``:
    what conditions it instead at some model calls, counted from 0, where prompts change on the way.
    """

    predict: Callable[[Network, Tensor | None], Predict]
    alone: Callable[[Network, Tensor | None], Predict]
    told: Sequence[Mapping[str, Any]]
    text: bool
    guided: bool = False
    later: Mapping[int, Conditioned] = field(default_factory=dict)

    def at(self, call: int) -> Conditioned:
        """Return what conditions the model at that call."""
        return self.later.get(call, self)
