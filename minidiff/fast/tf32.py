"""Matrix products of float32 in TF32: the tensor cores of a CUDA card read 10 bits of the mantissa, and sum in float32.

Torch allows it for convolutions by default, and not for matrix products. It is a setting of the whole process; here it
holds while the model works, and is then as it was. Less exact, so it is on only where it is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minidiff.fast.switch import Around, Wrapping
from minidiff.models.unet import UNet
from minidiff.models.vae import Decoder, Encoder


class Allowed(Around):
    """The ``forward`` of one part."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return self.inner(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)


class TensorFloat32(Wrapping):
    """The UNet and both halves of the VAE. CUDA only; changes nothing in half precision."""

    around = Allowed
    device = "cuda"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, (UNet, Encoder, Decoder))
