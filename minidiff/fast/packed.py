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
from minidiff.models.around import PREPARING, Around

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
        Packed(layer)

    def take_off(self, layer: nn.Module) -> None:
        Packed.take_off(layer)


class Packed(Around):
    """Replacement for the ``forward`` of one convolution."""

    def __init__(self, layer: nn.Module) -> None:
        self.trained = layer.get_parameter("weight").requires_grad
        super().__init__(layer)
        # As a state dict (saving, copying) the layer has its plain weight.
        layer.register_state_dict_post_hook(_plain_state)  # type: ignore[no-untyped-call]

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight
        if not weight.is_mkldnn:  # at the first call, and after someone gave the layer another weight
            weight = self.pack(layer, x)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
        )
        return out

    def pack(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """Put a packed weight in the place of the layer's, unless another thread just has; which it is."""
        with PREPARING:
            plain = layer.weight
            if plain.is_mkldnn:
                return plain
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                plain.detach(), layer.padding, layer.stride, layer.dilation, layer.groups, tuple(x.shape)
            )
            layer.weight = nn.Parameter(packed, requires_grad=False)
            plain.data = plain.data.new_empty(0)  # where parts take turns, the place of the weight still holds it
            return layer.weight

    def undo(self) -> None:
        for key, hook in list(self.layer._state_dict_hooks.items()):
            if hook is _plain_state:
                del self.layer._state_dict_hooks[key]
        weight = self.layer.get_parameter("weight")
        if weight.is_mkldnn:
            self.layer.weight = nn.Parameter(weight.detach().to_dense(), requires_grad=self.trained)


def _plain_state(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state[f"{prefix}weight"]
    if weight.is_mkldnn:
        state[f"{prefix}weight"] = weight.to_dense()
