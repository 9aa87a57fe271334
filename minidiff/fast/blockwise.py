"""Attention in blocks of queries: two matrix products with a softmax in between.

torch's own kernel never holds more than a small tile of scores, and multiplies tiles in its own loop. The library
behind ``torch.bmm`` multiplies large matrices faster than that on some processors, and slower on others. Here a block
has as many queries as the cache can hold scores for. Two switches use this kernel: :mod:`attention`, where a trial
shows that it is faster, and :mod:`many_keys`, where that is known of the processor.

Scores are float32 for every dtype, as in torch's kernel: a product is rounded to the dtype of its factors, and scores
of eight bits would make the error two to six times as large. So bfloat16 queries and keys are converted to float32,
without loss, before they are multiplied; only the product of the softmax and the values is computed in bfloat16. (torch
can multiply float32 as bfloat16, but that is a setting of the whole process, which affects other threads, and without
AMX it runs the same float32 kernel.)
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from minidiff.fast import onednn

ROWS = 512  # queries per block
SCORES = 2**21  # scores per block, 8 MB in float32: a core's share of the last cache
SMALL = 2**22  # multiplications per head and block: with fewer, calling a library per head costs more


def block_of(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Return the number of heads, and of queries of each, that are computed at once."""
    heads, length = q.shape[1:3]
    rows = min(ROWS, length)
    return min(heads, max(1, SCORES // (rows * k.shape[2]))), rows


def blockwise(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v of (B, heads, length, d), block by block."""
    assert not causal
    pictures, heads, length, d = q.shape
    seen = k.shape[2]
    some, rows = block_of(q, k)
    out = torch.empty(pictures, length, heads, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    small = rows * seen * d < SMALL
    if onednn.pays() and q.dtype == torch.float32:
        one_block = by_onednn
    elif onednn.pays() and not small:
        one_block = by_onednn_narrow
    else:
        one_block = partial(by_bmm, torch.empty(some * rows * seen, dtype=torch.float32, device=q.device))
    for n in range(pictures):
        keys, values = k[n].float().contiguous(), v[n].contiguous()
        for h, i in product(range(0, heads, some), range(0, length, rows)):
            block = q[n, h : h + some, i : i + rows].float()
            out[n, h : h + some, i : i + rows] = one_block(block, keys[h : h + some], values[h : h + some])
    return out


def by_bmm(memory: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute a block of queries (heads, rows, d), with its scores in ``memory`` (float32, large enough)."""
    scores = memory[: q.shape[0] * q.shape[1] * k.shape[1]].view(*q.shape[:2], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    torch.softmax(scores, dim=-1, out=scores)
    return scores.to(v.dtype) @ v


def by_onednn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the same, head by head, in memory that the products allocate."""
    out = torch.empty_like(q)
    for asked, keys, values, made in zip(q * q.shape[-1] ** -0.5, k, v, out, strict=True):
        scores = onednn.product(asked, keys)
        made.copy_(onednn.product(torch.softmax(scores, dim=-1, out=scores), values.t()))
    return out


def by_onednn_narrow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the same for values of lower precision, in which the softmax is multiplied, all heads at once."""
    weights = torch.empty(*q.shape[:2], k.shape[1], dtype=v.dtype, device=v.device)
    for asked, keys, made in zip(q * q.shape[-1] ** -0.5, k, weights, strict=True):
        scores = onednn.product(asked, keys)
        made.copy_(torch.softmax(scores, dim=-1, out=scores))
    return weights @ v
