"""scripts/compare_peers.py: its arithmetic and its table, on made environments; no peer is needed."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # at the end: test.py there shares its name with a package of Python's own

import _peers  # noqa: E402
import compare_peers  # noqa: E402


def distribution(site: Path, name: str, requires: list[str]) -> None:
    folder = site / f"{name}-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("\n".join([f"Name: {name}", *(f"Requires-Dist: {r}" for r in requires)]))
    (site / f"{name}.py").write_bytes(b"x" * 10)
    (site / f"{name}.pyc").write_bytes(b"x" * 99)
    (folder / "RECORD").write_text(f"{name}.py,,\n{name}.pyc,,\ngone.py,,\n")


def test_what_torch_brings_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, requires in {
        "torch": ["Jinja2>=3", "nvidia-nccl-cu13; platform_system == 'Linux'", "optree; extra == 'fast'"],
        "Jinja2": ["markup_safe~=2.0"],
        "markup.safe": [],
        "nvidia-nccl-cu13": [],
        "pip": [],
        "optree": [],
        "peer": ["torch", "extra-one"],
        "extra_one": [],
    }.items():
        distribution(tmp_path, name, requires)
    found = list(importlib.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    kept = {d.metadata["Name"]: _peers.size(d) for d in _peers.beyond_torch()}
    assert kept == {"optree": 10, "peer": 10, "extra_one": 10}


def test_the_files_of_a_peer(tmp_path: Path) -> None:
    for name in ("a/b/c.py", "a/d.py", "e.py", "a/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in _peers.python_files(tmp_path / "a")] == ["c.py", "d.py"]
    assert [p.name for p in _peers.python_files(tmp_path / "*.py")] == ["e.py"]


def test_equal_means_equal_bits() -> None:
    b = torch.tensor([0.0, 2.0])  # its deviation is sqrt(2)
    assert compare_peers.gap(_peers.apart(b, b.clone())) == "equal"
    assert _peers.apart(torch.tensor([0.0, 1.0]), b) == pytest.approx(0.5**0.5)
    tiny = torch.tensor([1e-45, 2.0])  # a difference that vanishes when it is divided is one all the same
    assert compare_peers.gap(_peers.apart(tiny, b)) != "equal"


def test_the_original_unet_has_every_tensor_under_the_other_names() -> None:
    """The smallest block of each kind, as CompVis and as kjsman name it."""
    block = "input_blocks.1.1.transformer_blocks.0."
    found = {f"{block}attn1.to_{part}.weight": torch.full((2, 3), float(k)) for k, part in enumerate("qkv")}
    found |= {
        f"{block}attn1.to_out.0.bias": torch.zeros(1),
        "input_blocks.1.1.norm.weight": torch.zeros(1),
        "input_blocks.3.0.op.bias": torch.zeros(1),
        "output_blocks.2.0.in_layers.0.weight": torch.zeros(1),
        "out.0.weight": torch.zeros(1),
        f"{block}norm1.bias": torch.zeros(1),
    }
    named = _peers.kjsman_names(found)
    assert sorted(named) == [
        "final.groupnorm.weight",
        "unet.decoders.2.0.groupnorm_feature.weight",
        "unet.encoders.1.1.attention_1.in_proj.weight",
        "unet.encoders.1.1.attention_1.out_proj.bias",
        "unet.encoders.1.1.groupnorm.weight",
        "unet.encoders.1.1.layernorm_1.bias",
        "unet.encoders.3.0.bias",
    ]
    assert named["unet.encoders.1.1.attention_1.in_proj.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


FACTS = {"version": "1.2", "packages": 4, "megabytes": 15.6, "lines": 12345, "samplers": ["a", "b"]}
SAID: dict[str, dict[str, Any]] = {
    "minidiff": {
        "facts": FACTS,
        "import": {"modules": 1204},
        "folder": {"opens": True},
        "single": {"opens": True},
        "numbers": {"unet": 0.0, "trajectory": 0.0},
        "like": {"CompVis": 2e-7},
    },
    "diffusers": {
        "facts": FACTS,
        "import": {"modules": 9},
        "folder": {"opens": True},
        "single": {"error": "OSError: no network here"},
        "numbers": {"unet": 0.0, "trajectory": 0.0},
    },
    "CompVis": {
        "facts": FACTS | {"version": ""},
        "import": {"modules": 9},
        "folder": {"missing": True},
        "single": {"missing": True},
        "numbers": {"unet": 3.21e-6, "trajectory": 1e-5},
    },
}


def test_the_table() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compare_peers.table(SAID).splitlines()]
    assert lines[0] == ["", "minidiff 1.2", "diffusers 1.2", "CompVis"]
    assert [line[0] for line in lines[2:]] == list(compare_peers.ROWS)
    cells = {line[0]: line[1:] for line in lines}
    assert cells["packages beside torch's own"] == ["4, 16 MB"] * 3
    assert cells["lines of Python; modules that the import loads beside torch's"][0] == "12,345; 1,204"
    assert lines[5][1:] == ["folder and file", "folder", ""]
    assert lines[6][1:] == ["equal; equal", "", "3.2e-06; 1.0e-05"]
    assert cells["these steps, against minidiff with `like=`"] == ["", "", "2.0e-07"]


def test_a_peer_that_is_not_there_is_named_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_peers.py", "--peers", str(tmp_path), "--only", "refiners"])
    assert compare_peers.main() == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["diffusers", "refiners"]
    assert "pip install" in said[1]


def test_what_is_known_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(place: compare_peers.Place, stage: str) -> dict[str, Any]:
        asked.append(stage)
        return {"stage": stage}

    monkeypatch.setattr(compare_peers.Place, "ask", ask)
    places = {"diffusers": compare_peers.Place("diffusers", tmp_path, tmp_path)}
    kept = tmp_path / "kept.json"
    found = compare_peers.measure(places, kept)
    assert asked == ["reference", "facts", "import", "folder", "single", "numbers"]
    assert json.loads(kept.read_text()) == found
    assert compare_peers.measure(places, kept) == found
    assert len(asked) == 6
