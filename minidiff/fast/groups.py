"""Large pictures of one batch computed a few at a time, on a CPU.

Activations grow with the batch. Where those of a whole batch leave the caches, and are too large for the allocator to
keep their memory from one layer to the next, a batch takes longer than its pictures one after the other. Its rows are
independent, so it is split; the bits are then those of the smaller batches. Small pictures gain by being together, and
stay so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.fast.halves import cut, joined
from minidiff.fast.kept import Kept
from minidiff.fast.shared_start import watched
from minidiff.fast.switch import Switch
from minidiff.models.replacement import Replacement
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.pipeline.denoise import check_cancelled
from minidiff.pipeline.group_sizes import decoded_at_once, rows_at_once


class Parts(NamedTuple):
    """Rows of each group, and an encoded prompt (B, L, D) cut into these."""

    groups: list[Tensor]
    parts: list[Tensor]

    def fit(self, groups: list[Tensor]) -> bool:
        return len(self.groups) == len(groups) and all(map(torch.equal, self.groups, groups))


class GroupedUNet(Replacement):
    """Replacement for the ``forward`` of a UNet."""

    layer: UNet

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.known = Kept[Parts]()  # by encoded prompt
        super().__init__(layer, name)

    def __call__(self, x: Tensor, t: Any, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        groups = self.groups(x)
        if len(groups) == 1 or torch.is_grad_enabled() or watched(self.layer):
            return self.inner(x, t, context, *args, **kwargs)
        parts = [None] * len(groups) if context is None else self.parts(context, groups, len(x))
        made = []
        for rows, part in zip(groups, parts, strict=True):
            check_cancelled()
            few, time, more, named = cut((x, t, args, kwargs), rows, len(x))
            made.append(self.inner(few, time, part, *more, **named))
        out = made[0]
        for other in made[1:]:
            out = joined(out, other)
        return out[torch.cat(groups).argsort()]

    def groups(self, x: Tensor) -> list[Tensor]:
        """Return the rows of each group of ``x`` (B, C, H, W). Both predictions of a guided picture are in one."""
        once = x.chunk(2) if len(x) % 2 == 0 else (x,)
        halves = 2 if len(once) == 2 and torch.equal(*once) else 1
        few = rows_at_once(self.layer.config, x[0, 0].numel(), x.element_size(), halves) // halves
        pictures = len(x) // halves
        return [
            torch.cat([some + k * pictures for k in range(halves)]) for some in torch.split(torch.arange(pictures), few)
        ]

    def parts(self, context: Tensor, groups: list[Tensor], batch: int) -> list[Tensor]:
        """Cut an encoded prompt (B, L, D), once a run: its keys and values are kept with the tensor (:mod:`memory`)."""
        known = None if context.is_inference() else self.known.find(context)
        if known is None or not known.fit(groups):
            known = Parts(groups, [cut(context, rows, batch) for rows in groups])
            if not context.is_inference():
                self.known.keep(context, known)
        return known.parts


class GroupedVAE(Replacement):
    """Replacement for the ``decode`` of a VAE."""

    layer: VAE

    def __call__(self, z: Tensor) -> Tensor:
        few = decoded_at_once(self.layer.config, z[0, 0].numel(), z.element_size())
        if len(z) <= few or torch.is_grad_enabled() or watched(self.layer):
            return self.inner(z)  # type: ignore[no-any-return]
        return torch.cat([self.group(part) for part in torch.split(z, few)])

    def group(self, z: Tensor) -> Tensor:
        """Decode a few latents (b, C, h, w) to pixels (b, 3, H, W)."""
        check_cancelled()
        return self.inner(z)  # type: ignore[no-any-return]


class Groups(Switch):
    """Switch of a UNet and of a VAE's decoder. CPU only."""

    device = "cpu"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, (UNet, VAE)) and next(layer.parameters()).device.type == "cpu"

    def put_on(self, layer: nn.Module) -> None:
        if isinstance(layer, UNet):
            GroupedUNet(layer)
        else:
            GroupedVAE(layer, "decode")

    def take_off(self, layer: nn.Module) -> None:
        GroupedUNet.take_off(layer)
        GroupedVAE.take_off(layer, "decode")
