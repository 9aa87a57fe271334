"""AOTInductor's package, and the C++ program that draws with it: minutes of compiling."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.config import Level, ModelConfig
from minidiff.export import export, formats
from minidiff.export.against import against
from minidiff.export.formats import BOUNDS, measured, reading, traced
from minidiff.export.programs import programs
from minidiff.parity.ours import asked
from tests.support.export_models import FAMILIES, MINI, PARTICULAR
from tests.support.scripts import script
from tests.support.tiny import drawn
from tests.tolerances import ELSEWHERE

CPP = Path(__file__).resolve().parents[2] / "scripts/cpp"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return drawn(MINI, 1)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """AOTInductor compiles what is called once without optimising it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr("torch._inductor.config.aot_inductor.compile_wrapper_opt_level", "O0")
        patch.setattr("torch._inductor.config.compile_threads", 1)
        yield


@pytest.fixture(scope="module")
def made(model: Any, quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti") / "out"
    export(model, folder, "aoti", plans=[("dpmpp_2m", 3), ("euler_ancestral", 3)])
    return folder


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    build = script("cpp/build")
    program = tmp_path_factory.mktemp("cpp") / "draw"
    done = subprocess.run(build.command(str(program), "-O0"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def test_the_package_is_within_its_bound(model: Any, made: Path) -> None:
    report = against(model, str(made), asked("a star", steps=2, height=16, width=16))
    assert report.equal, report
    assert not all(row.chained.equal for row in report.rows)
    assert {"unet/output out", "text_encoder/output pooled", "step.1/x", "decode/pixels"} < {
        r.stage for r in report.rows
    }


def short(config: ModelConfig) -> ModelConfig:
    """The family with the one level of its UNet that attends, since every layer is compiled for some seconds."""
    attends = next(level for level in config.unet.levels if level.attention != "none")
    return replace(config, unet=replace(config.unet, levels=(attends,), mid=Level(channels=8)))


@pytest.mark.parametrize(("family", "names"), PARTICULAR.items())
def test_packages_of_every_family(family: str, names: list[str], quick: None, tmp_path: Path) -> None:
    pipe = drawn(short(FAMILIES[family]), 3)
    found = [program for program in programs(pipe.config, pipe.parts) if program.name in names]
    assert [program.name for program in found] == names
    for program in found:
        path = formats.write("aoti", program, traced(program), tmp_path)
        assert 0 < measured(program, reading("aoti", program, path)) <= BOUNDS["aoti"].relative, program.name


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_cpp_draws_the_same_picture(model: Any, made: Path, draw: Path, tmp_path: Path, sampler: str) -> None:
    ids = model.tokenizer(["", "a red star"]).flatten().tolist()
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    plan = made / f"plans/{sampler}-3.json"
    told = [made, plan, tmp_path / "ids.txt", tmp_path / "out.ppm", 7, 3.5, "20x16", tmp_path / "latents.bin"]
    done = subprocess.run([draw, *map(str, told)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "...")
    run = {"negative_prompt": "", "sampler": sampler, "steps": 3, "seed": 7, "guidance_scale": 3.5}
    want = model.generate("a red star", **run, height=16, width=20, output="latent")
    got = torch.from_numpy(np.fromfile(tmp_path / "latents.bin", np.float32)).reshape(want.shape)
    assert (got - want).abs().max() <= ELSEWHERE.relative * want.abs().max()
    picture, mine = Image.open(tmp_path / "out.ppm"), model.generate("a red star", **run, height=16, width=20)[0]
    assert picture.size == mine.size == (20, 16)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(mine).astype(int)).max() <= 1


def test_what_cpp_refuses(made: Path, draw: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text("1 2 3")
    (tmp_path / "ids.txt").write_text("1 2")
    plan = made / "plans/dpmpp_2m-3.json"
    cases = {
        "manifest.json: can't be opened": (tmp_path, plan, "ids.txt"),
        "no.json: can't be opened": (made, "no.json", "ids.txt"),
        "ids of two prompts are wanted": (made, plan, tmp_path / "odd.txt"),
        'there is no "first" in the JSON': (made, made / "schedule.json", tmp_path / "ids.txt"),
    }
    for words, given in cases.items():
        done = subprocess.run([draw, *map(str, given), tmp_path / "out.ppm"], capture_output=True, text=True)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out.ppm").exists()
    assert subprocess.run([draw], capture_output=True, text=True).returncode == 2
