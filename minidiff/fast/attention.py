"""Attention by the faster of two kernels: torch's own, or in blocks of queries (:mod:`blockwise`).

Both are tried when a shape first occurs in a process, and the faster is used from then on. So the same picture may have
other last bits on another day, and the switch is on only on request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from minidiff.fast.blockwise import block_of, blockwise
from minidiff.fast.probe import speedup
from minidiff.fast.switch import Switch
from minidiff.models import attention as plain
from minidiff.models.attention import Kernel

WORTH = 1.1  # times as fast; with less, torch's kernel stays

Shape = tuple[torch.dtype, tuple[int, ...], int, int]  # of queries; keys, threads
chosen: dict[Shape, Kernel] = {}
choosing = threading.Lock()


def fastest(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute :func:`~minidiff.models.attention.attention` by the kernel chosen for this shape."""
    if causal or torch.is_grad_enabled():  # blocks are overwritten, so gradients are not supported
        return plain.attention(q, k, v, causal)
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
    return (
        blockwise if speedup(lambda: plain.attention(*given), lambda: blockwise(*given)) >= WORTH else plain.attention
    )


class Attention(Switch):
    """Switch of every attention without a causal mask. CPU only: on CUDA torch's own kernel is fast."""

    kernel: ClassVar[Callable[..., Tensor]] = staticmethod(fastest)

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, plain.Attention)
            and layer.kernel is plain.attention
            and not layer.causal
            and layer.q.weight.device.type == "cpu"
            and layer.q.weight.dtype in (torch.float32, torch.bfloat16)
        )

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, plain.Attention)
        layer.kernel = self.kernel

    def take_off(self, layer: nn.Module) -> None:
        assert isinstance(layer, plain.Attention)
        layer.kernel = plain.attention
