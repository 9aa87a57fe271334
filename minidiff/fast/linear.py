"""Linear layers by oneDNN instead of MKL, where a trial shows that it is faster (:mod:`onednn`, :mod:`trial`).

The weight is unchanged. In bfloat16 torch uses oneDNN already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.switch import OFF, ON, MethodSwitch
from minidiff.models import attention
from minidiff.models.replacement import Replacement

SMALLEST = 2**14  # weights
ROWS = 32  # rows of the input: with fewer, the time is that of reading the weight


class OneDNNLinear(Replacement):
    """Replacement for the ``forward`` of one linear layer; few rows go to the original."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() < ROWS * x.shape[-1] or torch.is_grad_enabled():
            out: Tensor = self.inner(x)
            return out
        layer = self.layer
        assert isinstance(layer, nn.Linear)
        return onednn.product(x, layer.weight, layer.bias)


class Linear(MethodSwitch):
    """Switch of every large linear layer. CPU and float32 only."""

    replacement = OneDNNLinear
    device = "cpu"
    tried = "linear"

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and type(layer) in (nn.Linear, attention.Linear)
            and layer.weight.numel() >= SMALLEST
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.float32
            and onednn.available()
        )


def ways(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Set up a trial: the product into a feed-forward network at 32 x 32 tokens, by MKL and by oneDNN."""
    x, weight = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((1024, 640), (2560, 640)))
    found: dict[str, Callable[[], object]] = {OFF: partial(F.linear, x, weight)}
    if dtype == torch.float32 and onednn.pays():
        found[ON] = partial(onednn.product, x, weight)
    return found
