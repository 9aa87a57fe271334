"""Exports as ONNX, run by ONNX Runtime: within their bound of every family, and a slip is found at its layer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.export import export, formats
from minidiff.export.against import against
from minidiff.export.formats import BOUNDS, measured, reading, traced
from minidiff.export.programs import programs
from minidiff.parity.ours import asked
from tests.support.export_models import FAMILIES, MINI
from tests.support.tiny import drawn

NEEDED = ("onnx", "onnxscript", "onnxruntime")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: pip install 'minidiff[export]'")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "inpainting", "lcm", "sdxl", "ddpm"])
def test_unets_of_every_family(family: str, tmp_path: Path) -> None:
    pipe = drawn(FAMILIES[family], 3)
    unet = programs(pipe.config, pipe.parts)[0]
    path = formats.write("onnx", unet, traced(unet), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"unet.onnx", "unet.onnx.data"}
    assert 0 < measured(unet, reading("onnx", unet, path)) <= BOUNDS["onnx"].relative


@pytest.mark.slow
def test_a_whole_model(tmp_path: Path) -> None:
    import onnx

    pipe: Any = drawn(MINI, 1)
    export(pipe, tmp_path / "out", "onnx", plans=[])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert all(0 < entry["measured"] <= entry["bound"] for entry in manifest["programs"].values())
    graph = onnx.load(tmp_path / "out/unet.onnx", load_external_data=False).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {
        "x": ["batch", 4, "height", "width"],
        "t": ["batch"],
        "context": ["batch", "length", 16],
    }
    request = asked("a star", steps=2, height=16, width=16)
    before = sorted((tmp_path / "out").iterdir())
    report = against(pipe, str(tmp_path / "out"), request)
    assert report.equal, report
    assert sorted((tmp_path / "out").iterdir()) == before
    stages = {row.stage for row in report.rows}
    for part in ("unet.down.0.attn.0.blocks.0.attn2", "unet.mid.res1", "unet.up.1.res.0.conv1"):
        assert f"unet/{part}" in stages
    assert {"vae_encoder/output mean", "vae_decoder/vae.decoder.mid.attn", "step.1/x", "decode/pixels"} < stages

    pipe.source = manifest["model"]  # as if nobody knew what comes now
    with torch.no_grad():
        pipe.unet.up[1].res[0].conv1.weight[0, 0, 0, 0] += 0.1
    report = against(pipe, str(tmp_path / "out"), request)
    assert report.first is not None
    assert report.first.stage == "unet/unet.up.1.res.0.conv1"
