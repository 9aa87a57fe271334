"""Controls through every layout, without the reference; and damaged files, each refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import weights_convert
from minidiff import ControlModel
from minidiff.errors import MinidiffError
from minidiff.storage.files import Lazy
from tests.support.tiny import tiny_adapter, tiny_controlnet
from weights_convert.control import read_control
from weights_convert.detection import detect

MADE: dict[str, Any] = {
    "net": lambda: tiny_controlnet(sample_size=64),
    "full": tiny_adapter,
    "light": lambda: tiny_adapter(kind="light", layers=2, channels=(24, 24)),
    "grey": lambda: tiny_adapter(image_channels=1),
}
# What shapes cannot tell: norm groups, and heads that are not SD1's eight.
TOLD = {"net": {"control": {"groups": 8, "levels": [{"heads": 2}, {}], "mid": {"heads": 3}}}}


def written(kind: str, folder: Path, to: str) -> Path:
    """The control as a file or folder of a layout."""
    MADE[kind]().save(folder / "own.safetensors")
    name = folder / ("folder" if to == "diffusers" else f"{to}.safetensors")
    weights_convert.convert(folder / "own.safetensors", name, to=to)
    return name


@pytest.mark.parametrize("to", ["diffusers", "original", "minidiff"])
@pytest.mark.parametrize("kind", MADE)
def test_there_and_back(kind: str, to: str, tmp_path: Path) -> None:
    wanted = MADE[kind]()
    options = {"config": TOLD[kind]} if kind in TOLD and to == "original" else {}
    found = weights_convert.load(written(kind, tmp_path, to), "cpu", **options)
    assert isinstance(found, ControlModel)
    assert found.config.control == wanted.config.control
    assert all(torch.equal(t, wanted.net.state_dict()[k]) for k, t in found.net.state_dict().items())
    if to != "minidiff":
        half = weights_convert.convert(tmp_path / "own.safetensors", tmp_path / "half.safetensors", dtype="float16")
        assert "floating-point tensors converted to float16" in half.notes


CHANGES: dict[str, Any] = {
    "gone": lambda t: None,
    "a number": lambda t: replace(t, shape=()),
    "a vector": lambda t: replace(t, shape=(3,)),
    "empty": lambda t: replace(t, shape=(0,) * len(t.shape)),
    "wide": lambda t: replace(t, shape=(2**40,) * len(t.shape)),
    "whole": lambda t: replace(t, dtype=torch.int64),
}


@pytest.mark.parametrize("layout", ["original", "bare"])
@pytest.mark.parametrize("kind", MADE)
def test_damaged_files(kind: str, layout: str, tmp_path: Path) -> None:
    """Every tensor changed in turn."""
    path = written(kind, tmp_path, "original" if layout == "original" else "diffusers")
    found = detect(path if layout == "original" else path / "diffusion_pytorch_model.safetensors")
    assert found.is_control
    told = TOLD.get(kind, {})
    assert len(read_control(found, told, None).tensors) == len(found.tensors)
    for key, tensor in found.tensors.items():
        for change in CHANGES.values():
            changed: Lazy | None = change(tensor)
            rest = {k: t for k, t in found.tensors.items() if k != key}
            spoiled = replace(found, tensors=rest if changed is None else {**rest, key: changed})
            with pytest.raises(MinidiffError, match=r"^[^\n]*$"):
                read_control(spoiled, told, None)
