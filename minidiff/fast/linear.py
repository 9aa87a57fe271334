"""Linear layers by oneDNN, with packed weights, where a trial shows that it is faster (:mod:`onednn`, :mod:`trial`).

For float32 torch calls MKL otherwise. In bfloat16 it calls oneDNN, but has the weight rearranged in every call, which
costs 5 to 25 % of a product of a thousand rows. The rearranged weight replaces the plain one (:mod:`packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.packed import Packing
from minidiff.fast.switch import OFF, ON, MethodSwitch
from minidiff.models import attention

SMALLEST = 2**14  # weights
ROWS = 32  # rows of the input: with fewer, the time is that of reading the weight
MANY = 256  # rows from which on the weight is packed: not for a prompt, whose keys and values are computed once


class PackedLinear(Packing):
    """Replacement for the ``forward`` of one linear layer; few rows are multiplied as in the original.

    Which of the two it is follows from the input alone, not from what the layer, or another thread, did before: the two
    libraries add in another order, while a weight gives the same bits packed and plain.
    """

    layer: nn.Linear

    def __call__(self, x: Tensor) -> Tensor:
        rows, layer = x.numel() // x.shape[-1], self.layer
        weight = layer.weight  # read once: another thread may pack it at any time
        if not torch.is_grad_enabled() and rows >= ROWS:
            return onednn.product(x, self.packed(x) if rows >= MANY else weight, layer.bias)
        plain = weight.to_dense() if weight.is_mkldnn else weight
        return layer.product(x, plain) if isinstance(layer, attention.Linear) else F.linear(x, plain, layer.bias)

    def arranged(self, weight: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])
        return found


class Linear(MethodSwitch):
    """Switch of every large linear layer. CPU only; float32, and bfloat16 where oneDNN has it."""

    replacement = PackedLinear
    device = "cpu"
    tried = "linear"

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and type(layer) in (nn.Linear, attention.Linear)
            and layer.weight.numel() >= SMALLEST
            and layer.weight.device.type == "cpu"
            and onednn.available(layer.weight.dtype)
        )


def ways(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Set up a trial: the product into a feed-forward network at 32 x 32 tokens, by torch and by oneDNN."""
    x = torch.ones(1024, 640, dtype=dtype, device="cpu")
    plain, layer = (onednn.of_ones(nn.Linear(640, 2560, device="meta", dtype=dtype)) for _ in range(2))
    found: dict[str, Callable[[], object]] = {OFF: partial(plain, x)}
    if onednn.pays(dtype):
        found[ON] = partial(PackedLinear(layer), x)
    return found
