"""Facts that decide the last bits of a result besides the code: torch's version, threads, and the kernels that run."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch
import torch.nn.functional as F


def machine() -> dict[str, Any]:
    """Return what a recording says of the machine that made it. Where all of it agrees, equal bits can be expected."""
    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "kernels": kernels(),
        "torch": str(torch.__version__).partition("+")[0],
        "threads": torch.get_num_threads(),
    }


def kernels() -> str:
    """Return a hash of some sums of torch's own, 12 hex digits.

    Processors with the same instructions may still add in another order, since torch's libraries choose their kernels
    by the maker and the model.
    """
    g = torch.Generator().manual_seed(0)
    x, out = torch.randn((2, 16, 8, 8), generator=g), []
    for channels in (4, 8, 16):
        for side in (1, 3):
            weight = torch.randn((16, channels, side, side), generator=g)
            for n in (1, 2):
                out.append(F.silu(F.group_norm(F.conv2d(x[:n, :channels], weight, padding=side // 2), 4)))
    for width in (8, 16, 24, 32):
        for rows in (1, 2, 20, 40, 64, 128):
            a, b = (torch.randn(shape, generator=g) for shape in ((rows, width), (16, width)))
            out += [F.gelu(F.linear(a, b)), F.layer_norm(a, (width,)).sin()]
    q = torch.randn((2, 2, 64, 8), generator=g)
    out += [F.scaled_dot_product_attention(q, q[:, :, :n], q[:, :, :n]) for n in (20, 64)]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in out)).hexdigest()[:12]
