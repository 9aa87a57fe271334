"""Weights that are stored in the layout that the processor's kernels read: convolutions, and :mod:`linear` layers.

oneDNN, which computes convolutions on a CPU, reads weights in its own blocked layout. torch keeps them in rows and has
them rearranged in every call, which takes longer than the convolution if the picture is small and the weight large.
Here it is done once, at the first call, when the size of the picture is known. The rearranged weight replaces the plain
one, so no memory is lost, and converting it back restores the same bits, since nothing is computed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.switch import Switch
from minidiff.models.replacement import PREPARING, Replacement

SMALLEST = 2**16  # weights: with fewer, the rearrangement costs too little to matter


class Packed(Switch):
    """Switch that packs the weight of every large convolution. CPU only; float32, and bfloat16 where
    oneDNN has it."""

    device = "cpu"

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size != (1, 1)  # a matrix product, whose plain kernel is as fast and more exact
            and layer.weight.numel() >= SMALLEST
            and layer.weight.device.type == "cpu"
            and layer.padding_mode == "zeros"
            and onednn.available(layer.weight.dtype)
        )

    def put_on(self, layer: nn.Module) -> None:
        PackedConvolution(layer)

    def take_off(self, layer: nn.Module) -> None:
        PackedConvolution.take_off(layer)


class Packing(Replacement):
    """Base class of replacements for the ``forward`` of a layer that store its weight in the processor's layout."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.trained = layer.get_parameter("weight").requires_grad
        super().__init__(layer, name)
        # The layer's state dict (for saving, copying) has the plain weight.
        layer.register_state_dict_post_hook(_plain_state)  # type: ignore[no-untyped-call]

    @abstractmethod
    def arranged(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return ``weight`` in the layout for an input like ``x``."""

    def packed(self, x: Tensor) -> Tensor:
        """Return the packed weight, which replaces the plain one at the first call, and after the layer was given
        another weight."""
        weight = self.layer.get_parameter("weight")
        return weight if weight.is_mkldnn else self.pack(x)

    def pack(self, x: Tensor) -> Tensor:
        """Replace the layer's weight by a packed one, unless another thread just has; return the packed weight."""
        with PREPARING:
            plain = self.layer.get_parameter("weight")
            if plain.is_mkldnn:
                return plain
            packed = nn.Parameter(self.arranged(plain.detach(), x), requires_grad=False)
            self.layer.weight = packed  # the plain one, which another thread may be reading, is left as it is
            return packed

    def undo(self) -> None:
        for key, hook in list(self.layer._state_dict_hooks.items()):
            if hook is _plain_state:
                del self.layer._state_dict_hooks[key]
        weight = self.layer.get_parameter("weight")
        if weight.is_mkldnn:
            self.layer.weight = nn.Parameter(weight.detach().to_dense(), requires_grad=self.trained)


class PackedConvolution(Packing):
    """Replacement for the ``forward`` of one convolution."""

    layer: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.packed(x)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
        )
        return out

    def arranged(self, weight: Tensor, x: Tensor) -> Tensor:
        layer = self.layer
        found: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, layer.padding, layer.stride, layer.dilation, layer.groups, tuple(x.shape)
        )
        return found


def _plain_state(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state[f"{prefix}weight"]
    if weight.is_mkldnn:
        state[f"{prefix}weight"] = weight.to_dense()
