"""The UNet compiled, and its kernels recorded as CUDA graphs: a step is then one launch, and costs Python nothing.

A small batch on a fast card waits for the host, which launches some thousand kernels a step. A recorded graph is
launched whole, on the memory that it was recorded with. Every size of batch and picture is compiled for itself, the
first call of each takes minutes, and a part that takes turns would be recorded anew at each: not for offloaded models.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.fast.switch import Wrapping
from minidiff.models.around import Around
from minidiff.models.unet import UNet


class Recorded(Around):
    """The ``forward`` of the UNet."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.compiled = torch.compile(getattr(layer, name), fullgraph=True, dynamic=False, mode="reduce-overhead")
        self.launching = threading.Lock()
        super().__init__(layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.launching:  # all launches of a graph read and write the same memory
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            out: Tensor = self.compiled(*args, **kwargs)  # type: ignore[no-untyped-call]
            # The next launch writes its answer to the same place, and multistep samplers keep this one.
            return out.clone()


class CudaGraphs(Wrapping):
    """The whole UNet. CUDA only. Goes alone: what the compiler cannot read (what remembers) is in its way."""

    around = Recorded
    device = "cuda"

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)
