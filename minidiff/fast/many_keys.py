"""Attention to many keys by the kernel that is the fastest on this processor (:mod:`blockwise`, :mod:`logistic`).

Which one that is depends on the processor and on the shape, and no rule tells: with AVX512, blocks were 1.6 times as
fast as torch's kernel on one kind of processor, and half as fast on another. So it is tried once a machine
(:mod:`trial`), for three shapes, one for each range of the number of keys; where nothing was tried, torch's own stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff.fast import machine, onednn
from minidiff.fast.blockwise import BlockKernel, at_once, in_float32
from minidiff.fast.logistic import LogisticKernel
from minidiff.fast.switch import Switch
from minidiff.models.attention import Attention, Kernel, attention

PLAIN = "torch"
FEW = 256  # keys whose scores for all queries and heads are small enough to be kept


class Range(NamedTuple):
    """Numbers of keys, from ``least`` on, and the shape that stands for them in a trial: large enough for the rate,
    small enough for the time."""

    least: int
    heads: int
    queries: int
    keys: int
    width: int


# Falling. Of Stable Diffusion at 512 x 512: its first two levels, and the prompt.
RANGES: Mapping[str, Range] = {
    "attention to 4096 keys": Range(2048, 1, 2048, 4096, 40),
    "attention to 1024 keys": Range(256, 2, 1024, 1024, 80),
    "attention to 77 keys": Range(64, 4, 4096, 77, 40),
}


def kernels(keys: int, dtype: torch.dtype) -> dict[str, Kernel]:
    """Return the candidates for attention to ``keys`` keys, by name; the plain one first, the least exact last.

    Blocks have as many rows as a core's own cache holds scores for, or four times as many; few keys need no blocks.
    """
    found: dict[str, Kernel] = {PLAIN: attention}
    if not onednn.pays(dtype):  # multiplies no faster than torch's kernel
        return found
    if dtype != torch.float32:
        found["float32"] = in_float32
    own = machine.private_cache() // keys
    wide = [rows(times * own // torch.float32.itemsize) for times in (1, 4)]
    narrow = [rows(times * own // dtype.itemsize) for times in (1, 4)]
    found |= {f"blocks of {count}": BlockKernel(count) for count in wide}
    if keys <= FEW:
        found["at once"] = at_once
    else:
        found[f"logistic blocks of {narrow[-1]}"] = LogisticKernel(narrow[-1])
    if dtype != torch.float32:
        found |= {f"narrow blocks of {count}": BlockKernel(count, narrow=True) for count in narrow}
    return found


def rows(most: int) -> int:
    """Return the power of two, from 32 to 1,024, that is nearest below ``most``."""
    return min(1024, 1 << max(5, most.bit_length() - 1))


def ways(name: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Set up the candidates of a range for a trial."""
    of = RANGES[name]
    q, k, v = (
        torch.ones(1, n, of.heads, of.width, dtype=dtype, device="cpu").transpose(1, 2)
        for n in (of.queries, of.keys, of.keys)
    )
    return {called: partial(kernel, q, k, v, False) for called, kernel in kernels(of.keys, dtype).items()}


@dataclass(frozen=True)
class ByKeys:
    """Kernel that leaves attention to the one chosen for its number of keys; ``chosen``: (least, kernel), falling."""

    chosen: tuple[tuple[int, Kernel], ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        keys = k.shape[2]
        kernel = next((kernel for least, kernel in self.chosen if keys >= least), attention)
        return kernel(q, k, v, causal)


@dataclass(frozen=True)
class ManyKeys(Switch):
    """Switch of every attention without a causal mask. CPU only: on CUDA torch's own kernel is fast.

    ``choice``: for the name of each range, the name of its kernel; torch's own where it is missing.
    """

    choice: Mapping[str, str] = field(default_factory=dict)

    def fit(self, choice: Mapping[str, str]) -> ManyKeys:
        return ManyKeys(choice)

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, Attention)
            and layer.kernel is attention
            and not layer.causal
            and layer.q.weight.device.type == "cpu"
            and layer.q.weight.dtype in (torch.float32, torch.bfloat16)
            and self.kernel(layer.q.weight.dtype) is not attention
        )

    def kernel(self, dtype: torch.dtype) -> Kernel:
        """Return the kernel of a layer in ``dtype``."""
        chosen = [
            (of.least, kernels(of.keys, dtype).get(self.choice.get(name, PLAIN), attention))
            for name, of in RANGES.items()
        ]
        return ByKeys(tuple(chosen)) if any(kernel is not attention for _, kernel in chosen) else attention

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, Attention)
        layer.kernel = self.kernel(layer.q.weight.dtype)

    def take_off(self, layer: nn.Module) -> None:
        assert isinstance(layer, Attention)
        layer.kernel = attention
