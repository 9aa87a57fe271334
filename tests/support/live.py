"""Tensors that are alive at the same time, counted while modules run on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff.models.attention import Attention


class Live(TorchDispatchMode):
    """Inside it, ``peak`` becomes the most numbers that all tensors made so far hold at one time. ``copies``: a
    convolution reorders its input and its weights, and then its output."""

    def __init__(self, module: nn.Module, copies: bool) -> None:
        super().__init__()
        self.copies, self.now, self.peak = copies, 0, 0
        self.known = {t.untyped_storage()._cdata: 0 for t in [*module.parameters(), *module.buffers()]}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes() // tensor.element_size()
                self.now += self.known[storage._cdata]
                weakref.finalize(storage, self._free, storage._cdata)
        beside = 0
        if self.copies and "convolution" in str(func) and args[1].shape[-1] > 1:
            beside = max(args[0].numel() + args[1].numel(), out.numel())
        self.peak = max(self.peak, self.now + beside)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def held(make: Callable[[], nn.Module], call: Callable[[Any], object], copies: bool) -> int:
    """Return the most numbers that are alive, without inputs, while ``call`` uses the module that ``make`` builds."""

    def scores_unseen(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Return the output of a kernel that holds no scores."""
        return torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], device="meta").transpose(1, 2)

    with torch.device("meta"):
        module = make().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.kernel = scores_unseen
    with torch.no_grad(), Live(module, copies) as live:
        call(module)
    return live.peak
