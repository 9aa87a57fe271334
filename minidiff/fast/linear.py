"""Linear layers by oneDNN instead of MKL, where oneDNN is faster (see :mod:`minidiff.fast.onednn`).

The weight is unchanged. In bfloat16 torch uses oneDNN already.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.switch import MethodSwitch
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
    """Switch of every large linear layer. CPU and float32 only, and only with AVX512."""

    replacement = OneDNNLinear
    device = "cpu"

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and type(layer) in (nn.Linear, attention.Linear)
            and layer.weight.numel() >= SMALLEST
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.float32
            and onednn.pays()
        )
