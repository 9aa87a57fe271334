"""Convolutions whose weight lies in memory as the processor's kernels read it.

oneDNN, which computes the convolutions of a CPU, reads weights in blocks of its own layout. Torch keeps them in rows
and has them rearranged at every call, and where the picture is small and the weight large, that takes longer than the
convolution. Here it is done once, when the first picture comes and its size is known. The rearranged weight takes the
place of the plain one, so no memory is lost, and going back gives the same bits: nothing is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import Switch

SMALLEST = 2**16  # weights: below it a rearrangement costs nothing worth saving


class PackedConvolutions(Switch):
    """Every large convolution of a model gets its weight packed. CPU only; float32, and bfloat16 where torch can."""

    device = "cpu"

    def applies(self, layer: nn.Module) -> bool:
        return (
            torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and isinstance(layer, nn.Conv2d)
            and layer.kernel_size != (1, 1)  # a matrix product, whose plain kernel is as fast and sums more exactly
            and layer.weight.numel() >= SMALLEST
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype in (torch.float32, torch.bfloat16)
            and layer.padding_mode == "zeros"
        )

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Conv2d)
        layer.forward = Packed(layer)  # type: ignore[method-assign,assignment]

    def take_off(self, layer: nn.Module) -> None:
        packed = layer.__dict__.pop("forward")
        assert isinstance(packed, Packed)
        packed.unpack()


class Packed:
    """What stands in for the ``forward`` of one convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self.trained = layer.weight.requires_grad
        # As a state dict (saving, copying) the layer has its plain weight.
        self.hook = layer.register_state_dict_post_hook(_plain_state)  # type: ignore[no-untyped-call]

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.weight.is_mkldnn:  # at the first call, and after someone gave the layer another weight
            self.pack(x)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
        )
        return out

    def pack(self, x: Tensor) -> None:
        layer = self.layer
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            layer.weight.detach(), layer.padding, layer.stride, layer.dilation, layer.groups, tuple(x.shape)
        )
        plain, layer.weight = layer.weight, nn.Parameter(packed, requires_grad=False)
        plain.data = plain.data.new_empty(0)  # where parts take turns, the place of the weight still holds it

    def unpack(self) -> None:
        self.hook.remove()
        weight = self.layer.weight
        if weight.is_mkldnn:
            self.layer.weight = nn.Parameter(weight.detach().to_dense(), requires_grad=self.trained)


def _plain_state(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state[f"{prefix}weight"]
    if weight.is_mkldnn:
        state[f"{prefix}weight"] = weight.to_dense()
