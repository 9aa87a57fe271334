"""Cache of the prompt's keys and values, which are computed once instead of at every step.

In cross-attention they depend only on the encoded prompt, which is the same in all steps. A layer with a cache returns
its previous output if its input is the same tensor, unchanged. Entries live as long as that tensor, so that parallel
runs are separate, and a finished run leaves nothing behind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff.fast.kept import Kept
from minidiff.fast.switch import Switch
from minidiff.models.attention import TransformerBlock
from minidiff.models.replacement import Replacement


class Memory(Switch):
    """Switch of the key and value layers of every cross-attention, which cache their outputs. The same bits."""

    def applies(self, layer: nn.Module) -> bool:
        return isinstance(layer, TransformerBlock)

    def put_on(self, layer: nn.Module) -> None:
        assert isinstance(layer, TransformerBlock)
        for linear in (layer.attn2.k, layer.attn2.v):
            CachedLinear(linear)

    def take_off(self, layer: nn.Module) -> None:
        assert isinstance(layer, TransformerBlock)
        for linear in (layer.attn2.k, layer.attn2.v):
            CachedLinear.take_off(linear)


class Known(NamedTuple):
    """Cached output with the weight that it was computed from, and the version counter of that."""

    weight: Tensor
    written: int
    answer: Tensor


class CachedLinear(Replacement):
    """Replacement for the ``forward`` of one linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.known = Kept[Known]()
        super().__init__(layer)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.layer.get_parameter("weight")
        if torch.is_grad_enabled() or x.is_inference() or weight.is_inference():  # a graph is no answer to keep; no
            return self.compute(x)  # count of writes is kept in inference mode
        known = self.known.find(x)
        if known is None or known.weight is not weight or known.written != weight._version:
            known = self.known.keep(x, Known(weight, weight._version, self.compute(x)))
        return known.answer

    def compute(self, x: Tensor) -> Tensor:
        """Compute the output of the plain layer, or of the switch below."""
        out: Tensor = nn.Linear.forward(self.layer, x) if self.before is None else self.before(x)  # type: ignore[arg-type]
        return out
