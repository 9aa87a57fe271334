"""Attention to many keys in blocks of queries (:mod:`blockwise`), on processors that are known to be faster that way.

With AVX512, blocks of many keys win so often that nothing is tried (:mod:`onednn`): the choice depends on the processor
and the number of keys alone, so the same machine always gives the same bits, and the switch is on by default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.attention import Attention
from minidiff.fast.blockwise import blockwise
from minidiff.models.attention import attention

MANY = 64  # keys; with fewer, a block has too little work


def by_keys(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute :func:`~minidiff.models.attention.attention`, in blocks if there are many keys."""
    plain = causal or torch.is_grad_enabled() or k.shape[2] < MANY
    return attention(q, k, v, causal) if plain else blockwise(q, k, v, causal)


class ManyKeys(Attention):
    """Switch of the same layers as :class:`Attention`, on processors with AVX512; in bfloat16 not with AMX."""

    kernel = staticmethod(by_keys)

    def applies(self, layer: nn.Module) -> bool:
        if not super().applies(layer):
            return False
        dtype = next(layer.parameters()).dtype
        return onednn.pays(dtype) and not (dtype == torch.bfloat16 and onednn.has_amx())
