"""Fixtures of the unit tests: tiny models, folders and files of them, and calls of the command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minidiff import cli
from minidiff.pipeline import StableDiffusion, Unconditional, random_model
from tests.support.command import PLAIN, TEXT, Ended, Run
from tests.support.convert_sources import write_folder
from tests.support.tiny import tiny_ddpm, tiny_sd


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    """The tiny text-to-image model of a module's tests, which leave it as it is."""
    return tiny_sd()


@pytest.fixture(scope="module")
def ddpm() -> Unconditional:
    """The tiny unconditional model of a module's tests, which leave it as it is."""
    return tiny_ddpm()


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in diffusers' layout with the tiny text-to-image model, which no test changes."""
    return write_folder(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of that folder, for a test to change."""
    shutil.copytree(good, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.safetensors and plain.safetensors, which no test changes."""
    folder = tmp_path_factory.mktemp("models")
    random_model(TEXT, seed=1).save(folder / "text.safetensors")
    random_model(PLAIN, seed=1).save(folder / "plain.safetensors")
    return folder


@pytest.fixture
def run(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call ``main`` in an empty folder; "text" and "plain" stand for the models' files."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> Ended:
        given = [str(models / f"{a}.safetensors") if a in ("text", "plain") else str(a) for a in argv]
        capsys.readouterr()
        status = cli.main(given)
        captured = capsys.readouterr()
        return Ended(status, captured.out.splitlines(), captured.err.splitlines())

    return call


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[None]:
    """Nothing may be left in the current folder that was not there before the test's own calls."""
    yield
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".png", ".part")] == []
