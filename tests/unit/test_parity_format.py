"""The format of recordings: the writer of one file, the header, layouts, branches, hashes, hostile files."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minidiff import CheckpointError, ConfigError, UnsupportedError
from minidiff.parity import Writer, assert_recording, difference, header, writer
from minidiff.parity.comparing import compare
from minidiff.parity.difference import Tally, measure
from minidiff.parity.header import RUN_KEY, STAGES_KEY, VERSION_KEY
from minidiff.parity.importers import open_source
from minidiff.parity.report import Report, outcome, reasons
from minidiff.parity.values import BLOCK, PIECE, Value, open_recording, pieces, sha256_of, value_of
from minidiff.storage.table import header_hash

HERE = Path(writer.__file__).parent
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5)).astype("f4")
Array = Any


def written(path: Path, stages: dict[str, Any], **run: Any) -> Path:
    """A recording; a value is an array, or a pair of one and options of ``add``."""
    with Writer(path, run.pop("program", "mine"), **run) as recording:
        for stage, value in stages.items():
            array, options = value if isinstance(value, tuple) else (value, {})
            recording.add(stage, array, **options)
    return path


def held(a: Path, b: Path, *rest: Any, **options: Any) -> Report:
    with open_source(a) as x, open_source(b) as y:
        return compare(x, y, *rest, **options)


# the writer


def test_what_the_writer_writes_is_read_as_it_was(tmp_path: Path) -> None:
    stages = {
        "z": X,
        "a/ids": np.arange(4),
        "empty": np.zeros((0, 3), "f2"),
        "no dimension": np.float64(2.5),
        "bits": np.array([True, False]),
        "backwards": np.asfortranarray(X[0, 0]),
        "big": X.astype(">f4"),
    }
    path = written(tmp_path / "r.safetensors", stages, version="1.2", steps=3)
    with open_recording(path) as found:
        assert list(found.values) == list(stages), "in the order of computation"
        assert (found.title, found.run["steps"]) == ("mine 1.2", 3)
        for stage, array in stages.items():
            value = found.values[stage]
            assert value.shape == np.shape(array)
            assert np.array_equal(value.array(), array), stage
    assert set(load_file(path)) == set(stages), "any reader of safetensors reads it"
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"], "no temporary file is left"


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with Writer(tmp_path / "r.safetensors", "mine") as recording:
            recording.add("x", X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "value", "options", "said"),
    [
        ("x", X, {}, "was added before"),
        ("", X, {}, "the name is empty"),
        ("__metadata__", X, {}, "reserved"),
        ("y", X.astype("c8"), {}, "complex64 as complex64 is not stored; widen it"),
        ("y", X, {"stored": "bfloat16"}, "float32 as bfloat16 is not stored"),
        ("y", X[0], {"layout": "NHWC"}, r"layout='NHWC' does not fit the shape \(3, 4, 5\)"),
        ("y", X, {"layout": "CHWN"}, "layout='CHWN' does not fit"),
    ],
)
def test_the_writer_refuses(stage: str, value: Array, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    recording = Writer(tmp_path / "r.safetensors", "mine")
    recording.add("x", X)
    with pytest.raises(ValueError, match=said):
        recording.add(stage, value, **options)
    recording.close()
    with open_recording(tmp_path / "r.safetensors") as found:
        assert list(found.values) == ["x"], "what was refused left no trace"
    with pytest.raises(ValueError, match="layout='rows' is none of NCHW, NHWC, plain"):
        Writer(tmp_path / "s.safetensors", "mine", layout="rows")


def test_the_writer_is_one_file_that_may_be_copied(tmp_path: Path) -> None:
    """With its licence at the top, and without minidiff or torch."""
    shutil.copy(HERE / "writer.py", tmp_path)
    assert (tmp_path / "writer.py").read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n")
    code = (
        "import sys, numpy as np\nfrom writer import Writer\n"
        "with Writer('r.safetensors', 'theirs', layout='NHWC') as r: r.add('x', np.ones((1, 2, 3, 4), 'f4'))\n"
        "print(sorted({'minidiff', 'torch', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
    with open_recording(tmp_path / "r.safetensors") as found:
        assert found.values["x"].shape == (1, 4, 2, 3)
    assert writer.DTYPES == header.DTYPES
    assert writer.LAYOUTS == header.LAYOUTS
    assert writer.VERSION == header.VERSION


# layouts, dtypes, branches, hashes


def test_channels_may_stand_last(tmp_path: Path) -> None:
    weights = RNG.random((1, 2, 3, 3)).astype("f4")
    last = {
        "x": X.transpose(0, 2, 3, 1),
        "map": (weights, {"layout": "plain"}),
        "ids": np.arange(16).reshape(2, 2, 2, 2),
    }
    a = written(tmp_path / "a.safetensors", {"x": X, "map": weights, "ids": np.arange(16).reshape(2, 2, 2, 2)})
    b = written(tmp_path / "b.safetensors", last, layout="NHWC")
    assert held(a, b).equal
    assert held(b, a).equal
    assert held(b, b).equal
    c = written(tmp_path / "c.safetensors", {"x": (X.transpose(0, 2, 3, 1), {"layout": "NHWC"}), "map": weights})
    assert held(a, c).equal
    wrong = written(tmp_path / "d.safetensors", {"x": X.transpose(0, 3, 2, 1)}, layout="NHWC")
    assert not held(a, wrong).equal


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 40, 90, 101), (2, 1, 1, 1), (1, 0, 2, 2), (1, 2, 3, PIECE + 1)])
def test_pieces_of_both_layouts_meet(shape: tuple[int, ...]) -> None:
    """Also where a picture is larger than a piece, and where a row is."""
    x = RNG.standard_normal(shape).astype("f4")
    stored = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(-1)
    last = Value(shape, "float32", lambda start, count: stored[start : start + count], last=True)
    for a, b in ((value_of(x), last), (last, value_of(x))):
        assert all(np.array_equal(p, q) for p, q in pieces(a, b))
        assert sum(p.size for p, _ in pieces(a, b)) == x.size
        assert measure(a, b).equal
    changed = x.copy()
    if changed.size:
        changed.reshape(-1)[-1] += 1
        assert measure(value_of(changed), last).differing == 1
    assert np.array_equal(last.array(), x)
    assert sha256_of(last) == sha256_of(value_of(x)) == hashlib.sha256(x.tobytes()).hexdigest()


def test_the_hash_of_a_picture_larger_than_a_block() -> None:
    x = RNG.standard_normal((1, 5, 1100, 1000)).astype("f4")
    assert x.nbytes > BLOCK
    stored = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(-1)
    last = Value(x.shape, "float32", lambda start, count: stored[start : start + count], last=True)
    assert sha256_of(last) == hashlib.sha256(x.tobytes()).hexdigest()


def test_bfloat16_is_widened_from_its_bits(tmp_path: Path) -> None:
    bits = RNG.integers(0, 1 << 16, 1000).astype(np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]  # finite
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    a = written(tmp_path / "a.safetensors", {"x": (bits, {"stored": "bfloat16"})})
    b = written(tmp_path / "b.safetensors", {"x": (wide, {"computed": "bfloat16"})})
    report = held(a, b)
    assert report.equal
    assert report.rows[0].chained.dtype_a == "bfloat16"
    near = wide * np.float32(1 + 2**-7)
    c = written(tmp_path / "c.safetensors", {"x": (near, {})}, dtype="bfloat16")
    (row,) = held(a, c).rows
    assert 1 <= (row.chained.ulps or 0) <= 2, "in units of the dtype that was computed in, not of the one stored"
    d = written(tmp_path / "d.safetensors", {"x": near})
    assert held(b, d).rows[0].chained.ulps == row.chained.ulps, "of the coarser of the two"
    assert (held(d, written(tmp_path / "e.safetensors", {"x": wide})).rows[0].chained.ulps or 0) > 10_000


def test_branches_in_two_calls_and_the_other_way_round(tmp_path: Path) -> None:
    """As a program that calls its network twice writes them, and one whose batch begins with the prompt."""
    y = X[:1] + 1
    a = written(tmp_path / "a.safetensors", {"step.0/unet/conv_in": X, "step.0/out": y})
    halves = {"step.0/unet/conv_in@conditional": X[1:], "step.0/unet/conv_in@unconditional": X[:1], "step.0/out": y}
    b = written(tmp_path / "b.safetensors", halves)
    report = held(a, b)
    assert report.equal
    stages = ["step.0/unet/conv_in@unconditional", "step.0/unet/conv_in@conditional", "step.0/out"]
    assert [row.stage for row in report.rows] == stages
    turned = {"step.0/unet/conv_in": X[[1, 0]], "step.0/out": y}
    c = written(tmp_path / "c.safetensors", turned, branches=["conditional", "unconditional"])
    for pair in ((a, c), (c, a), (b, c), (c, b)):
        assert held(*pair).equal, pair
    assert not held(a, written(tmp_path / "d.safetensors", turned)).equal
    only = written(tmp_path / "e.safetensors", {"step.0/unet/conv_in@conditional": X[1:] + 1})
    assert outcome(held(a, only)) == "first difference at step.0/unet/conv_in@conditional"


def test_hashes_alone_tell_what_is_equal(tmp_path: Path) -> None:
    a = written(tmp_path / "a.safetensors", {"p": X, "q": X + 1, "r": X})
    keep = {"hashed": True}
    b = written(tmp_path / "b.safetensors", {"p": (X, keep), "q": (X, keep), "r": (X.astype("f8"), keep)})
    last = {"p": (X.transpose(0, 2, 3, 1), keep), "q": (X[0], keep)}
    c = written(tmp_path / "c.safetensors", last, layout="NHWC")
    report = held(a, b)
    assert [row.chained.equal for row in report.rows] == [True, False]
    assert reasons(report)["how far"] == "other bits, by the hash; 120 values"
    assert report.about["left out"] == "1 stages of which one side has a hash of another dtype, r first"
    assert [row.chained.equal for row in held(b, c).rows] == [True, False]
    assert reasons(held(b, c))["how far"] == "shape (2, 3, 4, 5) in A, (3, 4, 5) in B"
    assert (tmp_path / "b.safetensors").stat().st_size < 1000


# figures


def test_the_figures_of_a_difference(tmp_path: Path) -> None:
    x = RNG.standard_normal(100_000).astype("f4")
    y = x.copy()
    y[:2000] = np.nextafter(y[:2000], np.float32(np.inf))
    y[:500] = np.nextafter(np.nextafter(y[:500], np.float32(np.inf)), np.float32(np.inf))
    found = difference(x, y)
    assert (found.ulps, found.ulps_median, found.ulps_99, found.differing) == (3, 0, 1, 2000)
    noise = x + np.float32(0.01) * RNG.standard_normal(100_000).astype("f4")
    found = difference(x, noise)
    assert found.snr == pytest.approx(40, abs=0.1)
    gap = noise.astype("f8") - x
    assert found.norm == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(x.astype("f8")), rel=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(x, noise)[0, 1], abs=1e-12)
    apart = np.abs(x.view("i4").astype("i8") - noise.view("i4"))[np.sign(x) == np.sign(noise)]
    assert found.ulps_median == pytest.approx(np.median(apart), rel=0.1)
    for y, sign in ((x, -1), (x + 1000, 1)):  # sums of float64, whose order is the processor's
        assert difference(y, sign * y).correlation == pytest.approx(sign, abs=1e-15)
    assert math.isinf(difference(x, x).snr)
    assert difference(x, np.full_like(x, 2.0)).correlation == 0, "a constant says nothing"


def test_pieces_add_up() -> None:
    """The figures are the same for a stage of many pieces as in one go."""
    x = RNG.standard_normal(4 * PIECE).astype("f4") + 3
    y = x * np.float32(1.001)
    y[-1] = 100
    found = difference(x, y)
    a, b = x.astype("f8"), y.astype("f8")
    assert found.max_abs == np.abs(a - b).max()
    assert found.max_rel == np.abs(a - b).max() / np.abs(a).max()
    assert found.norm == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
    for place in (0, PIECE, 4 * PIECE - 1):
        y = x.copy()
        y[place] = np.nan
        found = difference(x, y)
        assert (found.bad_a, found.bad_b, found.equal, found.ulps) == (0, 1, False, None)
        same = difference(y, y)
        assert (same.equal, same.bad_a, same.bad_b) == (False, 1, 1), "NaN equals nothing, at equal bits too"


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i8", "u1"])
def test_special_values(kind: str) -> None:
    x = np.array([0, 1, 2, 3], kind)
    assert difference(x, x).equal
    if kind[0] == "f":
        assert difference(x, np.array([-0.0, 1, 2, 3], kind)).equal, "both zeros are one number"
        inf = np.array([np.inf, -np.inf, 1, 2], kind)
        assert difference(inf, inf.copy()).equal
        assert difference(inf, x).max_abs == math.inf
        across = difference(np.array([np.finfo(kind).smallest_subnormal], kind), -np.array([0.0], kind))
        assert across.ulps == 1
    large = np.array([2**62, 2**62 + 1], "i8")
    assert difference(large, large[::-1].copy()).differing == 2, "float64 does not tell them apart"


# what is refused


def raw(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> Path:
    save_file(tensors, path, metadata)
    return path


def told(stages: Any, run: Any = None, **changes: str) -> dict[str, str]:
    return {VERSION_KEY: "2", STAGES_KEY: json.dumps(stages), RUN_KEY: json.dumps(run or {})} | changes


DIGEST = "0" * 64
LIES: list[tuple[dict[str, str], str]] = [
    ({}, "no recording; `minidiff parity record` makes one"),
    (told(["x"], **{VERSION_KEY: "7"}), "a recording of version '7'; this minidiff reads '1' and '2'"),
    (told(["x", "y"]), "stage 'y' is listed as a stage, but missing"),
    (told([]), "must list the names of stages"),
    (told(["x", 3]), "must list the names of stages"),
    (told([{"layout": "NCHW"}]), "which has no name"),
    (told([{"name": "x", "layout": "CHWN"}]), "stage 'x' has layout 'CHWN'"),
    (told([{"name": "x", "layout": ["NHWC"]}]), r"stage 'x' has layout \['NHWC'\]"),
    (told([{"name": "x", "computed": 32}]), "stage 'x' has computed 32"),
    (told([{"name": "x", "layout": "NHWC"}]), r"stage 'x' is listed as NHWC, and has shape \(2, 3\)"),
    (told(["x", {"name": "y", "sha256": "abc"}]), "stage 'y' has sha256 'abc'"),
    (told(["x", {"name": "y", "sha256": DIGEST, "shape": [-1], "dtype": "float32"}]), r"stage 'y' has shape \[-1\]"),
    (told(["x", {"name": "y", "sha256": DIGEST, "shape": [True], "dtype": "float32"}]), "stage 'y' has shape"),
    (told(["x", {"name": "y", "sha256": DIGEST, "shape": [2], "dtype": "half"}]), "stage 'y' has dtype 'half'"),
    (
        told([{"name": "x", "sha256": DIGEST, "shape": [2], "dtype": "float32"}]),
        "listed with a hash, and is in the file",
    ),
    (told(["x"], {"layout": "rows"}), "the layout 'rows' is none of NCHW, NHWC, plain"),
    (told(["x"], {"branches": ["conditional"]}), "branches should list unconditional and conditional"),
    (told(["x"], {"branches": "both"}), "branches should list"),
    (told(["x"], **{RUN_KEY: "3"}), "recording.run in its header should be a JSON object"),
    (told(["x"], **{STAGES_KEY: "[" * 100_000}), "recording.stages in its header should be a JSON list"),
]


@pytest.mark.parametrize(("metadata", "said"), LIES)
def test_a_header_that_lies_is_refused(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "r.safetensors", {"x": X[0, 0, :2, :3].copy()}, metadata)
    with pytest.raises(CheckpointError, match=said) as e:
        open_recording(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(("metadata", "said"), LIES)
def test_the_schema_refuses_what_the_reader_refuses(metadata: dict[str, str], said: str) -> None:
    """Refusals by the header alone; what needs the file, no schema can see."""
    jsonschema = pytest.importorskip("jsonschema", reason="the `test` extra installs it")
    schema = json.loads((HERE / "recording.schema.json").read_text(encoding="utf-8"))
    if said.endswith(("missing", "in the file", r"shape \(2, 3\)")) or "100_000" in said:
        return
    try:
        parsed = {k: v if k == VERSION_KEY else json.loads(v) for k, v in metadata.items()}
    except RecursionError:
        return
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parsed, schema)


def test_the_schema_takes_what_is_written(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the `test` extra installs it")
    schema = json.loads((HERE / "recording.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    stages = {"x": X, "y": (X, {"hashed": True}), "z": (X, {"layout": "plain", "computed": "float16"})}
    path = written(tmp_path / "r.safetensors", stages, layout="NHWC", version="3", branches=list(header.BRANCHES)[::-1])
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    jsonschema.validate({k: v if k == VERSION_KEY else json.loads(v) for k, v in metadata.items()}, schema)


def test_the_schema_knows_all_dtypes_and_keys() -> None:
    schema = json.loads((HERE / "recording.schema.json").read_text(encoding="utf-8"))
    assert schema["$defs"]["stage"]["properties"]["dtype"]["enum"] == list(header.DTYPES)
    assert schema["$defs"]["layout"]["enum"] == list(header.LAYOUTS)
    assert set(header.SAME) <= schema["properties"]["recording.run"]["properties"].keys()
    page = (HERE / "SPECIFICATION.md").read_text(encoding="utf-8")
    for word in (*header.DTYPES.values(), *header.SAME, *header.LAYOUTS, *header.BRANCHES):
        assert word in page, word


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    metadata = told([{"name": "x", "colour": "red"}], {"mood": "good"}, future="yes")
    path = raw(tmp_path / "r.safetensors", {"x": X}, metadata)
    with open_recording(path) as found:
        assert np.array_equal(found.values["x"].array(), X)


def test_version_1_knows_no_layouts(tmp_path: Path) -> None:
    metadata = told(["x"], {"layout": "NHWC", "version": 3}, **{VERSION_KEY: "1"})
    with open_recording(raw(tmp_path / "r.safetensors", {"x": X}, metadata)) as found:
        assert found.values["x"].shape == X.shape
        assert found.title == "a program that does not say its name"
    with pytest.raises(CheckpointError, match="must list the names of stages"):
        open_recording(raw(tmp_path / "s.safetensors", {"x": X}, told([{"name": "x"}], **{VERSION_KEY: "1"})))
    with open_recording(FIXTURES / "recording_sd1.safetensors") as old:
        assert old.title == "diffusers 0.42.1"
        assert len(old.values) > 200


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "not a readable safetensors file"),
        (lambda data: data[: len(data) // 2], "not a readable safetensors file"),
        (lambda data: b"", "it is empty"),
        (lambda data: b"\xff" * 100, "not a readable safetensors file"),
        (lambda data: data.replace(b"[2,3,4,5]", b"[2,3,4,6]"), "not a readable safetensors file"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "not a readable safetensors file"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "not a readable safetensors file"),
    ],
)
def test_a_damaged_file_is_one_line(damage: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "r.safetensors", {"x": X})
    data = path.read_bytes().replace(b"[2, 3, 4, 5]", b"[2,3,4,5]   ")
    path.write_bytes(damage(data))
    with pytest.raises((CheckpointError, UnsupportedError), match=said) as e:
        open_recording(path)
    assert "\n" not in str(e.value)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "r.safetensors", {"x": X})
    with open_recording(path) as found:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="ends within stage 'x'"):
            found.values["x"].array()


def test_a_dtype_that_recordings_do_not_have(tmp_path: Path) -> None:
    data = written(tmp_path / "s.safetensors", {"x": X.astype("u1").reshape(-1)}).read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].replace(b'"U8"', b'"F8_E4M3"')
    (tmp_path / "s.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(
        CheckpointError, match="stage 'x' has dtype F8_E4M3, which recordings do not have; store it wider"
    ):
        open_recording(tmp_path / "s.safetensors")


# an assertion for other projects


def test_assert_recording(tmp_path: Path) -> None:
    a = written(tmp_path / "a.safetensors", {"start/x": X, "step.0/x": X}, steps=1)
    b = written(tmp_path / "b.safetensors", {"first": X, "step.0/x": X * np.float32(1.001)})
    assert assert_recording(a, a).equal
    assert assert_recording(b, a, 0.01).tolerance == 0.01
    with pytest.raises(AssertionError, match=r"first difference at step\.0/x") as e:
        assert_recording(b, a)
    assert "SNR" in str(e.value)
    report = assert_recording(b, a, 0.01, names={"start/x": "first"})
    assert [row.stage for row in report.rows] == ["start/x", "step.0/x"]
    with pytest.raises(ConfigError, match="names: the second recording has no stage 'last'"):
        assert_recording(b, a, names={"start/x": "last"})
    with pytest.raises(ConfigError, match="different runs: steps is 1 and 2"):
        assert_recording(written(tmp_path / "c.safetensors", {"start/x": X}, steps=2), a)
    with pytest.raises(CheckpointError, match="no such file"):
        assert_recording(tmp_path / "none.safetensors", a)


def test_the_identity_is_that_of_the_header(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"x": X})
    size = int.from_bytes(path.read_bytes()[:8], "little")
    with open_recording(path) as found:
        assert found.identity == hashlib.sha256(path.read_bytes()[: 8 + size]).hexdigest()[:16]
    assert header_hash(path).startswith(found.identity)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8"])
def test_pieces_of_any_length_add_up(dtype: str) -> None:
    """Their arrays are used again, for a shorter piece in part; what lay there before counts for nothing."""
    a = (100 * RNG.standard_normal(900)).astype(dtype)
    b = np.where(RNG.random(900) < 0.5, a, a + a // 7).astype(dtype)
    precision = dtype if dtype.startswith("float") else ""
    whole, parts = Tally(precision), Tally(precision)
    whole.add(a, b)
    for x, y in zip(np.split(a, [7, 500, 501, 501, 640]), np.split(b, [7, 500, 501, 501, 640]), strict=True):
        parts.add(x, y)
    kinds = (a.shape, b.shape, dtype, dtype)
    one, other = whole.result(kinds), parts.result(kinds)
    assert one.differing == int((a != b).sum()) > 0
    assert replace(one, norm=other.norm, correlation=other.correlation) == other
    assert one.norm == pytest.approx(other.norm, rel=1e-12), "sums in another order"
    assert one.correlation == pytest.approx(other.correlation, rel=1e-12)
