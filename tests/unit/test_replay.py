"""Pictures of an earlier minidiff, repeated from their own recipes: the same pixels, and the same recipe again.

tests/fixtures/replay/README.md says which commit wrote them, with which models and commands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff import cli, read_recipe
from minidiff.parity.kernels import kernels
from tests.tolerances import EXACT, PIXELS_ELSEWHERE, assert_close

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "replay"
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
KERNELS = "6f20401560bf"  # where the pictures were made
OF_THE_WRITER = {"minidiff", "torch", "fast"}  # fields that say which versions wrote a picture, and for which processor


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute on one thread, as the pictures were, from the folder that holds their models.

    Sums are split by the number of threads. torch keeps that number for the whole process, so it is put back.
    """
    monkeypatch.chdir(FOLDER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def repeat(folder: Path, picture: str, model: str | None, again: list[str]) -> list[Path]:
    """Repeat a stored picture by the command line; gives what was written to ``folder``."""
    of_model = [] if model is None else ["--model", f"{model}.safetensors"]
    argv = ["generate", "--recipe", picture, *of_model, *again, "--quiet", "--device", "cpu"]
    assert cli.main([*argv, "--out", str(folder / "p.png")]) == 0
    return sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name))


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image, dtype=np.float32))


def same_picture(found: Path, kept: Path) -> None:
    """Raise AssertionError unless the pixels are the same: equal, where torch computes as it did there."""
    assert_close(pixels(found), pixels(kept), EXACT if kernels() == KERNELS else PIXELS_ELSEWHERE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: Path(case["pictures"][0]).stem)
def test_a_picture_comes_back(case: dict[str, Any], tmp_path: Path) -> None:
    made = repeat(tmp_path, case["pictures"][0], case["model"], case["again"])
    for path, name in zip(made, case["pictures"], strict=True):
        same_picture(path, FOLDER / name)
        now, then = read_recipe(path), read_recipe(FOLDER / name)
        shared = then.keys() - OF_THE_WRITER
        for recipe in (now, then):  # a word that is called as its file says is named since
            recipe["embedding"] = [name for name, _ in recipe.get("embedding", ())]
        assert {field: now.get(field) for field in shared} == {field: then[field] for field in shared}
        assert bool(now.get("fast")) == bool(then.get("fast"))


@pytest.mark.parametrize("case", [case for case in CASES if case["again"]], ids=lambda case: case["pictures"][0])
def test_what_a_recipe_cannot_give_back_is_asked_for(
    case: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture that was begun from, an adapter, and all the pictures of a stream that was shared."""
    picture, again = case["pictures"][-1], case["again"]
    if again[0] != "--num-images":
        again = again[:-2]  # but for the last option
    argv = ["generate", "--recipe", picture, "--model", f"{case['model']}.safetensors", *again]
    assert cli.main([*argv, "--out", str(tmp_path / "p.png")]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert picture in line
    assert case["again"][-2] in line or "make all of them, with --seed" in line
    assert not list(tmp_path.iterdir())


def test_a_picture_of_another_bundled_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made,) = repeat(tmp_path, "bundled-other.png", None, [])
    (line,) = capsys.readouterr().err.splitlines()
    other = read_recipe(FOLDER / "bundled-other.png")["model_hash"]
    assert f"another bundled model {other}" in line
    assert "pixels may differ" in line
    same_picture(made, FOLDER / "bundled.png")
    assert read_recipe(made)["model_hash"] == read_recipe(FOLDER / "bundled.png")["model_hash"]


@pytest.mark.parametrize(("picture", "model"), [("sd1.png", None), ("sd2.png", "sd1"), ("ddpm.png", "sdxl")])
def test_a_picture_of_another_family_is_refused(
    picture: str, model: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_model = [] if model is None else ["--model", f"{model}.safetensors"]
    argv = ["generate", "--recipe", picture, *of_model, "--out", str(tmp_path / "p.png")]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert read_recipe(FOLDER / picture)["model_hash"] in line
    assert not list(tmp_path.iterdir())
