"""One computation for both halves of a guided batch, as far as they are equal.

With guidance the UNet predicts without the prompt and with it, in one batch. Until the first cross-attention both
halves are the same numbers: the first convolution, the first ResBlock, and the first transformer's norms, projection
and self-attention, which is one of five at the largest size. They are computed for half of the batch, and the result
is repeated. Rows of a batch are independent, but their number decides which kernels run, so sums are added in another
order.

Whether the halves are equal, the time embedding included, is checked at each call. In SDXL only the first convolution
gains: its pooled text enters the first ResBlock. A ControlNet begins in the same way, with a picture that both halves
share. What controls add to the UNet comes behind its start.
"""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import Switch
from minidiff.models.attention import SpatialTransformer
from minidiff.models.replacement import Replacement
from minidiff.models.unet import WayDown


class ComputedOnce(Replacement):
    """Replacement for the ``forward`` of a layer on tensors (2 B, ...): equal halves are computed once.

    A layer that is watched by a hook, its own or that of a layer inside, computes the whole batch, so that recorders
    see the same shapes as without.
    """

    def __call__(self, *tensors: Any) -> Tensor:
        first = None if torch.is_grad_enabled() or watched(self.layer) else halves(tensors)
        if first is None:
            out: Tensor = self.inner(*tensors)
            return out
        once: Tensor = self.inner(*first)
        return torch.cat([once, once])


def halves(tensors: tuple[Any, ...]) -> list[Tensor] | None:
    """Return the first half of each of ``tensors`` (2 B, ...), if it equals the second in all of them."""
    found = []
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or len(tensor) % 2 == 1:
            return None
        one, two = tensor.chunk(2)
        if not torch.equal(one, two):
            return None
        found.append(one)
    return found


def watched(layer: nn.Module) -> bool:
    """Return True if a forward hook is on ``layer`` or on a layer inside it, other than one of another thread."""
    here = get_ident()
    tables = (table for m in layer.modules() for table in (m._forward_hooks, m._forward_pre_hooks) if table)
    return any(getattr(hook, "thread", here) == here for table in tables for hook in list(table.values()))


def start_of(unet: WayDown) -> list[nn.Module]:
    """Return the layers before the first cross-attention; empty for a network that reads no prompt."""
    if unet.config.context_dim is None:
        return []
    first: Any = unet.down[0]
    layers: list[nn.Module] = [unet.conv_in, first.res[0]]
    transformer = next(iter(first.attn), None)
    if isinstance(transformer, SpatialTransformer):
        block: Any = transformer.blocks[0]
        layers += [transformer.norm, transformer.proj_in, block.norm1, block.attn1]
    return layers


class SharedStart(Switch):
    """Switch of a UNet or ControlNet that reads a prompt. CPU only; on a card the comparison would wait for it."""

    device = "cpu"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, WayDown) and bool(start_of(layer))

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, WayDown)
        for part in start_of(layer):
            ComputedOnce(part)

    def take_off(self, layer: nn.Module) -> None:
        assert isinstance(layer, WayDown)
        for part in start_of(layer):
            ComputedOnce.take_off(part)
