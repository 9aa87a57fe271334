"""Attention on pixels without a copy: equal up to the order of the sums, used where the processor gains by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from minidiff import fast
from minidiff.config import text
from minidiff.fast import onednn
from minidiff.fast.switch import put_on
from minidiff.fast.tokens import Tokens
from minidiff.models.attention import SpatialTransformer
from tests.support.tiny import tiny_sd
from tests.tolerances import BLOCKS, NO_FARTHER


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("width", "side"), [(320, 16), (1280, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_layers_at_full_width(
    width: int, side: int, linear: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: True)
    torch.manual_seed(0)
    side = min(side, 4) if dtype == torch.bfloat16 else side  # some processors take a second for each step of it
    layer = SpatialTransformer(text(width, 8), 768, 32, linear).eval().to(dtype)
    x, context = torch.randn(2, width, side, side + 2, dtype=dtype), torch.randn(2, 77, 768, dtype=dtype)
    exact = copy.deepcopy(layer).double()(x.double(), context.double())
    kept, plain = x.clone(), layer(x, context)
    switch = Tokens()
    assert put_on(switch, [layer]) == [layer]
    innermost = x.contiguous(memory_format=torch.channels_last)
    for given in (x, innermost):
        found = layer(given, context)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(given, kept), "the input is not written over: it is handed across as well"
        if dtype == torch.float32:
            assert off(found, exact) <= BLOCKS.relative
        else:
            assert off(found, exact) <= NO_FARTHER * off(plain, exact)
    switch.take_off(layer)
    assert torch.equal(layer(x, context), plain)


@pytest.mark.parametrize("gains", [torch.float32, torch.bfloat16, None])
def test_only_where_it_pays(gains: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda asked=torch.float32: asked == gains)
    sd = tiny_sd()
    layers = [m for m in sd.unet.modules() if isinstance(m, SpatialTransformer)]
    assert fast.optimize(sd)["tokens"] == len(layers) * (gains == torch.float32)
    assert all(("forward" in m.__dict__) == (gains == torch.float32) for m in layers)
    fast.restore(sd)
    assert not any("forward" in m.__dict__ for m in layers)
