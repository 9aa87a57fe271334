"""The UNet as one compiled graph, its weights frozen into it.

``torch.compile`` with its own compiler (inductor) fuses what lies between convolutions and matrix products, and frozen
weights are laid out once as the kernels read them, like :mod:`packed` does. The compiler keeps its copy of the weights,
so they are in memory twice.

The first call takes minutes, half of them in the C++ compiler. What that made stays in torch's own cache on disk
(TORCHINDUCTOR_CACHE_DIR), and the next process finds it there. The graph around it is put together again in every
process: packed weights are the one thing that torch's cache of whole graphs cannot hold.

Sums run in another order, so results differ by rounding. Every size of batch and picture is compiled for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minidiff.errors import ConfigError
from minidiff.fast.switch import Switch
from minidiff.models.around import Around
from minidiff.models.unet import UNet


class CompiledUNet(Switch):
    """The whole UNet, compiled. Goes alone: it does by itself what the other switches do."""

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, UNet)

    def put_on(self, layer: nn.Module) -> None:
        check_compiler()
        Compiled(layer)

    def take_off(self, layer: nn.Module) -> None:
        Compiled.take_off(layer)


class Compiled(Around):
    """Replacement for the ``forward`` of the UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self.compiled = torch.compile(unet.forward, dynamic=False)
        super().__init__(unet)

    def __call__(self, x: Tensor, t: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():  # frozen weights don't learn
            return self.inner(x, t, *args, **kwargs)  # type: ignore[no-any-return]
        import torch._inductor.config as inductor

        t = torch.as_tensor(t, device=x.device)  # a number would be a constant of the graph, and each have its own
        # Given as an option of torch.compile, freezing comes too late: weights would be inputs of the graph by then.
        # The setting is the calling thread's own.
        with inductor.patch(freezing=True):
            out: Tensor = self.compiled(x, t, *args, **kwargs)
        return out


def check_compiler() -> None:
    """Raise :class:`ConfigError` where torch finds no C++ compiler to work with."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as e:
        why = type(e).__name__
        raise ConfigError(
            f"compiling needs a C++ compiler, and none is found ({why}); install g++, or name one in CXX"
        ) from None
