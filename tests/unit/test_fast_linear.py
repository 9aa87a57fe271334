"""Linear layers by oneDNN: equal to MKL's but for the order of the sums, and taken only where they pay."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidiff import fast
from minidiff.adapters import lora
from minidiff.adapters.lora import Adapter, Update
from minidiff.fast import onednn
from minidiff.fast.linear import MANY, ROWS, Linear, PackedLinear
from minidiff.fast.switch import put_on
from minidiff.models import attention
from minidiff.models.replacement import Replacement
from tests.support.tiny import tiny_sd
from tests.tolerances import BLOCKS

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.available(dtype)]


@pytest.fixture
def _paying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: True)


@pytest.mark.usefixtures("_paying")
@pytest.mark.parametrize(("into", "out", "bias"), [(320, 2560, True), (1280, 320, False), (768, 640, True)])
@torch.no_grad()
def test_layers_at_full_width(into: int, out: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(into, out, bias=bias), torch.randn(2, 77, into)
    exact = copy.deepcopy(layer).double()(x.double())
    plain, few = layer(x), layer(x[:1, : ROWS - 1])
    assert put_on(Linear(), [layer]) == [layer]
    found = layer(x)
    assert found.shape == plain.shape
    assert (found - exact).norm() <= BLOCKS.relative * exact.norm()
    assert torch.equal(layer(x[:1, : ROWS - 1]), few), "few rows go the plain way"
    assert (layer(x.transpose(0, 1)) - exact.transpose(0, 1)).norm() <= BLOCKS.relative * exact.norm()
    Linear().take_off(layer)
    assert torch.equal(layer(x), plain)


@pytest.mark.usefixtures("_paying")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_the_weight_is_packed_for_many_rows(dtype: torch.dtype) -> None:
    """Packed, it gives the same bits, for few rows too, and it is saved and restored as it was."""
    torch.manual_seed(0)
    layer = nn.Linear(320, 640).to(dtype)
    weight, x = layer.weight.clone(), torch.randn(2, MANY // 2, 320).to(dtype)
    put_on(Linear(), [layer])
    few = layer(x[:1, : MANY - 1])
    assert not layer.weight.is_mkldnn
    found = layer(x)
    assert layer.weight.is_mkldnn
    assert torch.equal(found, onednn.product(x, weight, layer.bias))
    assert torch.equal(layer(x[:1, : MANY - 1]), few)
    assert layer(x[:1, :1]).shape == (1, 1, 640)
    assert torch.equal(layer.state_dict()["weight"], weight)
    layer.weight = nn.Parameter(2 * weight)
    assert torch.equal(layer(x), onednn.product(x, 2 * weight, layer.bias)), "another weight is packed in turn"
    with torch.enable_grad():
        asked = x.clone().requires_grad_()
        layer(asked).sum().backward()
    assert asked.grad is not None
    Linear().take_off(layer)
    assert torch.equal(layer.weight, 2 * weight)


@pytest.mark.usefixtures("_paying")
@torch.no_grad()
def test_packing_leaves_the_plain_weight_to_who_reads_it() -> None:
    """Another thread may be multiplying by it; when nobody does, its memory is free."""
    layer, x = nn.Linear(64, 256), torch.randn(MANY, 64)
    plain, copied = layer.weight, layer.weight.clone()
    kept = weakref.ref(plain)
    put_on(Linear(), [layer])
    layer(x)
    assert layer.weight.is_mkldnn
    assert torch.equal(plain, copied)
    del plain
    gc.collect()
    assert kept() is None


@pytest.mark.usefixtures("_paying")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", [nn.Linear, attention.Linear])
def test_a_weight_may_be_packed_while_the_plain_way_is_taken(
    make: type[nn.Linear], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, after the layer has read it and before it multiplies."""
    layer, few, many = make(64, 256), torch.randn(1, 3, 128).chunk(2, dim=2)[1], torch.randn(MANY, 64)
    wanted = layer(few)
    put_on(Linear(), [layer])
    multiply = F.linear

    def late(*given: torch.Tensor) -> torch.Tensor:
        monkeypatch.undo()
        with torch.no_grad():
            layer(many)
        return multiply(*given)

    monkeypatch.setattr(F, "linear", late)
    layer.frozen = {0: None}  # type: ignore[assignment]  # both classes multiply by F.linear
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(few), wanted)
    assert layer.weight.is_mkldnn


@pytest.mark.usefixtures("_paying")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [nn.Linear, attention.Linear])
@torch.no_grad()
def test_a_result_does_not_depend_on_what_was_computed_before(make: type[nn.Linear], dtype: torch.dtype) -> None:
    """Another thread's larger request packs a weight, which this one's few rows meet packed or plain: equal bits."""
    torch.manual_seed(0)
    layer = make(320, 640).to(dtype)
    given = [torch.randn(2, rows, 640).to(dtype).chunk(2, dim=2)[1] for rows in (1, 8, ROWS // 2 - 1, ROWS, MANY // 3)]
    put_on(Linear(), [layer])
    first = [layer(x) for x in given]
    assert not layer.weight.is_mkldnn
    layer(torch.randn(MANY, 320).to(dtype))
    assert layer.weight.is_mkldnn
    assert all(torch.equal(layer(x), wanted) for x, wanted in zip(given, first, strict=True))
    with torch.enable_grad():
        packed = [layer(x) for x in given]
        Linear().take_off(layer)
        assert all(torch.equal(layer(x), found) for x, found in zip(given, packed, strict=True))


@pytest.mark.usefixtures("_paying")
def test_a_gradient_takes_the_plain_way() -> None:
    layer, x = nn.Linear(128, 128), torch.randn(64, 128)
    put_on(Linear(), [layer])
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.usefixtures("_paying")
@pytest.mark.parametrize("live", [False, True])
@torch.no_grad()
def test_an_adapter_on_a_packed_layer(live: bool) -> None:
    torch.manual_seed(0)
    parts = {"unet": nn.ModuleDict({"q": nn.Linear(128, 128, bias=False)})}
    layer, x = parts["unet"]["q"], torch.randn(2, MANY, 128)
    adapter = Adapter("a", {"unet.q": Update(torch.randn(4, 128), torch.randn(128, 4))})
    applied = lora.apply(parts, [(adapter, 0.5)], live=live)
    wanted = layer(x)
    applied.remove()
    put_on(Linear(), [layer])
    without = layer(x)
    assert layer.weight.is_mkldnn
    applied = lora.apply(parts, [(adapter, 0.5)], live=live)
    found = layer(x)
    assert (found - wanted).norm() <= BLOCKS.relative * wanted.norm()
    applied.remove()
    assert torch.equal(layer(x), without)


def stands(kind: type[Replacement], layer: nn.Module) -> bool:
    """True if one of ``kind`` replaces the layer's forward, alone or within others."""
    found = layer.__dict__.get("forward")
    while found is not None and not isinstance(found, kind):
        found = found.before
    return found is not None


@pytest.mark.parametrize("pays", [True, False])
def test_only_where_it_pays(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    monkeypatch.setattr("minidiff.fast.linear.SMALLEST", 1)
    sd = tiny_sd()
    layers = [
        m for name in fast.PLACES if name in sd.parts for m in sd.parts[name].modules() if isinstance(m, nn.Linear)
    ]
    assert fast.optimize(sd)["linear"] == len(layers) * pays
    assert all(stands(PackedLinear, m) == pays for m in layers)
    fast.restore(sd)
    assert not any("forward" in m.__dict__ for m in layers)
