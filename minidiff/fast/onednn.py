"""Matrix products by oneDNN, torch's library for convolutions, on processors where it is the faster one.

For float32 matrix products torch calls MKL. On an AMD processor with AVX512, MKL reached 165 to 220 GFLOP/s, the rate
of AVX2, and oneDNN 250 to 490. With AVX2 alone neither is ahead. Therefore oneDNN is used if there is AVX512: the
choice depends on the processor alone, so the same processor always gives the same bits. On Intel processors, where MKL
may be as fast, this was not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pays(dtype: torch.dtype = torch.float32) -> bool:
    """Return True if oneDNN is the faster library on this processor.

    That is the case for float32 with AVX512, and for bfloat16 with instructions for it (AVX512_BF16, AMX), without
    which all computation in bfloat16 is slow.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_amx() -> bool:
    """Return True if the processor multiplies bfloat16 in tiles (AMX), as torch's own kernel of attention then does."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x`` (..., in) times the transpose of ``weight`` (out, in), plus ``bias`` (out,): (..., out).

    float32 on the CPU only, without gradients.
    """
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made
