"""The UNet as one compiled graph with frozen weights.

``torch.compile`` with its own compiler (inductor) fuses the operations between convolutions and matrix products, and
frozen weights are converted once to the layout that the kernels read, as :mod:`packed` does. The compiler keeps its own
copy of the weights, so they are in memory twice.

The first call takes minutes, half of them in the C++ compiler. Its output stays in torch's cache on disk
(TORCHINDUCTOR_CACHE_DIR), where the next process finds it. The graph around it is built again in every process: torch's
cache of whole graphs cannot hold packed weights.

Sums run in another order, so results differ by rounding. Every size of batch and picture is compiled separately.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.errors import ConfigError
from minidiff.fast.switch import Switch
from minidiff.models.replacement import Replacement
from minidiff.models.unet import UNet


class Compile(Switch):
    """Switch that compiles the whole UNet. Cannot be combined: the compiler does what the other switches do."""

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)

    def put_on(self, layer: nn.Module) -> None:
        check_compiler()
        CompiledUNet(layer)

    def take_off(self, layer: nn.Module) -> None:
        CompiledUNet.take_off(layer)


class CompiledUNet(Replacement):
    """Replacement for the ``forward`` of the UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self.compiled = torch.compile(unet.forward, dynamic=False)
        super().__init__(unet)

    def __call__(self, x: Tensor, t: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():  # frozen weights cannot be trained
            return self.inner(x, t, *args, **kwargs)  # type: ignore[no-any-return]
        import torch._inductor.config as inductor

        t = torch.as_tensor(t, device=x.device)  # a Python number would be a constant, with a graph for each
        # As an option of torch.compile, freezing would come too late: weights would already be inputs of the graph.
        # The setting applies to the calling thread only.
        with inductor.patch(freezing=True):
            out: Tensor = self.compiled(x, t, *args, **kwargs)
        return out


def check_compiler() -> None:
    """Raise :class:`ConfigError` if torch finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as e:
        why = type(e).__name__
        raise ConfigError(
            f"compiling needs a C++ compiler, and none is found ({why}); install g++, or set CXX"
        ) from None
