"""The script that trains a ControlNet on edges: its parts, and a run of it that is far too short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import minidiff
from minidiff import ControlModel

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))  # at the end: see test_eval_shapes.py
import train_control


def test_edges_are_where_the_outline_is() -> None:
    items, told, pixels = train_control.scenes(3, 0, 20)
    found = train_control.edges(pixels)
    assert found.shape == (20, 3, 64, 64)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    for item, text, edge in zip(items, told, found[:, 0], strict=True):
        thing = item.scene.things[0]
        y, x = edge.nonzero().float().T
        assert (x.mean() - thing.x).abs() < 3
        assert (y.mean() - thing.y).abs() < 4
        assert not any(word in text for word in ("left", "right", "top", "bottom", "middle", "centre"))
    other = train_control.another(items, found, 1)
    assert all(not torch.equal(a, b) for a, b in zip(other, found, strict=True))


def test_the_judge_wants_the_thing_at_its_place() -> None:
    items, told, pixels = train_control.scenes(3, 0, 10)
    images = (pixels + 1) / 2
    right = [train_control.is_right(i, item, text) for i, item, text in zip(images, items, told, strict=True)]
    assert right == [True] * 10
    moved = images.roll(16, dims=-1)
    assert not any(train_control.is_right(i, item, text) for i, item, text in zip(moved, items, told, strict=True))


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new control does nothing; after a step it does a little, and the model's own weights are as before."""
    sd = minidiff.bundled("cpu")
    control = train_control.new_control(sd)
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 128)
    down, mid = control.net(x, torch.tensor(5), context, control.net.hint(torch.rand(1, 3, 64, 64)))  # type: ignore[operator]
    assert not any(r.any() for r in [*down, mid])
    options = ["--max-steps", "2", "--batch", "2", "--count", "2", "--steps", "1"]
    files = ["--out", str(tmp_path / "edges.safetensors"), "--sheet", str(tmp_path / "sheet.png")]
    assert train_control.main([*options, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines[-3:]] == ["edges", "off", "wrong"]
    trained = ControlModel.load(tmp_path / "edges.safetensors", "cpu")
    assert trained.net.get_submodule("zero_mid").weight.any()  # type: ignore[union-attr,operator]
    assert not any(p.requires_grad for p in trained.net.parameters())
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 64, 2 * 64)
    assert train_control.main(["--control", files[1], "--count", "1", "--steps", "1"]) == 0
