"""Exports as ONNX, run by ONNX Runtime: within their bound for the UNet of every family."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from minidiff.export import formats
from minidiff.export.formats import BOUNDS, measured, reading, traced
from minidiff.export.programs import programs
from tests.support.export_models import FAMILIES
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
