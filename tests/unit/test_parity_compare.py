"""``parity.compare`` and its differences on modules small enough for the answer to be known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import ConfigError, parity
from minidiff.parity.difference import difference, ulps
from minidiff.parity.names import present, with_blocks
from minidiff.parity.report import outcome, reasons, text
from minidiff.parity.stages import unet_inputs
from minidiff.parity.taps import in_float64, swap_first
from minidiff.pipeline import random_model
from tests.support import tiny

# ULPs and differences


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ulps_count_the_floats_between(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    after = torch.nextafter(one.double(), torch.tensor(2.0).double()) if dtype == torch.float64 else None
    step = one + torch.finfo(dtype).eps if after is None else after
    assert ulps(one, step) == 1
    assert ulps(-one, -step) == 1
    assert ulps(one, 2 * one) == round(1 / torch.finfo(dtype).eps)
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype)
    assert ulps(tiny, -tiny) == 2 * ulps(tiny, 0 * tiny), "across zero"
    assert ulps(0 * one, -0.0 * one) == 0
    assert ulps(torch.stack([one, one]), torch.stack([one, step])) == 1, "the largest counts"


def test_ulps_do_not_overflow() -> None:
    most = torch.finfo(torch.float64).max
    assert ulps(torch.tensor([most]).double(), torch.tensor([-most]).double()) == 2**63 - 1


def test_ulps_of_mixed_dtypes_are_the_coarser_ones() -> None:
    assert ulps(torch.tensor([1.0]), torch.tensor([1.0 + 2**-10]).half()) == 1


def test_a_difference_says_how_far() -> None:
    d = difference(torch.tensor([1.0, -4.0, 2.0]), torch.tensor([1.0, -4.0, 2.5]))
    assert (d.max_abs, d.max_rel, d.differing, d.total) == (0.5, 0.125, 1, 3)
    assert d.ulps == 2**21
    assert not d.equal
    assert d.within(0.125)
    assert not d.within(0.12)
    assert difference(torch.zeros(2), -torch.zeros(2)).equal
    assert difference(torch.tensor([1, 2]), torch.tensor([1.0, 2.0])).equal, "values count, not dtypes"
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 4])).max_abs == 2
    assert difference(torch.tensor([math.inf]), torch.tensor([math.inf])).equal
    assert difference(torch.tensor([math.inf, 1]), torch.tensor([math.inf, 2])).max_abs == 1
    assert not difference(torch.tensor([math.inf]), torch.tensor([1.0])).within(1e9)
    assert difference(torch.zeros(0), torch.zeros(0)).equal


def test_shapes_and_nans_are_never_within() -> None:
    assert not difference(torch.zeros(2), torch.zeros(3)).within(math.inf)
    d = difference(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]))
    assert (d.bad_a, d.bad_b) == (1, 1)
    assert not d.within(math.inf), "NaN equals nothing"
    whole, holed = torch.tensor([1.0, 2.0]), torch.tensor([math.nan, 2.0])
    for a, b, bad in ((whole, holed, (0, 1)), (holed, whole, (1, 0))):
        d = difference(a, b)
        assert (d.bad_a, d.bad_b) == bad
        assert math.isnan(d.max_abs)
        assert math.isnan(d.max_rel)
        assert d.ulps is None
        assert not d.within(math.inf), "on one side"


# comparing modules


class Block(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(6, 8), nn.Linear(8, 6), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.act(self.first(x)))
        return out


class Net(nn.Module):
    """One block after another."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(act), Block()])
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class Other(nn.Module):
    """The same network in other words, called by keyword, that answers with a dict."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"l{k}": b for k, b in enumerate(net.blocks)})
        self.final = net.norm

    def forward(self, *, hidden: Tensor) -> dict[str, Any]:
        for layer in self.layers.values():
            hidden = layer(hidden)
        return {"flag": True, "out": self.final(hidden)}


NAMES = {f"blocks.{k}.{leaf}": f"layers.l{k}.{leaf}" for k in range(3) for leaf in ("first", "second")}
NAMES["norm"] = "final"
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def nets(act: Callable[[Tensor], Tensor] = torch.relu) -> tuple[Net, Net]:
    torch.manual_seed(0)
    a, b = Net(), Net(act)
    b.load_state_dict(a.state_dict())
    return a, b


def test_equal_modules_under_other_names() -> None:
    a, b = nets()
    report = parity.compare(a, Other(b), X, NAMES, inputs_b={"hidden": X})
    assert report.equal
    assert report.first is None
    stages = [row.stage for row in report.rows]
    assert stages[:4] == ["blocks.0:in", "blocks.0.first:in", "blocks.0.first", "blocks.0.second:in"]
    assert "blocks.1" in stages, "the block follows from what it holds"
    assert stages[-1] == "output"
    assert outcome(report) == f"equal: every value is equal at all {len(stages)} stages"
    assert reasons(report) == {}


def test_blocks_are_paired_by_what_they_hold() -> None:
    a, b = nets()
    found = with_blocks(a, Other(b), {k: v for k, v in NAMES.items() if k != "blocks.1.second"})
    assert found["blocks.0"] == "layers.l0"
    assert found["blocks.1"] == "layers.l1", "of what is named it holds the same"
    crossed = dict(NAMES) | {"blocks.0.first": "layers.l1.first", "blocks.1.first": "layers.l0.first"}
    assert "blocks.0" not in with_blocks(a, Other(b), crossed)


def test_a_name_that_either_side_lacks_is_left_out() -> None:
    a, b = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    assert present(a, b, {"0": "0", "1": "0", "2": "0"}) == {"0": "0", "1": "0"}
    assert present(b, a, {"0": "1", "1": "1"}) == {"0": "1"}
    assert present(b, a, {"0": "2"}) == {}


def test_a_weight_is_named() -> None:
    a, b = nets()
    with torch.no_grad():
        b.blocks[1].second.weight += 0.1
    report = parity.compare(a, b, X)
    assert report.first is not None
    assert report.first.stage == "blocks.1.second"
    assert report.first.judgement is not None
    assert not report.first.judgement.same_function
    assert [row.stage for row in report.causes] == ["blocks.1.second"]
    assert "computes something else" in reasons(report)["where"]
    last = report.rows[-1]
    assert last.stage == "output"
    assert not last.chained.equal, "inherited"
    assert last.local is not None
    assert last.local.equal, "but not made there"


def test_an_activation_is_named_by_the_module_behind_it() -> None:
    a, b = nets(torch.tanh)
    report = parity.compare(a, b, (X,))
    assert report.first is not None
    assert report.first.stage == "blocks.1.second:in"
    assert "between blocks.1.first and it" in reasons(report)["where"]


def test_a_block_that_drops_its_skip_is_named() -> None:
    a, b = nets()
    block = b.blocks[2]
    block.forward = lambda x: block.second(torch.relu(block.first(x)))  # type: ignore[method-assign]
    report = parity.compare(a, b, X)
    assert report.first is not None
    assert report.first.stage == "blocks.2"
    assert "inside this block" in reasons(report)["where"]


def test_rounding_has_a_nearer_side() -> None:
    a, b = nets()
    layer = b.blocks[0].first
    layer.forward = lambda x: nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).to(x.dtype)
    big = X * 100 + 3
    report = parity.compare(a, b, big)
    assert report.first is not None
    assert report.first.stage == "blocks.0.first"
    judgement = report.first.judgement
    assert judgement is not None
    assert judgement.same_function
    assert judgement.nearer == "B"
    assert reasons(report)["float64"].startswith("rounding: in float64 the two agree")
    assert parity.compare(a, b, big, tolerance=1e-5).equal
    assert parity.compare(a, b, big, judge=False).first.judgement is None  # type: ignore[union-attr]


def test_a_side_that_cannot_run_in_float64_is_held_against_the_other_one() -> None:
    a, b = nets()
    layer = b.blocks[0].first

    def narrow(x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel for float64")
        return nn.functional.linear(x, layer.weight, layer.bias) * (1 + 1e-5)

    layer.forward = narrow
    first = parity.compare(a, b, X).first
    assert first is not None
    assert first.stage == "blocks.0.first"
    assert first.judgement is not None
    assert first.judgement.gap is None
    assert first.judgement.nearer == "A"


def test_small_differences_that_add_up_are_said_to() -> None:
    a, b = (nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(8))) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        nn.init.orthogonal_(x.weight)
        y.weight.data = x.weight.data * (1 + 1e-4)
    report = parity.compare(a, b, X, tolerance=3.5e-4)
    assert not report.equal
    assert report.causes == []
    assert report.first is not None
    assert report.first.stage == "3", "(1 + 1e-4) ** 4 is beyond it"
    assert "added up" in reasons(report)["where"]
    assert parity.compare(a, b, X, tolerance=1e-3).equal


def test_the_modules_are_left_as_they_were() -> None:
    a, b = nets(torch.tanh)
    before = dict(b.named_parameters())
    state = torch.get_rng_state()
    parity.compare(a, b, X)
    assert all(p is before[name] and p.dtype == torch.float32 for name, p in b.named_parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for net in (a, b) for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError):
        parity.compare(a, b, torch.zeros(4, 7))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for net in (a, b) for m in net.modules())


def test_dropout_draws_the_same_on_both_sides() -> None:
    a, b = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6))
    b.load_state_dict(a.state_dict())
    assert parity.compare(a, b, X).equal


def test_a_module_that_writes_into_its_input_is_compared_as_any() -> None:
    a = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    b = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    b.load_state_dict(a.state_dict())
    assert parity.compare(a, b, X).equal


def test_a_module_that_is_called_twice_is_numbered() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x))
            return out

    a, b = Twice(), Twice()
    b.load_state_dict(a.state_dict())
    stages = [row.stage for row in parity.compare(a, b, X).rows]
    assert stages == ["layer:in", "layer", "layer#2:in", "layer#2", "output"]


def test_one_line_for_names_that_do_not_fit() -> None:
    a, b = nets()
    with pytest.raises(ConfigError, match=r"module b has no 'blocks.0.frist'; did you mean 'blocks.0.first'\?"):
        parity.compare(a, b, X, {"blocks.0.first": "blocks.0.frist"})
    with pytest.raises(ConfigError, match="module a has no 'x'"):
        parity.compare(a, b, X, {"x": "norm"})
    with pytest.raises(ConfigError, match="no name in common"):
        parity.compare(nn.Sequential(nn.Linear(6, 6)), Other(b), X)
    with pytest.raises(ConfigError, match="names is empty"):
        parity.compare(a, b, X, {})


def test_other_shapes_are_a_difference() -> None:
    a, b = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 5))
    report = parity.compare(a, b, X)
    assert report.first is not None
    assert report.first.stage == "0"
    assert reasons(report)["how far"] == "shape (4, 4) in A, (4, 5) in B"


def test_swapping_rebuilds_what_holds_the_tensor() -> None:
    one, other = torch.zeros(2), torch.ones(2)
    for value in (one, (one, 5), [None, one], {"flag": 1, "out": one}, (3, {"x": [one]})):
        seen: list[Tensor] = []

        def change(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return other

        new, found = swap_first(value, change)
        assert found
        assert len(seen) == 1
        assert seen[0] is one
        assert type(new) is type(value)
        swap_first(new, change)
        assert seen[1] is other
    assert swap_first((1, "x"), lambda x: x) == ((1, "x"), False)
    fixed = MappingProxyType({"out": one})
    assert swap_first(fixed, lambda x: other) == (fixed, True), "what cannot be rebuilt stays as it is"
    assert fixed["out"] is one


def test_in_float64_and_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = list(net.state_dict(keep_vars=True).values())
    with in_float64([net]):
        assert net[0].weight.dtype == net[1].running_mean.dtype == torch.float64
        assert net[1].num_batches_tracked.dtype == torch.int64
    assert all(x is y for x, y in zip(net.state_dict(keep_vars=True).values(), before, strict=True))


# what is shown


def test_the_table_shows_the_place_and_its_surroundings() -> None:
    a, b = nets(torch.tanh)
    report = parity.compare(a, b, X)
    page = text(report)
    assert str(report) == page
    (marked,) = [line for line in page.splitlines() if line.startswith("blocks.1.second:in")]
    assert marked.endswith("neither  <- first difference")
    assert "\nfirst difference at blocks.1.second:in\n" in page
    assert "blocks.0:in" not in page
    assert "blocks.0:in" in text(report, every=True)
    assert all(len(line) < 200 and line == line.rstrip() for line in page.splitlines())


def test_the_page_needs_nothing_else() -> None:
    a, b = nets(torch.tanh)
    for report in (parity.compare(a, b, X), parity.compare(a, a, X)):
        page = parity.page(report)
        for outside in ("http:", "https:", "src=", "<script", "<link", "@import", "url("):
            assert outside not in page
        assert page.count("<circle") >= len(report.rows)
        assert all(f"<td>{row.stage}</td>" in page for row in report.rows)
        assert outcome(report) in page
        assert "&lt;-" not in page, "a class marks what the table in text marks by an arrow"
        assert len(page) < 60_000


def test_the_parts_of_an_inpainting_input_are_told_apart() -> None:
    """Latents, mask and the masked picture's latents go into the UNet as one tensor of nine channels."""
    model = random_model(tiny.SD)
    ((sample, place, names), *_) = unet_inputs(model.parts)
    assert (place, names) == (0, ("x", "sample"))
    x = torch.arange(9.0).reshape(1, 9, 1, 1)
    seen: dict[str, list[float]] = {}

    class Shows:
        def show(self, name: str, value: Tensor) -> Tensor:
            seen[name] = value.flatten().tolist()
            return value + 10 if name == "mask" else value

    after = sample(Shows(), x)  # type: ignore[arg-type]
    assert seen == {"input": [0, 1, 2, 3], "mask": [4], "masked": [5, 6, 7, 8]}
    assert after.flatten().tolist() == [0, 1, 2, 3, 14, 5, 6, 7, 8]
    seen.clear()
    assert sample(Shows(), x[:, :4]) is not None  # type: ignore[arg-type]
    assert seen == {"input": [0, 1, 2, 3]}


def test_the_page_names_the_parts_that_have_room_for_it() -> None:
    a, b = nets(torch.tanh)
    rows = parity.compare(a, b, X).rows
    report = parity.Report(
        "A", "B", [replace(row, stage=f"{'many' if k else 'a' * 99}/{k}") for k, row in enumerate(rows)]
    )
    page = parity.page(report)
    assert ">many</text>" in page
    assert f"{'a' * 99}</text>" not in page
    assert f"{'a' * 99}/0" in page


def test_the_page_escapes_names() -> None:
    a, b = nets()
    report = parity.compare(a, b, X)
    page = parity.page(parity.Report("<b>&", "B", report.rows, only_a=["<script>"]))
    assert "<script" not in page
    assert "&lt;b&gt;&amp;" in page
