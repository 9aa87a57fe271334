"""Decoding of one picture at a time, which trades time for memory.

The VAE's last levels take a gigabyte per picture of 512 x 512 in float32. The pictures of a batch are independent, so
each is decoded alone, and has the bits that it has alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.fast.switch import MethodSwitch
from minidiff.models.replacement import Replacement
from minidiff.models.taesd import TAESD
from minidiff.models.vae import VAE
from minidiff.pipeline.denoise import check_cancelled


class SlicedVAE(Replacement):
    """Replacement for the ``decode`` of a VAE."""

    def __call__(self, z: Tensor) -> Tensor:
        return torch.cat([self.one(z) for z in z.chunk(len(z))])

    def one(self, z: Tensor) -> Tensor:
        check_cancelled()
        return self.inner(z)  # type: ignore[no-any-return]


class VaeSlices(MethodSwitch):
    """Switch of every VAE."""

    replacement = SlicedVAE
    method = "decode"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, (VAE, TAESD))
