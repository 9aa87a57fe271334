"""The measuring scripts beside diffusers: both sides do the same work with the same weights, as far as they should."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from minidiff.config import SDXL, text
from minidiff.models.unet import UNet

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # at the end: test.py there shares its name with a package of Python's own

import _children  # noqa: E402
import _works  # noqa: E402
import bench  # noqa: E402
import bench_training  # noqa: E402

PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}  # of the published UNets
TINY = _works.FAMILIES["tiny"]
TINY_XL = _works.Family(
    replace(
        SDXL,
        levels=(*TINY.unet.levels[1:], text(64, 4, depth=2)),
        mid=text(64, 4, depth=2),
        context_dim=32,
        added_dim=16 + 6 * 8,
        added_sinusoid=8,
        sample_size=8,
    ),
    TINY.vae,
)


@torch.no_grad()
@pytest.mark.parametrize("family", [TINY, TINY_XL], ids=("sd1", "sdxl"))
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_both_sides_compute_the_same_from_the_same_tensors(part: str, family: _works.Family) -> None:
    torch.manual_seed(0)
    work = _works.PARTS[part](family, 64, 2)
    theirs = work.theirs()
    assert torch.equal(theirs(*work.inputs), work.ours(*work.inputs))
    held = {p.data_ptr() for p in work.ours.parameters()}
    assert {p.data_ptr() for p in theirs.parameters()} == held, "a second copy of the weights"


@pytest.mark.parametrize("family", PARAMETERS)
def test_full_size_is_that_of_the_published_models(family: str) -> None:
    config = _works.FAMILIES[family].unet
    with torch.device("meta"):
        model = UNet(config)
    theirs = _works.reference(config, model)
    for unet in (model, theirs):
        assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[family]


def test_one_call_against_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, on = tmp_path / "bench.json", torch.is_grad_enabled()
    options = ["--family", "tiny", "--part", "vae", "--switches", "none", "--rounds", "1", "--json", str(out)]
    try:
        assert bench.main([*options, "--against", "diffusers"]) == 0
    finally:
        torch.set_grad_enabled(on)
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["minidiff, plain", "diffusers, eager"]
    assert found["rows"][1]["speed"] == 1
    assert found["first"]["diffusers, eager"]["difference"] == 0
    assert "speed: against diffusers, eager" in capsys.readouterr().out


class EndedError(Exception):
    """A child has come as far as it was to go."""


def test_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, Any] = {}

    def end(**facts: Any) -> NoReturn:
        left.update(facts)
        raise EndedError

    monkeypatch.setattr(_children, "end", end)
    _children.prepare(str(tmp_path), "tiny")
    folder = tmp_path / "folder"
    sizes = {dtype: (tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in ("float32", "float16")}
    assert 1.8 < sizes["float32"] / sizes["float16"] < 2.1
    with pytest.raises(EndedError):
        _children.theirs(str(folder), "loaded")
    theirs = left.pop("weights")
    with pytest.raises(EndedError):
        _children.ours(str(tmp_path / "float32.safetensors"), "loaded")
    assert left["weights"] == theirs
    for when in ("begun", "stepped"):
        with pytest.raises(EndedError):
            _children.theirs(str(folder), when)
    _children.picture(str(folder), "default", "1", str(tmp_path / "out.png"))
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)


def test_a_training_step_of_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take a step with the same network; the figures of every row are written."""
    out = tmp_path / "training.json"
    asked = ["--tiny", "--rounds", "1", "--batch", "2", "--dtype", "float32", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *asked])
    assert bench_training.main() == 0
    (found,) = json.loads(out.read_text())["results"]
    assert [way["name"] for way in found["ways"]] == ["diffusers with accelerate", *bench_training.OURS]
    assert all(way["seconds"] > 0 for way in found["ways"])
