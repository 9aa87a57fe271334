"""Attention as two matrix products with a softmax in between, in blocks of queries or for all of them at once.

torch's own kernel never holds more than a small tile of scores, and multiplies tiles in its own loop. The library
behind the matrix products multiplies large matrices faster than that on some processors, and slower on others. Here a
block has as many queries as the cache can hold scores for. :mod:`many_keys` uses these kernels where a trial on the
processor has shown that they are faster.

For bfloat16 there are three ways. torch's kernel keeps scores in float32. So does :class:`BlockKernel`, unless
``narrow``: a product is rounded to the dtype of its factors, so queries and keys are converted to float32, without
loss, before they are multiplied. Narrow blocks multiply them as they are: their scores have 8 bits, which makes the
error of a layer twice as large, and that of a whole UNet no larger. And :func:`in_float32` gives float32 copies to
torch's kernel. Where there are few keys, as those of a prompt, :func:`at_once` multiplies all heads in two calls; its
scores are as narrow. (torch can multiply float32 as bfloat16, but that is a setting of the whole process, which affects
other threads.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.fast import onednn
from minidiff.models.attention import attention

COLUMNS = 16  # the product with the values is slow unless their width is a multiple of this


def in_float32(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute :func:`~minidiff.models.attention.attention` in float32, and return it in the dtype of ``q``."""
    return attention(q.float(), k.float(), v.float(), causal).to(q.dtype)


def at_once(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute :func:`~minidiff.models.attention.attention` of all queries at once; scores have the dtype of ``q``."""
    if causal or torch.is_grad_enabled():
        return attention(q, k, v, causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return torch.softmax(scores, dim=-1, out=scores) @ v


@dataclass(frozen=True)
class ByHeads(ABC):
    """Base class of kernels that compute attention head by head, in blocks of ``rows`` queries, without gradients or
    causal mask: with either, it is :func:`~minidiff.models.attention.attention`."""

    rows: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Compute softmax(q k^T / sqrt(d)) v of (B, heads, length, d)."""
        if causal or torch.is_grad_enabled():
            return attention(q, k, v, causal)
        pictures, heads, length, d = q.shape
        out = torch.empty(pictures, length, heads, d, dtype=q.dtype, device=q.device).transpose(1, 2)
        for of_picture in zip(q, k, v, out, strict=True):
            self.picture(*of_picture)
        return out

    @abstractmethod
    def picture(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Compute one picture into ``out`` (heads, L, d), from q (heads, L, d) and k and v (heads, M, d)."""


@dataclass(frozen=True)
class BlockKernel(ByHeads):
    """Kernel with a softmax between two products. ``narrow``: scores have the dtype of the queries, instead of
    float32."""

    narrow: bool = False

    def picture(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        for of_head in zip(q, k, v, out, strict=True):
            self.head(*of_head)

    def head(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Compute one head into ``out`` (L, d), from q (L, d) and k and v (M, d)."""
        d = q.shape[1]
        dtype = q.dtype if self.narrow else torch.float32
        asked = q.to(dtype) * d**-0.5
        keys = k.to(dtype).contiguous()
        values = torch.zeros(-(-d // COLUMNS) * COLUMNS, len(v), dtype=v.dtype, device=v.device)
        values[:d] = v.t()
        for i in range(0, len(q), self.rows):
            scores = onednn.product(asked[i : i + self.rows], keys)
            weights = torch.softmax(scores, dim=-1, out=scores).to(v.dtype)
            out[i : i + self.rows] = onednn.product(weights, values)[:, :d]
