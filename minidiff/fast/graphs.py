"""The UNet compiled and recorded as CUDA graphs, so that a step is a single launch without work for Python.

A small batch on a fast card waits for the host, which launches some thousand kernels per step. A recorded graph is
launched as a whole, on the memory that it was recorded with. Every size of batch and picture is compiled separately,
and the first call of each takes minutes. Not for offloaded models, whose graphs would be recorded anew in every turn.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import MethodSwitch
from minidiff.models.replacement import Replacement
from minidiff.models.unet import UNet


class RecordedUNet(Replacement):
    """Replacement for the ``forward`` of the UNet."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.compiled = torch.compile(getattr(layer, name), fullgraph=True, dynamic=False, mode="reduce-overhead")
        self.launching = threading.Lock()
        super().__init__(layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.launching:  # all launches of a graph use the same memory
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            out: Tensor = self.compiled(*args, **kwargs)  # type: ignore[no-untyped-call]
            # The next launch overwrites its output, which multistep samplers keep.
            return out.clone()


class Graphs(MethodSwitch):
    """Switch of the whole UNet. CUDA only. Cannot be combined: the compiler cannot trace the caches of others."""

    replacement = RecordedUNet
    device = "cuda"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)
