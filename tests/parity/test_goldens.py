"""``minidiff parity goldens``: the installed diffusers repeats the goldens, weights and recordings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidiff.parity import assert_recording
from minidiff.parity.goldens import FOLDER, RECORDING
from minidiff.parity.kernels import machine
from minidiff.parity.twins import FAMILIES
from minidiff.parity.values import open_recording
from minidiff.storage.files import TensorFile
from tests.tolerances import RECORDED

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "fixtures" / "goldens"


def call(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = (sys.executable, "-m", "minidiff", "parity", "goldens", *argv)
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("goldens")
    done = call("made", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "made\n"
    assert [line.split()[1] for line in done.stderr.splitlines()] == [f"{family}:" for family in FAMILIES]
    return folder / "made"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_goldens_are_those_of_the_pinned_diffusers(family: str, anew: Path) -> None:
    made, kept = anew / family, GOLDENS / family
    files = [{p.relative_to(side).as_posix() for p in side.rglob("*") if p.is_file()} for side in (made, kept)]
    assert files[0] == files[1]
    for name in sorted(files[0]):
        if name.endswith(".safetensors") and name != RECORDING:
            a, b = TensorFile(made / name).lazy, TensorFile(kept / name).lazy
            assert a.keys() == b.keys(), name
            assert all(torch.equal(a[key].load(), b[key].load()) for key in a), name
        elif name.endswith(".json"):
            assert (made / name).read_text(encoding="utf-8") == (kept / name).read_text(encoding="utf-8"), name
    with open_recording(made / RECORDING) as a, open_recording(kept / RECORDING) as b:
        assert list(a.values) == list(b.values)
        same = all(a.run.get(key) == b.run.get(key) for key in machine())
    assert_recording(made / RECORDING, kept / RECORDING, 0.0 if same else RECORDED.relative)


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("mine")
    done = call("made", "--family", "ddpm", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "made" / "mine").read_text() == "mine"
    done = call("one", "--family", "ddpm", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["ddpm"]
    assert (tmp_path / "one" / "ddpm" / FOLDER / "model_index.json").is_file()
