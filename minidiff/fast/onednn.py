"""Matrix products by oneDNN, torch's library for convolutions, on processors where it is the faster one.

For float32 matrix products torch calls MKL. On an AMD processor with AVX512, MKL reached 165 to 220 GFLOP/s, the rate
of AVX2, and oneDNN 250 to 490; on an Intel processor with AMX the two were 70 to 110 and 90 to 125. With AVX2 alone
neither is ahead. :mod:`trial` decides for a machine where it was tried; elsewhere the rule below does.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Return True if torch was built with oneDNN, and that has ``dtype``, float32 or bfloat16, on this processor.

    With AVX2 alone it has no bfloat16: torch computes such layers in another way, and refuses to pack their weights.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pays(dtype: torch.dtype = torch.float32) -> bool:
    """Return True if oneDNN may be the faster library on this processor: no kernel of its is tried elsewhere.

    That is the case for float32 with AVX512, and for bfloat16 with instructions for it (AVX512_BF16, AMX), without
    which all computation in bfloat16 is slow.
    """
    if not available(dtype):
        return False
    if dtype == torch.bfloat16:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, function: str = "none") -> Tensor:
    """Compute ``function`` of ``x`` (..., in) times the transpose of ``weight`` (out, in), plus ``bias`` (out,):
    (..., out).

    On the CPU only, without gradients. ``weight`` may be packed (:mod:`packed`). ``function``: "none", or one that
    oneDNN applies before the product is written, such as "sigmoid".
    """
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, function, [], "")
    return made


@torch.no_grad()
def of_ones(layer: Layer) -> Layer:
    """Return ``layer``, made on the meta device, on the CPU with weights of 1: a trial draws no random numbers, which
    are those of the whole process."""
    layer.to_empty(device="cpu")
    for weight in layer.parameters():
        weight.fill_(1)
    return layer
