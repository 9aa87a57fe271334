"""The built wheel, installed and used from another folder: it converts a checkpoint and makes a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.parity.twins import folder_twin
from tests.unit.test_packaging import build_wheel, install, python


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    return install(build_wheel(folder), folder)


def test_installed_package_converts_and_generates(installed: Path, tmp_path: Path) -> None:
    folder_twin(tmp_path / "checkpoint")
    report = python(installed, tmp_path, "-m", "minidiff", "convert", "checkpoint", "model.safetensors")
    assert report.strip(), "the report accounts for every key"
    python(installed, tmp_path, "-m", "weights_convert", "checkpoint", "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    options = ("--model", "model.safetensors", "a prompt", "--steps", "2", "--seed", "1", "--out", "picture.png")
    python(installed, tmp_path, "-m", "minidiff", "generate", *options)
    read = "import minidiff; r = minidiff.read_recipe('picture.png'); print(r['prompt'], r['steps'], r['seed'])"
    assert python(installed, tmp_path, "-c", read).split() == ["a", "prompt", "2", "1"]
    assert "parameters" in python(installed, tmp_path, "-m", "minidiff", "info", "model.safetensors")
