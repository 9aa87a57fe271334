"""Exports as ONNX, run by ONNX Runtime: a whole model, file by file, and the UNet of every family."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff import CheckpointError
from minidiff.export import export, formats, open_export
from minidiff.export.against import against
from minidiff.export.formats import BOUNDS, gap, measured, reading, traced
from minidiff.export.manifest import digests
from minidiff.export.programs import programs
from minidiff.parity.ours import asked
from tests.support.export_models import FAMILIES, MINI, PARTICULAR, one_weight_changed
from tests.support.tiny import drawn

NEEDED = ("onnx", "onnxscript", "onnxruntime")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: pip install 'minidiff[export]'")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "names"), PARTICULAR.items())
def test_what_is_particular_in_every_family(family: str, names: list[str], tmp_path: Path) -> None:
    pipe = drawn(FAMILIES[family], 3)
    found = [program for program in programs(pipe.config, pipe.parts) if program.name in names]
    assert [program.name for program in found] == names
    for program in found:
        path = formats.write("onnx", program, traced(program), tmp_path)
        assert 0 < measured(program, reading("onnx", program, path)) <= BOUNDS["onnx"].relative, program.name
    files = {f"{name}.onnx{ending}" for name in names for ending in ("", ".data")}
    assert {file.name for file in tmp_path.iterdir()} == files


@pytest.fixture(scope="module")
def model() -> Any:
    return drawn(MINI, 1)


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a whole tiny model, which no test changes."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    export(model, folder, to="onnx", plans=[("dpmpp_2m", 3)])
    return folder


@pytest.mark.slow
def test_every_file_is_held_against_onnx_runtime(model: Any, made: Path) -> None:
    """By ONNX Runtime alone, as another program would: names, types and free axes are those of the manifest."""
    runtime = importlib.import_module("onnxruntime")
    manifest = json.loads((made / "manifest.json").read_text())
    assert list(manifest["programs"]) == ["unet", "vae_encoder", "vae_decoder", "text_encoder"]
    assert digests(made).keys() - {"manifest.json"} == manifest["files"].keys()
    for program in programs(model.config, model.parts):
        told = manifest["programs"][program.name]
        session = runtime.InferenceSession(str(made / told["file"]), providers=["CPUExecutionProvider"])
        types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
        assert {one.name: (one.shape, one.type) for one in session.get_inputs()} == {
            name: (entry["axes"], types[entry["dtype"]]) for name, entry in told["inputs"].items()
        }
        assert [one.name for one in session.get_outputs()] == told["outputs"]
        assert 0 < told["measured"] <= told["bound"] == BOUNDS["onnx"].relative
        for size in ((1, 8, 20, 77), (4, 11, 9, 5)):  # none for which it was made or measured
            inputs = program.example(*size, seed=9)
            found = session.run(told["outputs"], {name: x.numpy() for name, x in inputs.items()})
            got = dict(zip(told["outputs"], map(torch.from_numpy, found), strict=True))
            assert gap(program.eager(inputs), got) <= BOUNDS["onnx"].relative, (program.name, size)


@pytest.mark.slow
def test_the_folder_is_within_its_bound_layer_by_layer(model: Any, made: Path) -> None:
    report = against(model, str(made), asked("a star", steps=2, height=16, width=16))
    assert report.equal, report
    stages = {row.stage for row in report.rows}
    assert {"unet/unet.down.0.res.0.conv1", "vae_decoder/output pixels", "step.1/x", "decode/pixels"} < stages
    assert len(stages) > 100
    assert not all(row.chained.equal for row in report.rows), "another program sums in another order"


@pytest.mark.slow
def test_a_changed_weight_is_found_in_its_layer(model: Any, made: Path) -> None:
    with one_weight_changed(model, made) as stage:
        report = against(model, str(made), asked("a star", steps=1, height=16, width=16))
    assert report.first is not None
    assert report.first.stage == stage


@pytest.mark.slow
def test_weights_beside_the_graph_that_were_changed(model: Any, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "out")
    weights = folder / "unet.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(CheckpointError, match=r"unet.onnx.data: its content is not what manifest.json tells"):
        open_export(folder)
    weights.write_bytes(content[: len(content) // 2])  # and with a hash that fits
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()  # which tells of all files but itself
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": digests(folder)}))
    with pytest.raises(CheckpointError, match=r"unet.onnx: can't be read \(.+\); export the model again") as found:
        against(model, str(folder), asked("a star", steps=1, height=16, width=16))
    assert "\n" not in str(found.value)
