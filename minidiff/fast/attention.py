"""Attention in blocks of queries, each two matrix products with a softmax between, where that is the faster way.

torch's own kernel never holds more than a small tile of scores, and multiplies tiles by a loop of its own. The library
behind ``torch.bmm`` multiplies large matrices faster than that on some processors, and slower on others. Here the
scores of a block of queries are as many as the cache holds. Which way is taken is found out by trying both, when a
shape comes for the first time in a process; so the same picture may come out with other last bits on another day, and
the switch is on only if asked for.

Scores are float32 whatever the dtype is, as they are in torch's kernel: ``torch.bmm`` rounds what it gives back to the
dtype of its factors, and scores of eight bits would put the result two to six times as far from the truth.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from minidiff.fast.probe import speedup
from minidiff.fast.switch import Switch
from minidiff.models.attention import Attention, Kernel, attention

ROWS = 512  # queries of a block
SCORES = 2**21  # of a block, in float32 8 MB: what a core's share of the last cache holds
WORTH = 1.1  # times as fast; below it, what torch ships stays

Shape = tuple[torch.dtype, tuple[int, ...], int, int]  # of queries; keys, threads
chosen: dict[Shape, Kernel] = {}


class BlockAttention(Switch):
    """Attention by whichever kernel is faster for its shape. CPU only: on CUDA torch's own is the fast one."""

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, Attention)
            and layer.kernel is attention
            and not layer.causal
            and layer.q.weight.device.type == "cpu"
            and layer.q.weight.dtype in (torch.float32, torch.bfloat16)
        )

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, Attention)
        layer.kernel = fastest

    def take_off(self, layer: nn.Module) -> None:
        assert isinstance(layer, Attention)
        layer.kernel = attention


def fastest(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """:func:`~minidiff.models.attention.attention` by the kernel that is chosen for this shape."""
    if causal or torch.is_grad_enabled():  # blocks are written over: no gradient finds its way back
        return attention(q, k, v, causal)
    shape = (q.dtype, tuple(q.shape), k.shape[2], torch.get_num_threads())
    if shape not in chosen:
        chosen[shape] = choose(q, k, v)
    return chosen[shape](q, k, v, causal)


def choose(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The faster kernel for these, tried on one block."""
    some, rows = block_of(q, k)
    given = (q[:1, :some, :rows], k[:1, :some], v[:1, :some], False)
    return blockwise if speedup(lambda: attention(*given), lambda: blockwise(*given)) >= WORTH else attention


def block_of(q: Tensor, k: Tensor) -> tuple[int, int]:
    """How many heads, and queries of each, are computed at a time."""
    heads, length = q.shape[1:3]
    rows = min(ROWS, length)
    return min(heads, max(1, SCORES // (rows * k.shape[2]))), rows


def blockwise(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, length, d), block by block."""
    assert not causal
    pictures, heads, length, d = q.shape
    seen = k.shape[2]
    some, rows = block_of(q, k)
    memory = torch.empty(some * rows * seen, dtype=torch.float32, device=q.device)
    out = torch.empty(pictures, length, heads, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    for n in range(pictures):
        keys, values = k[n].float().contiguous().transpose(1, 2), v[n].contiguous()
        for h, i in product(range(0, heads, some), range(0, length, rows)):
            block = q[n, h : h + some, i : i + rows].float()
            scores = memory[: block.shape[0] * block.shape[1] * seen].view(*block.shape[:2], seen)
            scores.baddbmm_(block, keys[h : h + some], beta=0, alpha=d**-0.5)
            torch.softmax(scores, dim=-1, out=scores)
            out[n, h : h + some, i : i + rows] = scores.to(q.dtype) @ values[h : h + some]
    return out
