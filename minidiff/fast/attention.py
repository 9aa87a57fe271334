"""Attention in blocks of queries: two matrix products with a softmax in between, used where that is faster.

torch's own kernel never holds more than a small tile of scores, and multiplies tiles in its own loop. The library
behind ``torch.bmm`` multiplies large matrices faster than that on some processors, and slower on others. Here a block
has as many queries as the cache can hold scores for. Both ways are tried when a shape first occurs in a process, and
the faster is used; so the same picture may have other last bits on another day, and the switch is on only on request.

Scores are float32 for every dtype, as in torch's kernel: a product is rounded to the dtype of its factors, and scores
of eight bits would make the error two to six times as large. So bfloat16 queries and keys are converted to float32,
without loss, before they are multiplied; only the product of the softmax and the values is computed in bfloat16. (torch
can multiply float32 as bfloat16, but that is a setting of the whole process, which affects other threads, and without
AMX it runs the same float32 kernel.)

On processors with AVX512, blocks of many keys win so often that nothing is tried (:mod:`minidiff.fast.onednn`):
:class:`ManyKeys` depends on the number of keys alone, and is on by default.
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

ROWS = 512  # queries per block
SCORES = 2**21  # scores per block, 8 MB in float32: a core's share of the last cache
WORTH = 1.1  # times as fast; with less, torch's kernel stays
MANY = 64  # keys; with fewer, a block has too little work
SMALL = 2**22  # multiplications per head and block: with fewer, calling a library per head costs more

Shape = tuple[torch.dtype, tuple[int, ...], int, int]  # of queries; keys, threads
chosen: dict[Shape, Kernel] = {}
choosing = threading.Lock()


class BlockAttention(Switch):
    """Attention by the faster kernel for each shape. CPU only: on CUDA torch's own kernel is fast."""

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
    """Attention to many keys in blocks, on processors that are known to be faster that way."""

    def kernel(self) -> Kernel:
        return by_keys

    def applies(self, layer: nn.Module) -> bool:
        if not super().applies(layer):
            return False
        dtype = next(layer.parameters()).dtype
        return onednn.pays(dtype) and not (dtype == torch.bfloat16 and onednn.has_amx())


def by_keys(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute :func:`~minidiff.models.attention.attention`, in blocks if there are many keys."""
    plain = causal or torch.is_grad_enabled() or k.shape[2] < MANY
    return attention(q, k, v, causal) if plain else blockwise(q, k, v, causal)


def fastest(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute :func:`~minidiff.models.attention.attention` by the kernel chosen for this shape."""
    if causal or torch.is_grad_enabled():  # blocks are overwritten, so gradients are not supported
        return attention(q, k, v, causal)
    shape = (q.dtype, tuple(q.shape), k.shape[2], torch.get_num_threads())
    if shape not in chosen:
        with choosing:  # all threads use the same
            if shape not in chosen:
                chosen[shape] = choose(q, k, v)
    return chosen[shape](q, k, v, causal)


def choose(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """Return the faster kernel for these tensors, tried on one block."""
    some, rows = block_of(q, k)
    given = (q[:1, :some, :rows], k[:1, :some], v[:1, :some], False)
    return blockwise if speedup(lambda: attention(*given), lambda: blockwise(*given)) >= WORTH else attention


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
