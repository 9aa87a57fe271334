"""``minidiff parity CHECKPOINT`` from the command line, against the installed diffusers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import weights_convert
from minidiff import UnsupportedError, cli
from minidiff.models import attention
from minidiff.parity import recording
from scripts import make_parity_recording as script
from tests.support.convert_sources import write_ddpm, write_folder
from tests.support.parity.twins import folder_twin
from tests.tolerances import RECORDED


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    script.tiny_folder(folder / "sd")
    write_ddpm(folder / "ddpm")
    weights_convert.convert(folder / "sd", folder / "sd.safetensors")
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``minidiff parity`` in an empty folder: (status, lines on stdout, lines on stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(model: str, *argv: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        size = () if model == "ddpm" else ("--size", "24x16")
        status = cli.main(["parity", str(models / model), *map(str, argv), *size])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call


def test_a_folder_is_equal(run: Any, tmp_path: Path) -> None:
    status, out, err = run("sd", "--steps", 2, "--html", "report.html")
    assert status == 0, out
    assert out[-1].startswith("equal: every value is equal at all ")
    assert [line.split()[0] for line in out[7:] if "/" in line][:6] == [
        "plan",
        "prompt",
        "negative",
        "start",
        "step.0",
        "step.1",
    ]
    assert err[:2] == ["minidiff: running minidiff 0.1.0", "minidiff: running diffusers 0.42.1"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert out[-1] in page


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_other_families_are_equal_and_a_slip_in_them_is_named(
    run: Any, models: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_twin(models / kind, kind)
    status, out, _ = run(kind, "--steps", 2, "--quiet")
    assert status == 0, out
    assert out[-1].startswith("equal: ")
    monkeypatch.setattr(attention, "TRANSFORMER_NORM_EPS", 1e-5)
    status, out, _ = run(kind, "--steps", 1, "--quiet")
    assert status == 1
    level = 1 if kind == "sdxl" else 0
    assert f"first difference at step.0/unet/down.{level}.attn.0.norm" in out


def test_a_slip_ends_with_status_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TRANSFORMER_NORM_EPS", 1e-5)
    status, out, err = run("sd", "--steps", 1, "--quiet")
    assert status == 1
    assert err == []
    assert "first difference at step.0/unet/down.0.attn.0.norm" in out
    assert any(line.startswith("  float64   not rounding") for line in out)
    (line,) = [line for line in out if line.startswith("  operation ")]
    assert re.fullmatch(r"  operation aten\.native_group_norm\(.*, 1e-05\) in A, .*\(.*, 1e-06\) in B", line), line
    assert run("sd", "--steps", 1, "--quiet", "--tolerance", "0.01")[0] == 0


@pytest.mark.parametrize("sampler", [None, "ddim", "pndm"])
def test_an_unconditional_folder(run: Any, sampler: str | None) -> None:
    status, out, _ = run("ddpm", "--steps", 4, *(("--sampler", sampler) if sampler else ()))
    assert status == 0, out
    assert any(line.startswith("run ") and f"4 steps of {sampler or 'ddpm'}" in line for line in out)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "tcd", "dpmpp_sde"])
def test_another_sampler_on_both_sides(run: Any, sampler: str) -> None:
    status, out, _ = run("sd", "--steps", 3, "--sampler", sampler, "--seed", 3, "--scale", 1)
    assert status == 0, out


def test_half_precision(run: Any) -> None:
    """The noise is drawn in half precision too, as diffusers does."""
    status, out, _ = run("sd", "--steps", 1, "--dtype", "bfloat16", "--quiet")
    assert status == 0, out


def test_a_sampler_that_an_unconditional_pipeline_cannot_run(run: Any) -> None:
    status, out, err = run("ddpm", "--steps", 2, "--sampler", "euler", "--quiet")
    assert (status, out, len(err)) == (2, [], 1)
    assert "DDPMPipeline scales neither the noise nor what the model sees" in err[0]


def test_a_minidiff_file_is_written_as_a_folder_first(run: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(src: str, dst: str, to: str) -> None:
        assert to == "diffusers"
        shutil.copytree(models / "sd", dst)

    monkeypatch.setattr(weights_convert, "convert", export)
    status, out, err = run("sd.safetensors", "--steps", 1)
    assert status == 0, out
    assert err[0].endswith("as a folder for diffusers")

    def refuse(src: str, dst: str, to: str) -> None:
        raise UnsupportedError("not yet")

    monkeypatch.setattr(weights_convert, "convert", refuse)
    status, out, err = run("sd.safetensors", "--steps", 1, "--quiet")
    assert (status, out, len(err)) == (2, [], 1)
    assert "cannot be written as one (not yet); give the folder" in err[0]


def test_what_diffusers_cannot_do_is_one_line(run: Any, models: Path) -> None:
    write_folder(models / "bare")  # a tokenizer without its config: diffusers opens it, and fails at the first prompt
    status, out, err = run("bare", "--steps", 1, "--quiet")
    assert (status, out, len(err)) == (2, [], 1)
    assert "diffusers cannot run this (OverflowError" in err[0]
    shutil.copytree(models / "sd", models / "cut")
    (models / "cut" / "tokenizer" / "vocab.json").write_text("{}")
    status, out, err = run("cut", "--steps", 1, "--quiet")
    assert (status, out, len(err)) == (2, [], 1)
    status, out, err = run("nothing", "--quiet")
    assert (status, out, len(err)) == (2, [], 1)
    assert "no such file or folder" in err[0]
    status, out, err = run("sd", "--sampler", "oiler", "--quiet")
    assert (status, out, len(err)) == (2, [], 1)
    assert "no sampler is called 'oiler'" in err[0]


def test_the_shipped_recording_is_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script", str(tmp_path / "now.safetensors")])
    script.main()
    shipped, now = recording.read_recording(script.FIXTURE), recording.read_recording(tmp_path / "now.safetensors")
    assert list(shipped.tape) == list(now.tape)
    assert {**shipped.run, "torch": None} == {**now.run, "torch": None}
    assert recording.compare(shipped, now, RECORDED.relative).equal
