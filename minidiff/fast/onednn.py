"""Use of oneDNN, torch's library for convolutions, where it is faster, and its matrix products in float32.

For products of float32 matrices torch calls MKL, which comes from the maker of one kind of processor: on another that
has AVX512, MKL was measured at 165 to 220 GFLOP/s, the rate of AVX2, where oneDNN reached 250 to 490. With AVX2 alone
neither is ahead. So the rule is AVX512: which library is asked follows from the processor, and the same processor
always gives the same bits. That processor was AMD's; on Intel's, where MKL may be as fast, it was not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pays(dtype: torch.dtype = torch.float32) -> bool:
    """Return True if oneDNN is the faster library on this processor: for float32 with AVX512, for bfloat16 with
    instructions for it (AVX512_BF16, AMX), without which all computation in bfloat16 is slow."""
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
    """``x`` (..., in) times the transpose of ``weight`` (out, in), plus ``bias`` (out,): (..., out), as a linear layer.

    float32, on the CPU; no gradient finds its way back.
    """
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made
