"""Attention in blocks of queries, each two matrix products with a softmax between, where that is the faster way.

torch's own kernel never holds more than a small tile of scores, and multiplies tiles by a loop of its own. The library
behind ``torch.bmm`` multiplies large matrices faster than that on some processors, and slower on others. Here the
scores of a block of queries are as many as the cache holds. Which way is taken is found out by trying both, when a
shape comes for the first time in a process; so the same picture may come out with other last bits on another day, and
the switch is on only if asked for.

Scores are float32 whatever the dtype is, as in torch's kernel: a product rounds what it gives back to the dtype of its
factors, and scores of eight bits would put the result two to six times as far from the truth. So queries and keys in
bfloat16 are written as float32 before they are multiplied, and lose nothing; only the second product, of the softmax
and the values, is one of bfloat16. (torch can be told to multiply float32 as bfloat16. That is a setting of the whole
process, other threads fall under it, and without AMX the kernel that runs is the same one of float32.)

Where a processor has AVX512, blocks of many keys win so often that nothing is tried (:mod:`minidiff.fast.onednn`):
:class:`ManyKeys` goes by the number of keys alone, and is on by itself.
"""

from __future__ import annotations

import threading
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.probe import speedup
from minidiff.fast.switch import Switch
from minidiff.models.attention import Attention, Kernel, attention

ROWS = 512  # queries of a block
SCORES = 2**21  # of a block, in float32 8 MB: what a core's share of the last cache holds
WORTH = 1.1  # times as fast; below it, what torch ships stays
MANY = 64  # keys; with fewer, a block has too little to do
SMALL = 2**22  # multiplications of a head's block: fewer are over before a library has been asked head by head

Shape = tuple[torch.dtype, tuple[int, ...], int, int]  # of queries; keys, threads
chosen: dict[Shape, Kernel] = {}
choosing = threading.Lock()


class BlockAttention(Switch):
    """Attention by whichever kernel is faster for its shape. CPU only: on CUDA torch's own is the fast one."""

    def kernel(self) -> Kernel:
        """Return the kernel that is set on the layers."""
        return fastest

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
        layer.kernel = self.kernel()

    def take_off(self, layer: nn.Module) -> None:
        assert isinstance(layer, Attention)
        layer.kernel = attention


class ManyKeys(BlockAttention):
    """Attention to many keys in blocks, where the processor is known to be faster at that."""

    def kernel(self) -> Kernel:
        return by_keys

    def applies(self, layer: nn.Module) -> bool:
        if not super().applies(layer):
            return False
        dtype = next(layer.parameters()).dtype
        return onednn.pays(dtype) and not (dtype == torch.bfloat16 and onednn.has_amx())


def by_keys(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """:func:`~minidiff.models.attention.attention`, in blocks if the keys are many."""
    plain = causal or torch.is_grad_enabled() or k.shape[2] < MANY
    return attention(q, k, v, causal) if plain else blockwise(q, k, v, causal)


def fastest(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """:func:`~minidiff.models.attention.attention` by the kernel that is chosen for this shape."""
    if causal or torch.is_grad_enabled():  # blocks are written over: no gradient finds its way back
        return attention(q, k, v, causal)
    shape = (q.dtype, tuple(q.shape), k.shape[2], torch.get_num_threads())
    if shape not in chosen:
        with choosing:  # all threads take the same
            if shape not in chosen:
                chosen[shape] = choose(q, k, v)
    return chosen[shape](q, k, v, causal)


def choose(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The faster kernel for these, tried on one block."""
    some, rows = block_of(q, k)
    given = (q[:1, :some, :rows], k[:1, :some], v[:1, :some], False)
    return blockwise if speedup(lambda: attention(*given), lambda: blockwise(*given)) >= WORTH else attention


def block_of(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Return the number of heads, and of queries of each, that are computed at a time."""
    heads, length = q.shape[1:3]
    rows = min(ROWS, length)
    return min(heads, max(1, SCORES // (rows * k.shape[2]))), rows


def blockwise(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, length, d), block by block."""
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
    """The attention of a block of queries (heads, rows, d), its scores in ``memory`` (float32, long enough)."""
    scores = memory[: q.shape[0] * q.shape[1] * k.shape[1]].view(*q.shape[:2], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    torch.softmax(scores, dim=-1, out=scores)
    return scores.to(v.dtype) @ v


def by_onednn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, head by head, in memory that the products bring along."""
    out = torch.empty_like(q)
    for asked, keys, values, made in zip(q * q.shape[-1] ** -0.5, k, v, out, strict=True):
        scores = onednn.product(asked, keys)
        made.copy_(onednn.product(torch.softmax(scores, dim=-1, out=scores), values.t()))
    return out


def by_onednn_narrow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for values of fewer digits, by which the softmax is multiplied as such, all heads at once."""
    weights = torch.empty(*q.shape[:2], k.shape[1], dtype=v.dtype, device=v.device)
    for asked, keys, made in zip(q * q.shape[-1] ** -0.5, k, weights, strict=True):
        scores = onednn.product(asked, keys)
        made.copy_(torch.softmax(scores, dim=-1, out=scores))
    return weights @ v
