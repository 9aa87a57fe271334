"""Attention whose weights come out of the product of queries and keys, without a pass for the softmax.

oneDNN can apply a function to a product before it is written. The exponential is not among the functions that torch
hands on to it, but the logistic function is, and far below zero the two are the same:

    1 / (1 + exp(-y)) = exp(y) (1 - exp(y) + ...)

A softmax does not change if a constant is subtracted from all scores of a row, so every row can be moved there. Usually
the constant is the largest score, which is known only after all of them. Here it is a guess, made before: the score of
the mean key, plus half of what any key can add to that (Cauchy-Schwarz). Subtracting it costs one more column of the
product, minus the guess beside each query and one beside each key. The sum of a row's weights, by which the result is
divided in the end, costs nothing either, because the values have unused columns: there, they are one. The sum also
tells whether the guess was near enough; a head where it was not is computed by torch's kernel.

In bfloat16 the result is closer to the exact one than with scores in bfloat16 (:mod:`blockwise`), since a score is not
rounded before its exponential is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minidiff.fast import onednn
from minidiff.fast.blockwise import COLUMNS, ByHeads
from minidiff.models.attention import attention

SUMS = 8  # columns of ones, each for an eighth of the keys: the sum of eight rounded sums is rounded less


class LogisticKernel(ByHeads):
    """Kernel whose first product ends with the logistic function."""

    def picture(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        prepared = asked(q, k, window(q.dtype, k.shape[1])), known(k), carried(v)
        for h, of_head in enumerate(zip(*prepared, out, strict=True)):
            if not self.head(*of_head):
                one = None, slice(h, h + 1)
                out[h] = attention(q[one], k[one], v[one], False)[0, 0]

    def head(self, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> bool:
        """Compute one head into ``out`` (L, d). Return False if a guess was too far away."""
        d = out.shape[1]
        low, high = window(out.dtype, len(keys))
        for i in range(0, len(queries), self.rows):
            block = slice(i, i + self.rows)
            made = onednn.product(onednn.product(queries[block], keys, function="sigmoid"), values)
            total = made[:, d : d + SUMS].sum(dim=1, keepdim=True, dtype=torch.float32)
            least, most = torch.aminmax(total)
            if not low <= float(least) <= float(most) <= high:  # or they are NaN
                return False
            torch.div(made[:, :d], total, out=out[block])
        return True


def window(dtype: torch.dtype, keys: int) -> tuple[float, float]:
    """Return the least and the largest sum of a row's weights with which its result is right.

    Below, weights too small for a float could matter; above, one could be so large that the logistic function differs
    from the exponential. Both are an eighth of a rounding.
    """
    info = torch.finfo(dtype)
    return 8 * keys * info.tiny / info.eps, info.eps / 8


def asked(q: Tensor, k: Tensor, sums: tuple[float, float]) -> Tensor:
    """Return the queries (heads, L, d), scaled, with minus the guess beside each: (heads, L, d + 2)."""
    d = q.shape[2]
    scale = d**-0.5
    mean = k.mean(dim=1, keepdim=True, dtype=torch.float32)
    reach = torch.linalg.vector_norm(k - mean, dim=2).amax(dim=1, keepdim=True)
    usual = (q @ mean.to(q.dtype).transpose(1, 2)).squeeze(2)
    length = torch.linalg.vector_norm(q, dim=2, dtype=torch.float32)
    guess = scale * (usual + length * reach / 2) - (math.log(sums[0]) + math.log(sums[1])) / 2
    made = q.new_zeros(*q.shape[:2], d + 2)  # an even number, since bfloat16 is multiplied in pairs
    torch.mul(q, scale, out=made[..., :d])
    made[..., d] = -guess
    return made


def known(k: Tensor) -> Tensor:
    """Return the keys (heads, M, d) with ones beside each: (heads, M, d + 2)."""
    heads, keys, d = k.shape
    made = k.new_ones(heads, keys, d + 2)
    made[..., :d] = k
    return made


def carried(v: Tensor) -> Tensor:
    """Return the values (heads, M, d) as rows, with rows of ones below: (heads, d + SUMS, rounded up, M)."""
    heads, keys, d = v.shape
    made = v.new_zeros(heads, -(-(d + SUMS) // COLUMNS) * COLUMNS, keys)
    made[:, :d] = v.transpose(1, 2)
    for i in range(SUMS):
        made[:, d + i, i::SUMS] = 1
    return made
