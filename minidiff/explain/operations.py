"""Floating-point operations of a UNet's modules in one call.

Convolutions and matrix products are counted, since all others are few. A multiplication and its addition count as two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

from minidiff.models.attention import Attention

Add = Callable[[str, int], None]


def count_in(unet: nn.Module, counts: Counter[str]) -> list[Callable[[], None]]:
    """Let calls of ``unet``, which must be the caller's own, add to ``counts``: the operations of every module by name,
    those inside of it included. Return what undoes it, in order."""

    def add(name: str, count: int) -> None:
        while name:
            counts[name] += count
            name = name.rpartition(".")[0]

    undo: list[Callable[[], None]] = []
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            undo.append(layer.register_forward_hook(_products(name, add)).remove)
        elif isinstance(layer, Attention):
            undo.append(_attention(name, layer, add))
    return undo


def _products(name: str, add: Add) -> Callable[[nn.Module, object, Tensor], None]:
    def after(layer: nn.Module, args: object, out: Tensor) -> None:
        weight = layer.get_parameter("weight")  # perhaps packed, and without rows that can be taken
        add(name, 2 * out.numel() * (weight.numel() // len(weight)))  # an output sums over a row of the weight

    return after


def _attention(name: str, layer: Attention, add: Add) -> Callable[[], None]:
    """Count q k^T and its product with v."""
    inner = layer.kernel

    def counted(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        add(name, 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return inner(q, k, v, causal)

    def undo() -> None:
        layer.kernel = inner

    layer.kernel = counted
    return undo
