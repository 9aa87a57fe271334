"""The normal random numbers that torch draws on an NVIDIA card, computed on the CPU.

Programs that draw their noise on the card can't be repeated with a CPU generator, which is another algorithm. CUDA's is
counter-based: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") is a function of a
counter and a key, without any state. The key is the seed; the counter says which draw of which thread it is.

Which number goes where is torch's doing (aten/src/ATen/native/cuda/DistributionTemplates.h). A kernel runs in blocks of
256 threads. Thread i turns four words into four normal numbers at a time (Box and Muller 1958), for the entries
i, i + threads, i + 2 threads, i + 3 threads. A card runs at most ``multiprocessors * (threads // 256)`` blocks at once,
and torch starts no more: so the card's size enters as soon as a tensor needs more blocks than that, and does not below.
The four latent channels of one 512 x 512 picture are 64 blocks, which any card of 11 multiprocessors or more can hold;
three of them in one draw are 192, and an RTX 3060 has room for 168.

How far this is confirmed: the words by the known answers of Random123; the layout and the values by what owners of real
cards have published (tests/unit/test_philox.py), to the four decimals printed: tensors below the limit, and above it
A100, H100, RTX A4000 and RTX 2070 Super. Other sizes of card follow from torch's formula and are unverified. On the
card log and sine are approximations of a few 1e-7, which times the largest value, 6, bounds the difference to here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256  # threads
UNROLL = 4  # normal numbers of one call, from the four words of one counter
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by from round to round: the golden ratio, and the root of 3 less 1
WORD = 0xFFFFFFFF
PER_WORD = np.float32(2**-32)
PER_WORD_2PI = np.float32(PER_WORD * np.float32(2 * math.pi))


class Card(NamedTuple):
    """Properties of a card that decide the layout: its multiprocessors, and the threads that each can hold.

    The default is an A100. Threads are 2048 there and on H100, V100 and P100; 1536 on RTX 30, 40 and A10; 1024 on
    RTX 20 and T4.
    """

    multiprocessors: int = 108
    threads: int = 2048

    @property
    def blocks(self) -> int:
        """Largest number of blocks that torch starts."""
        return self.multiprocessors * (self.threads // BLOCK)


def philox4x32(counter: NDArray[Any], key: tuple[int, int], rounds: int = 10) -> NDArray[np.uint32]:
    """(4, N) words for ``counter`` (4, N), both uint32: Salmon et al. 2011, section 3.3."""
    c = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(rounds):
        left, right = c[0] * np.uint64(MULTIPLIERS[0]), c[2] * np.uint64(MULTIPLIERS[1])
        high, low = np.uint64(32), np.uint64(WORD)
        c = np.stack(
            [(right >> high) ^ c[1] ^ np.uint64(k0), right & low, (left >> high) ^ c[3] ^ np.uint64(k1), left & low]
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c.astype(np.uint32)


def box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """(4, N) standard normal numbers of (4, N) words: the sine and the cosine of a pair share its length.

    The uniform numbers are float32, rounded once as the card's fused multiply-add does; what is made of them is
    rounded at the end.
    """
    as_float = words.astype(np.float32).astype(np.float64)

    def uniform(x: NDArray[Any], scale: np.float32) -> NDArray[Any]:
        shifted: NDArray[Any] = (x * float(scale) + float(scale / np.float32(2))).astype(np.float32).astype(np.float64)
        return shifted

    length = np.sqrt(-2 * np.log(uniform(as_float[0::2], PER_WORD)))
    angle = uniform(as_float[1::2], PER_WORD_2PI)
    pairs = np.stack([length * np.sin(angle), length * np.cos(angle)], axis=1)
    return pairs.reshape(4, -1).astype(np.float32)


A100 = Card()
UNLIMITED = Card(2**40)  # a thread for every number


class CudaStream:
    """``torch.Generator("cuda").manual_seed(seed)`` on ``card``, as far as ``torch.randn`` goes."""

    def __init__(self, seed: int, card: Card = A100) -> None:
        self.seed = seed % 2**64
        self.card = card
        self.offset = 0  # in words, as torch counts: it grows by 4 for every counter that a thread used

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """float32 of ``shape``, on the CPU; the next call goes on from there."""
        count = math.prod(shape)
        values = self.normals(count, np.arange(count, dtype=np.int64))
        threads = BLOCK * self._blocks(count)
        self.offset += ((count - 1) // (threads * UNROLL) + 1) * UNROLL
        return torch.from_numpy(values).reshape(shape)

    def normals(self, count: int, which: NDArray[Any]) -> NDArray[np.float32]:
        """The entries ``which`` (N,), int64, of a draw of ``count`` numbers; nothing moves on."""
        threads = BLOCK * self._blocks(count)
        thread, turn = which % threads, which // threads  # turn 0..3 is the first call of a thread, 4..7 the second
        call = self.offset // UNROLL + turn // UNROLL
        counter = np.stack([call & WORD, call >> 32, thread, np.zeros_like(thread)])
        normals = box_muller(philox4x32(counter, (self.seed & WORD, self.seed >> 32)))
        chosen: NDArray[np.float32] = normals[turn % UNROLL, np.arange(len(which))]
        return chosen

    def _blocks(self, count: int) -> int:
        return min(-(-count // BLOCK), self.card.blocks)
