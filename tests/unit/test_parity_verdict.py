"""Verdicts from recordings: on equal inputs, by judges, with proposed names, from other tools' files, in other formats;
and below a module the operation at which two sides part."""

from __future__ import annotations

import copy
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import CheckpointError, ConfigError, parity
from minidiff.parity import Report, Row, Writer, automap, difference, recording
from minidiff.parity.comparing import compare
from minidiff.parity.formats import as_json, github
from minidiff.parity.header import Entry
from minidiff.parity.importers import open_source
from minidiff.parity.operations import Call, describe, number
from minidiff.parity.report import reasons, text
from minidiff.parity.values import Source, of_hash, value_of
from tests.support.command import Run, one_error

RNG = np.random.default_rng(1)
COMMON = ("--steps", 2, "--size", "16x16", "--quiet")


def source(title: str, stages: dict[str, Any], identity: str = "", **run: Any) -> Source:
    return Source(title, run, {stage: value_of(np.asarray(x)) for stage, x in stages.items()}, identity)


# on equal inputs


W = [RNG.standard_normal((16, 16)) / 4 for _ in range(6)]


def chain(dtype: str, slip: int | None = None, on: dict[str, Any] | None = None) -> dict[str, Any]:
    """Six layers in numpy; ``slip``: a layer that computes something else; ``on``: values to continue with."""
    x, found = RNG_INPUT.astype(dtype), {}
    for k, w in enumerate(W):
        x = np.tanh(x @ w.astype(dtype)) * np.asarray(1.01 if k == slip else 1, dtype)
        found[f"layer.{k}"] = x
        x = x if on is None else on[f"layer.{k}"].astype(dtype)
    return found


RNG_INPUT = RNG.standard_normal((4, 16))


def other_rounding(found: dict[str, Any]) -> dict[str, Any]:
    return {stage: x + np.float32(6e-8) for stage, x in found.items()}


def test_a_recording_on_the_others_values_shows_what_arises_where() -> None:
    a, b = chain("f4"), chain("f4", slip=3)
    local = chain("f4", slip=3, on=a)
    sides = source("ours", a, "aa"), source("theirs", b, "bb")
    chained = compare(*sides)
    assert not chained.rows[5].chained.equal, "inherited"
    report = compare(*sides, local=source("theirs", local, "ll", on="aa"))
    assert [row.stage for row in report.causes] == ["layer.3"]
    assert report.first is not None
    assert report.first.stage == "layer.3"
    assert report.about["on equal inputs"] == "theirs, on the values of A"
    ours = chain("f4", on=b)
    report = compare(*sides, local=source("ours", ours, "ll", on="bb"))
    assert [row.stage for row in report.causes] == ["layer.3"]
    with pytest.raises(ConfigError, match="recorded on the values of 'cc', and these are aa, bb"):
        compare(*sides, local=source("theirs", local, on="cc"))
    with pytest.raises(ConfigError, match="its run does not say `on`"):
        compare(*sides, local=source("theirs", local))


@pytest.mark.parametrize("which", [0, 1, None])
def test_a_judge_that_cannot_be_held_against_a_stage_gives_no_verdict_on_it(which: int | None) -> None:
    """Another shape, only a hash, float32, and not there at all: of either judge, or of the only one."""
    a, b, good = chain("f4"), other_rounding(chain("f4")), chain("f8")
    other = source("bad", good)
    values: Any = other.values
    values["layer.1"] = value_of(good["layer.1"][:, :8].copy())
    values["layer.2"] = of_hash(Entry("layer.2", sha256="0" * 64, shape=(4, 16), dtype="float64"))
    values["layer.3"] = value_of(good["layer.3"].astype("f4"))
    del values["layer.4"]
    judges = [other] if which is None else [source("good", good), source("good", good)]
    if which is not None:
        judges[which] = other
    judged = [row.judgement is not None for row in compare(source("a", a), source("b", b), judges=judges).rows]
    assert judged == [True, False, False, False, which is not None, True], "with two, the other judges alone"


def test_a_stage_without_values_is_not_judged() -> None:
    """Of one side only a hash is kept, which differs: there is nothing that a judge could be nearer to."""
    a, b = source("a", chain("f4")), source("b", other_rounding(chain("f4")))
    values: Any = b.values
    values["layer.2"] = of_hash(Entry("layer.2", sha256="0" * 64, shape=(4, 16), dtype="float32"))
    report = compare(a, b, judges=[source("good", chain("f8"))])
    assert [row.judgement is not None for row in report.rows] == [True, True, False, True, True, True]


def test_two_judges_tell_rounding_from_another_function() -> None:
    a = chain("f4")
    b = other_rounding(chain("f4", slip=3, on=a))
    local = source("theirs", b, on="aa")
    judges = [source("ours", chain("f8", on=a), on="aa"), source("theirs", chain("f8", slip=3, on=a), on="aa")]
    report = compare(source("ours", a, "aa"), source("theirs", b, "bb"), judges=judges, local=local)
    judged = [row.judgement for row in report.rows]
    assert all(j is not None and j.gap is not None for j in judged)
    assert [j is not None and j.same_function for j in judged] == [True, True, True, False, True, True]
    assert [j.nearer for j in judged if j is not None and j.same_function] == ["A"] * 5
    alone = compare(source("ours", a, "aa"), source("theirs", b, "bb"), judges=judges[:1])
    assert all(row.judgement is not None and row.judgement.gap is None for row in alone.rows)


def test_where_all_differ_a_little_the_jump_is_named() -> None:
    a = {f"layer.{k}": RNG.standard_normal(1000).astype("f4") for k in range(8)}
    noise = {k: np.float32(1e-7 if k < 5 else 1e-3) for k in range(8)}
    b = {f"layer.{k}": a[f"layer.{k}"] * (1 + noise[k]) for k in range(8)}
    told = reasons(compare(source("a", a), source("b", b)))
    assert told["jump"].startswith("the norm of the difference grows most at layer.5, from 1.")
    assert "jump" not in reasons(compare(source("a", a), source("b", b), 1e-5)), "it is the first beyond the tolerance"


# names


def test_names_are_proposed_by_order_shape_and_values() -> None:
    a: dict[str, Any] = {"start/x": RNG.standard_normal((1, 4, 8, 8))}
    for k in range(20):  # layers of one shape, in pairs that only order or values tell apart
        a[f"step.0/unet/down.{k}.norm"] = RNG.standard_normal((2, 16, 8, 8))
        a[f"step.0/unet/down.{k}.conv"] = RNG.standard_normal((2, 16, 8, 8))
    names = {stage: "start/x" if stage == "start/x" else f"blocks_{i}_op" for i, stage in enumerate(a)}
    b: dict[str, Any] = {}
    for i, (stage, x) in enumerate(a.items()):
        if i % 7 == 3:
            b[f"extra_{i}"] = RNG.standard_normal((2, 16, 8, 8))  # a stage that the first does not show
        if i != 11:  # and one that the second does not
            b[names[stage]] = x + 1e-6 * RNG.standard_normal(x.shape)
    pairs = automap.propose(source("a", a), source("b", b))
    found = automap.as_names(pairs)
    expected = {x: y for x, y in names.items() if x != y and y in b}
    assert {x: y for x, y in found.items() if x in expected} == expected
    assert {p.confidence for p in pairs if p.a in expected} == {"values"}
    report = compare(source("a", a), source("b", b), 1e-4, names=found)
    assert [row.stage for row in report.rows if not row.chained.within(1e-4)] in ([], [list(a)[11]])


def test_a_name_is_given_to_one_stage_only() -> None:
    a, b = source("a", {"x": np.ones(2), "y": np.ones(2)}), source("b", {"x": np.ones(2), "z": np.ones(2)})
    with pytest.raises(ConfigError, match="names: the second recording has a stage 'x' of its own"):
        compare(a, b, names={"x": "z"})
    assert compare(a, b, names={"x": "z", "y": "x"}).equal, "unless it has another name"


def test_confidence_falls_with_distance() -> None:
    x = RNG.standard_normal((3, 50))
    a = {f"a{k}": x[k] for k in range(3)}
    b = {"b0": x[0], "b1": x[1] * 1.3, "b2": RNG.standard_normal(50)}
    pairs = automap.propose(source("a", a), source("b", b))
    assert [(p.a, p.b, p.confidence) for p in pairs] == [
        ("a0", "b0", "values"),
        ("a1", "b1", "likely"),
        ("a2", "b2", "order and shape"),
    ]
    told = automap.table(pairs)
    assert told.startswith("names proposed for 3 stages (1 by values, 1 likely, 1 by order and shape):")
    with pytest.raises(ConfigError, match="no stage of a has the shape of one of b"):
        automap.propose(source("a", {"x": x}), source("b", {"y": x[0]}))
    empty = {"e": np.zeros((0, 2)), "n": np.float64(3)}, {"f": np.zeros((0, 2)), "m": np.float64(3)}
    assert automap.as_names(automap.propose(source("a", empty[0]), source("b", empty[1]))) == {"n": "m"}
    same = automap.propose(source("a", {"x": x}), source("b", {"x": x}))
    assert automap.table(same) == "no names proposed: every stage that has a counterpart is called the same"


def test_a_pair_is_sure_if_no_other_stage_is_nearly_as_near() -> None:
    def sure(distance: float, rival: float) -> str:
        return automap.Pair("a", "b", distance, rival).confidence

    order = "values and order"
    assert [sure(0.01, r) for r in (0.021, 0.02, 0.011, 0.01, 0.0)] == ["values", order, order, order, order]
    assert [sure(d, 9.0) for d in (0.01, 0.011, 0.5, 0.51)] == ["values", "likely", "likely", "order and shape"]
    assert [sure(0.3, r) for r in (0.31, 0.3)] == ["likely", "order and shape"]


def test_equal_values_of_several_stages_are_told_apart_by_order_and_words() -> None:
    """A dropout that does nothing, and a block that ends with it: three stages with the same values, of which the other
    program has two. The third is not paired with a stage that only has its shape."""
    x, y, z = RNG.standard_normal((3, 50))
    a = {"down.0.attn1.out": x, "down.0.attn1": x, "down.0.norm2:in": y, "down.0.norm2": z}
    b = {"blocks.0.attn1.to_out.0": x, "blocks.0.attn1.to_out.1": x, "blocks.0.attn1": x, "blocks.0.norm2": z}
    noise = 1e-7 * RNG.standard_normal((4, 50))
    pairs = automap.propose(source("a", a), source("b", {n: v + e for (n, v), e in zip(b.items(), noise, strict=True)}))
    assert [(p.a, p.b, p.confidence) for p in pairs] == [
        ("down.0.attn1.out", "blocks.0.attn1.to_out.0", "values and order"),
        ("down.0.attn1", "blocks.0.attn1", "values and order"),
        ("down.0.norm2", "blocks.0.norm2", "values"),
    ]
    assert "(1 by values, 2 by values and order)" in automap.table(pairs)
    slip = {**b, "blocks.0.norm2": RNG.standard_normal(50)}
    del a["down.0.norm2:in"]
    last = automap.propose(source("a", a), source("b", slip))[-1]
    assert (last.a, last.confidence) == ("down.0.norm2", "order and shape"), "a stage that is found nowhere still is"


def test_names_see_through_layouts(tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 3, 5, 7)).astype("f4")
    with Writer(tmp_path / "a", "a") as a, Writer(tmp_path / "b", "b", layout="NHWC") as b:
        a.add("conv", x)
        b.add("Conv_0", x.transpose(0, 2, 3, 1))
    with open_source(tmp_path / "a") as left, open_source(tmp_path / "b") as right:
        (pair,) = automap.propose(left, right)
        assert (pair.distance, pair.confidence) == (0, "values")


# other tools' files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_whose_bytes_are_damaged(save: Any, tmp_path: Path) -> None:
    """The sum is checked when the end is reached, behind the header that was read before."""
    save(tmp_path / "a.npz", x=np.arange(50_000, dtype=np.float64))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for k in range(len(data) // 2, len(data) // 2 + 40):
        data[k] ^= 0x5A
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.npz: array 'x' cannot be read \("):
        open_source(tmp_path / "a.npz").values["x"].read(0, 50_000)


def test_npz(tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 3)).astype("f4")
    arrays = {"x": x, "t": np.int64(3), "f": np.asfortranarray(x), "none": np.zeros((0, 2)), "b": x.astype(">f4")}
    for save, name in ((np.savez, "a.npz"), (np.savez_compressed, "b.npz")):
        save(tmp_path / name, **arrays)
        with open_source(tmp_path / name) as found:
            assert list(found.values) == list(arrays)
            for stage, array in arrays.items():
                assert np.array_equal(found.values[stage].array(), array), stage
                assert np.array_equal(found.values[stage].array(), array), "and once more"
    np.savez(tmp_path / "o.npz", x=np.array([{}], object))
    with pytest.raises(CheckpointError, match="array 'x' is of object, which recordings do not have"):
        open_source(tmp_path / "o.npz")
    data = (tmp_path / "a.npz").read_bytes()
    for shape, said in ((b"(9, 9)", r"\(9, 9\)"), (b"(-2, -3)", r"\(-2, -3\)")):
        with zipfile.ZipFile(tmp_path / "a.npz") as whole, zipfile.ZipFile(tmp_path / "l.npz", "w") as lying:
            room = b"(2, 3), }" + b" " * (len(shape) - 6)
            lying.writestr("x.npy", whole.read("x.npy").replace(room, shape + b", }"))
        with pytest.raises(CheckpointError, match=f"array 'x' has shape {said}, and other bytes"):
            open_source(tmp_path / "l.npz")
    (tmp_path / "c.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "c.npz")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_dumps_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 3)
    torch.save({"x": x, "deep": {"list": [x.half(), x.bfloat16()]}, "note": "text"}, tmp_path / "d.pt")
    with open_source(tmp_path / "d.pt") as found:
        assert list(found.values) == ["x", "deep/list/0", "deep/list/1"]
        assert np.array_equal(found.values["x"].array(), x.numpy())
        assert np.array_equal(found.values["deep/list/1"].array(), x.bfloat16().float().numpy())
    torch.save(x, tmp_path / "one.pt")
    with open_source(tmp_path / "one.pt") as found:
        assert list(found.values) == ["output"]
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(CheckpointError, match="not a dump of tensors alone") as e:
        open_source(tmp_path / "evil.pt")
    assert "\n" not in str(e.value)
    assert capsys.readouterr().out == "", "nothing in it is run"
    for odd in (x.to_sparse(), x.to(torch.complex64)):
        torch.save({"x": odd}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match="dump it dense and real"):
            open_source(tmp_path / "odd.pt")
    torch.save({"note": "text"}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_source(tmp_path / "none.pt")


def node(path: str, outputs: Any, *children: Any) -> dict[str, Any]:
    return {"module_path": path, "inputs": None, "outputs": outputs, "children": list(children)}


def printed(x: Tensor) -> dict[str, Any]:
    """A tensor as transformers' debugging tree has it."""
    torch.set_printoptions(sci_mode=True, linewidth=120)
    try:
        lines = repr(x).splitlines()
    finally:
        torch.set_printoptions(profile="default")
    return {"shape": repr(x.shape), "dtype": repr(x.dtype), "value": lines, "mean": "0", "std": "1"}


def test_the_debugging_tree_of_transformers(tmp_path: Path) -> None:
    small, large = torch.randn(2, 3), torch.randn(4, 40, 50)
    tree = node("Model", None, node("Model.fc", printed(small)), node("Model.wide", [printed(large)]))
    tree["children"].append(node("Model.fc", printed(small)))
    (tmp_path / "t.json").write_text(json.dumps(tree))
    with Writer(tmp_path / "r", "mine") as r:
        r.add("fc", small.numpy())
        r.add("wide", large.numpy())
        r.add("fc#2", small.numpy() + 1)
    with open_source(tmp_path / "t.json") as found, open_source(tmp_path / "r") as mine:
        assert found.title == "transformers' debugging tree of Model, slices only"
        assert {s: v.shape for s, v in found.values.items()} == {"fc": (2, 3), "wide": (4, 6, 6), "fc#2": (2, 3)}
        for pair in ((found, mine), (mine, found)):
            report = compare(*pair, 1e-3)
            assert [row.chained.within(1e-3) for row in report.rows] == [True, True, False], text(report)
            assert report.rows[1].chained.total == 4 * 6 * 6
    for odd in (8, True, {"module_path": "m"}, "x"):
        (tmp_path / "o.json").write_text(json.dumps(tree | {"children": odd}))
        with pytest.raises(CheckpointError, match=r"o\.json: the children of 'output' are .*, and should be a list"):
            open_source(tmp_path / "o.json")
    tree["children"][0]["outputs"]["shape"] = "torch.Size([2, 4])"
    (tmp_path / "t.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="of which 8 numbers are printed, and lists 6"):
        open_source(tmp_path / "t.json")
    tree["children"][0]["outputs"]["shape"] = f"torch.Size([{'9' * 5000}])"
    (tmp_path / "t.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="numbers are printed, and lists 6"):
        open_source(tmp_path / "t.json")
    tree["children"][0]["outputs"] |= {"value": "./../secret.safetensors"}
    (tmp_path / "t.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="outside of the tree's folder"):
        open_source(tmp_path / "t.json")
    for wrong, said in (
        ("[1]", "not the debugging tree"),
        ('{"a": 1}', "not the debugging tree"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "t.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=said):
            open_source(tmp_path / "t.json")


def test_a_tree_whose_tensors_lie_beside_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    x = torch.randn(3, 4)
    save_file({"data": x}, tmp_path / "Model.fc_outputs.safetensors")
    told = {"shape": repr(x.shape), "dtype": repr(x.dtype), "value": "./Model.fc_outputs.safetensors"}
    (tmp_path / "t.json").write_text(json.dumps(node("Model", None, node("Model.fc", told))))
    with open_source(tmp_path / "t.json") as found:
        assert found.title == "transformers' debugging tree of Model"
        assert np.array_equal(found.values["fc"].array(), x.numpy())


# formats


def test_formats() -> None:
    a, b = {"x": np.ones(4), "y": np.ones(3)}, {"x": np.array([1, 1, 1, 1.5]), "y": np.ones(2), "z": np.ones(1)}
    report = compare(source("a: 50 %", a), source("b", b))
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert (found["equal"], found["first"], found["only_b"]) == (False, "x", ["z"])
    assert found["stages"][0]["max_abs"] == 0.5
    assert found["stages"][1] == {"stage": "y", "within": False, "equal": False, "shape_a": [3], "shape_b": [2],
                                  "local": None, "judgement": None}  # fmt: skip
    lines = github(report).split("\n")
    assert lines[0].startswith("::error title=a%3A 50 %25 and b::first difference at x%0Ahow far: max abs 0.5")
    assert (lines[1], lines[-1]) == ("::group::every section", "::endgroup::")
    same = github(compare(source("a", a), source("a", a)))
    assert same.startswith("::notice title=a and a::equal: every value is equal at all 2 stages\n")
    nan = as_json(compare(source("a", {"x": np.array([np.nan])}), source("b", {"x": np.array([1.0])})))
    assert nan["stages"][0]["max_abs"] == "nan"


# the operation


class Block(nn.Module):
    """A block with the norm, the product and the attention that ports get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 8)
        self.act = "gelu"

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).transpose(1, 2)
        h = self.fc(h)
        h = F.gelu(h, approximate="none" if self.act == "gelu" else "tanh")
        return F.scaled_dot_product_attention(h, h, h).transpose(1, 2)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def operation(change: Any, names: dict[str, str] | None = None) -> str:
    torch.manual_seed(0)
    a = Whole()
    b = copy.deepcopy(a)
    change(b.inner)
    report = parity.compare(a, b, torch.randn(2, 8, 5), names or {"inner": "inner"})
    assert report.first is not None
    return reasons(report)["operation"]


def test_the_operation_at_which_two_modules_part() -> None:
    def eps(block: Block) -> None:
        block.norm.eps = 1e-3

    def weight(block: Block) -> None:
        block.fc.weight.data[0, 0] += 1

    def act(block: Block) -> None:
        block.act = "tanh"

    assert operation(eps).startswith("aten.native_group_norm(")
    assert "1e-05) in A" in operation(eps)
    assert operation(eps).endswith("0.001) in B")
    assert operation(weight).startswith(("aten.mm(", "aten.addmm("))
    assert operation(weight).endswith(", on other weights")
    assert operation(act) == "aten.gelu() in A, aten.gelu('tanh') in B"


def test_no_mode_is_left_behind_by_a_run_that_fails() -> None:
    class Failing(Block):
        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a mode")
            return super().forward(x) * 2

    a = Whole()
    b = copy.deepcopy(a)
    b.inner.__class__ = Failing
    report = parity.compare(a, b, torch.randn(2, 8, 5), {"inner": "inner"})
    assert report.first is not None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_equal_modules_are_run_under_no_mode() -> None:
    a = Whole()
    report = parity.compare(a, copy.deepcopy(a), torch.randn(2, 8, 5))
    assert report.equal
    assert all(row.operation is None for row in report.rows)


def test_a_hash_of_numbers_does_not_depend_on_their_order() -> None:
    x = torch.randn(3, 4)
    assert number(x) == number(x.t()) == number(x.reshape(-1)) == number(x.clone())
    assert number(x) != number(x + 1)
    assert number(torch.tensor([0.0])) == number(torch.tensor([-0.0]))
    assert number(torch.tensor([1, 2])) != number(torch.tensor([1, 3]))
    assert describe(None, None) == ""
    call = Call("aten.add", ("1",), (), (1,))
    assert describe(call, None) == "aten.add(1) in A, no operation of its own in B"
    assert len(str(Call("aten.cat", ("1" * 500,), (), ()))) <= 120


# the commands


def test_record_on_the_values_of_another(run: Run, models: Path, tmp_path: Path) -> None:
    run("parity", "record", models / "text.safetensors", "a.safetensors", *COMMON)
    found = recording.read_recording(tmp_path / "a.safetensors")
    stage = "step.0/unet/mid.res1.conv1"
    tape = {s: v * 1.01 if s == stage else v for s, v in found.tape.items()}
    foreign = recording.Recording(tape, {**found.run, "program": "port"})
    recording.write_recording(tmp_path / "b.safetensors", foreign)
    run("parity", "record", models / "text.safetensors", "l.safetensors", *COMMON, "--on", "b.safetensors")
    status, out, _ = run("parity", "compare", "l.safetensors", "b.safetensors")
    assert status == 1
    differing = [line.split()[0] for line in run("parity", "compare", "l.safetensors", "b.safetensors", "--all")[1]
                 if " no  " in line]  # fmt: skip
    assert stage in differing
    assert all(s.startswith((stage, "step.0/unet/mid.res1")) or s.endswith(":in") for s in differing), (
        "the slip, and what is computed around it: nothing is inherited"
    )
    status, out, _ = run("parity", "compare", "a.safetensors", "b.safetensors", "--local", "l.safetensors")
    assert f"first difference at {stage}" in out
    one_error(run("parity", "record", models / "text.safetensors", "m.safetensors", "--steps", 1, "--size", "16x16",
                  "--on", "b.safetensors"), "different runs: steps is 1 and 2")  # fmt: skip
    one_error(
        run("parity", "compare", "a.safetensors", "b.safetensors", "--local", "a.safetensors"), "does not say `on`"
    )


def test_hashes_of_a_run(run: Run, models: Path, tmp_path: Path) -> None:
    run("parity", "record", models / "plain.safetensors", "a.safetensors", "--steps", 2, "--quiet")
    status, _, err = run("parity", "record", models / "plain.safetensors", "h.safetensors", "--steps", 2, "--hashes")
    assert status == 0
    assert "stages, 0.0 MB" in err[0]
    assert (tmp_path / "h.safetensors").stat().st_size < (tmp_path / "a.safetensors").stat().st_size
    assert run("parity", "compare", "a.safetensors", "h.safetensors")[0] == 0
    run("parity", "record", models / "plain.safetensors", "o.safetensors", "--steps", 2, "--seed", 1, "--quiet")
    found = recording.read_recording(tmp_path / "o.safetensors")
    other = recording.Recording(found.tape, {**found.run, "seed": 0})
    recording.write_recording(tmp_path / "p.safetensors", other)
    status, out, _ = run("parity", "compare", "p.safetensors", "h.safetensors")
    assert status == 1
    assert "first difference at start/x" in out


def test_names_and_formats_of_the_command(run: Run, tmp_path: Path) -> None:
    x = RNG.standard_normal((1, 4, 8, 8)).astype("f4")
    with Writer(tmp_path / "a.safetensors", "ours", steps=1) as a:
        a.add("start/x", x)
        a.add("step.0/x", x * 2)
    np.savez(tmp_path / "b.npz", first=x, second=x * np.float32(2.001))
    pair = ("a.safetensors", "b.npz")
    one_error(run("parity", "compare", *pair), "no stage is common to both: ours has 'start/x', 'step.0/x', ...")
    status, out, err = run("parity", "compare", *pair, "--names", "auto", "--write-names", "n.json")
    assert status == 1
    assert err[0] == "minidiff: names proposed for 2 stages (2 by values):"
    assert "first difference at step.0/x" in out
    assert json.loads((tmp_path / "n.json").read_text()) == {"start/x": "first", "step.0/x": "second"}
    assert run("parity", "compare", *pair, "--names", "n.json", "--tolerance", "0.01") == (0, out_of(run, pair), [])
    status, out, _ = run("parity", "compare", *pair, "--names", "n.json", "--format", "json")
    assert (status, json.loads("\n".join(out))["first"]) == (1, "step.0/x")
    assert run("parity", "compare", *pair, "--names", "n.json", "--format", "github")[1][0].startswith("::error title=")
    assert run("parity", "compare", *pair, "--names", "n.json", "--format", "html")[1][0] == "<!doctype html>"
    one_error(run("parity", "compare", *pair, "--names", "none.json"), "none.json: no such file")
    one_error(run("parity", "compare", *pair, "--names", "auto", "--write-names", "n.json"), "already exists")
    (tmp_path / "m.json").write_text('{"start/x": "first", "step.0/x": "first"}')
    one_error(run("parity", "compare", *pair, "--names", "m.json"), "gives one stage of the second recording to two")
    (tmp_path / "m.json").write_text('["start/x"]')
    one_error(run("parity", "compare", *pair, "--names", "m.json"), "should be a JSON object of names")
    (tmp_path / "m.json").write_text('{"start/y": "first"}')
    one_error(run("parity", "compare", *pair, "--names", "m.json"), "the first recording has no stage 'start/y'")
    one_error(run("parity", "compare", *pair, "--format", "xml"), "--format")
    one_error(run("parity", "compare", *pair, "--write-names", "new.json"), "add --names auto")
    one_error(run("parity", "compare", *pair, *("--judge", "a.safetensors") * 3), "--judge is given 3 times")


def out_of(run: Run, pair: tuple[str, str]) -> list[str]:
    return run("parity", "compare", *pair, "--names", "n.json", "--tolerance", "0.01")[1]


def test_a_row_shows_its_noise() -> None:
    x = RNG.standard_normal(1000)
    row = Row("x", difference(x, x * (1 + 1e-3)))  # type: ignore[arg-type]
    assert "60 dB" in text(Report("a", "b", [row]))
    assert math.isclose(row.chained.snr, 60, abs_tol=0.1)
