"""The wheel built from this checkout: its contents, and a run from another folder.

tests/parity/test_packaging.py converts and generates with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from minidiff.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("minidiff", "weights_convert", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout, which stays as it was; no network is needed."""
    source = folder / "source"
    source.mkdir()
    clutter = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=clutter)
        else:
            shutil.copy(ROOT / name, source)
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), cwd=source)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Unpack the wheel as pip does into a folder for PYTHONPATH; its dependencies are those of the running Python."""
    target = folder / "site"
    pip("install", str(wheel), "--target", str(target), cwd=folder)
    return target


def pip(*args: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", *args, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(site: Path, cwd: Path, *args: str) -> str:
    """The output of the running Python with minidiff in ``site`` alone, started in ``cwd``."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_every_file_of_both_packages(wheel: Path, content: dict[str, bytes]) -> None:
    source = wheel.parents[1] / "source"  # the copy that it was built from
    wanted = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for package in ("minidiff", "weights_convert")
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    assert {"minidiff/py.typed", "weights_convert/py.typed", "minidiff/assets/clip_merges.txt.gz"} <= set(wanted)
    assert sorted(set(wanted) - set(content)) == []
    assert [name for name in wanted if content[name] != wanted[name]] == []


def test_wheel_holds_nothing_else(content: dict[str, bytes]) -> None:
    info = f"minidiff-{VERSION}.dist-info"
    assert {name.split("/")[0] for name in content} == {"minidiff", "weights_convert", info}


def test_wheel_carries_the_licences(content: dict[str, bytes]) -> None:
    licences = f"minidiff-{VERSION}.dist-info/licenses"
    assert content[f"{licences}/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"MIT" in content[f"{licences}/minidiff/assets/LICENSE-CLIP"]


def test_metadata_names_version_dependencies_and_command(content: dict[str, bytes]) -> None:
    info = f"minidiff-{VERSION}.dist-info"
    metadata = Parser().parsestr(content[f"{info}/METADATA"].decode())
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert {need.split(">=")[0] for need in needs} == {
        "torch",
        "torchvision",
        "einops",
        "numpy",
        "tqdm",
        "safetensors",
    }
    assert "minidiff = minidiff.__main__:command" in content[f"{info}/entry_points.txt"].decode()


def test_installed_package_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    places = "import minidiff, weights_convert; print(minidiff.__file__); print(weights_convert.__file__)"
    for place in python(site, elsewhere, "-c", places).splitlines():
        assert Path(place).is_relative_to(site), "the checkout was imported, not the installed package"
    ids = "from minidiff.models.tokenizer import Tokenizer; from minidiff.config import TokenizerConfig as C;"
    ids += " print(Tokenizer(C())(['a cat'])[0, :4].tolist())"
    assert python(site, elsewhere, "-c", ids).strip() == "[49406, 320, 2368, 49407]"
    assert VERSION in python(site, elsewhere, "-m", "minidiff", "--version")
