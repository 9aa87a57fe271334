"""Recordings: contents, errors, and the stored recording of diffusers, which minidiff must repeat.

tests/fixtures/recording_sd1.safetensors was made by scripts/make_parity_recording.py; nothing of diffusers is needed
here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff import CheckpointError, ConfigError
from minidiff.parity import recording
from minidiff.parity.command import run_of
from minidiff.parity.header import RUN_KEY, STAGES_KEY, VERSION_KEY
from minidiff.parity.ours import Ours, asked
from minidiff.parity.recording import (
    Recording,
    compare,
    read_recording,
    record,
    write_recording,
)
from minidiff.parity.report import outcome, reasons, text
from minidiff.samplers import SAMPLERS
from minidiff.storage.files import lazy, write_tensors
from tests.support.tiny import tiny_ddpm, tiny_sd
from tests.tolerances import RECORDED

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "recording_sd1.safetensors"
REQUEST = asked("a red fox", negative_prompt="blurry", steps=3, seed=5, width=24, height=16)


def ours(change: Callable[[Any], None] = lambda pipe: None, **options: Any) -> Recording:
    """The recorded run in minidiff, with ``change`` made to the model."""
    pipe = tiny_sd()
    change(pipe)
    return record(Ours(pipe, REQUEST, **options), run_of(pipe, REQUEST))


def test_minidiff_repeats_the_recorded_run_of_diffusers() -> None:
    reference = read_recording(FIXTURE)
    assert reference.title.startswith("diffusers 0.42")
    report = compare(reference, ours(), RECORDED.relative)
    assert report.equal, text(report)
    stages = [row.stage for row in report.rows]
    assert len(stages) > 200
    assert {"prompt/ids", "plan/timesteps", "step.0/unet/mid.attn.0.blocks.0.ff.gate", "step.3/x"} <= set(stages)
    exact = {"prompt/ids", "negative/ids", "plan/timesteps", "plan/init_noise_sigma", "step.0/t", "step.3/t"}
    assert all(row.chained.equal for row in report.rows if row.stage in exact)


def test_a_slip_parts_from_the_recorded_run() -> None:
    def eps(pipe: Any) -> None:
        pipe.unet.mid.attn[0].norm.eps = 1e-3

    report = compare(read_recording(FIXTURE), ours(eps), RECORDED.relative)
    assert report.first is not None
    assert report.first.stage == "step.0/unet/mid.attn.0.norm"
    said = "this module computes something else, and every stage before it is within the tolerance: weights, bias"
    assert reasons(report)["where"].startswith(said)


def test_the_fixture_is_small() -> None:
    assert FIXTURE.stat().st_size < 400_000


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    tape = {"z/late": torch.randn(3, 2), "a/early": torch.arange(4), "m/half": torch.randn(2).half()}
    tape = {"start/x": torch.zeros(0), **tape}
    write_recording(tmp_path / "r.safetensors", Recording(tape, {"program": "mine", "steps": 3}))
    found = read_recording(tmp_path / "r.safetensors")
    assert list(found.tape) == list(tape), "in the order of the run, not of the file"
    assert all(torch.equal(found.tape[s], t) and found.tape[s].dtype == t.dtype for s, t in tape.items())
    assert found.run == {"program": "mine", "steps": 3}
    assert found.title == "mine"
    assert Recording({}).title == "a program that does not say its name"


def test_inputs_that_are_an_output_unchanged_are_left_out() -> None:
    tape = ours().tape
    assert "step.0/unet/down.0.res.0.conv1:in" in tape, "behind a norm comes an activation"
    assert "step.0/unet/down.0.attn.0.blocks.0.attn1:in" not in tape, "a norm's output as it is"
    assert "step.0/unet/up.0.res.0:in" in tape, "a skip is joined"
    assert not any(stage.startswith("step.1/unet/") for stage in tape)
    assert any(stage.startswith("step.1/unet/") for stage in ours(deep=lambda scope: True).tape)
    assert not any("/unet/" in stage or "/vae/" in stage for stage in ours(deep=lambda scope: False).tape)


def test_the_halves_of_the_autoencoder_are_stages_of_their_own() -> None:
    request = replace(REQUEST, image=torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)), strength=0.5)
    pipe = tiny_sd()
    tape = record(Ours(pipe, request), run_of(pipe, request)).tape
    halves = {
        half: {stage.split("/")[2].split(".")[0].split(":")[0] for stage in tape if stage.startswith(f"{half}/vae/")}
        for half in ("encode", "decode")
    }
    assert halves == {"encode": {"encoder", "quant"}, "decode": {"decoder", "post_quant"}}


def test_a_model_without_text_is_recorded() -> None:
    pipe = tiny_ddpm()
    request = asked(None, steps=2, seed=1)
    found = record(Ours(pipe, request), run_of(pipe, request))
    assert list(found.tape)[:3] == ["plan/timesteps", "plan/init_noise_sigma", "start/x"]
    assert "step.0/noise" in found.tape, "DDPM draws, and another program can take the same"
    assert "step.1/noise" not in found.tape, "but not at its last step"
    assert "prompt" not in found.run


def test_two_runs_of_minidiff_are_equal_and_float64_judges() -> None:
    a, b = ours(), ours()
    assert compare(a, b).equal

    def double(pipe: Any) -> None:
        pipe.to(dtype=torch.float64)

    def rounding(pipe: Any) -> None:
        conv = pipe.unet.mid.res2.conv1
        conv.forward = lambda x: torch.nn.functional.conv2d(
            x.double(), conv.weight.double(), conv.bias.double(), padding=1
        ).float()

    judge, b = ours(double), ours(rounding)
    assert judge.tape["step.0/unet/conv_in"].dtype == torch.float64
    report = compare(a, b, judge=judge)
    assert report.first is not None
    assert report.first.stage == "step.0/unet/mid.res2.conv1"
    assert report.first.judgement is not None
    assert "by the judge's recording" in reasons(report)["float64"]
    assert report.first.judgement.error_a < 1e-4


# what is refused


def raw(path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    """A safetensors file with a header of one's own."""
    write_tensors(path, {name: lazy(t) for name, t in tensors.items()}, header)
    return path


def header(stages: Any, **changes: str) -> dict[str, str]:
    return {VERSION_KEY: "1", STAGES_KEY: json.dumps(stages), RUN_KEY: "{}"} | changes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no recording; `minidiff parity record` makes one"),
        (header(["x"], **{VERSION_KEY: "3"}), "version '3'; this minidiff reads '1' and '2'"),
        (header(["x", "y"]), "stage 'y' is listed as a stage, but missing"),
        (header(["x", "y", "z"]), r"stage 'y' is listed as a stage, but missing \(and 1 more\)"),
        (header(["x", "x"]), "stage 'x' is listed more than once"),
        (header([]), "must list the names of stages"),
        (header([1]), "must list the names of stages"),
        (header({"x": 1}), "recording.stages in its header should be a JSON list"),
        (header(["x"], **{STAGES_KEY: "[" * 100_000}), "should be a JSON list"),
        (header(["x"], **{RUN_KEY: "[]"}), "recording.run in its header should be a JSON object"),
        (header(["x"], **{RUN_KEY: "{"}), "should be a JSON object"),
    ],
)
def test_a_recording_that_lies_is_refused(given: dict[str, str], said: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "r.safetensors", {"x": torch.zeros(2)}, **given)
    with pytest.raises(CheckpointError, match=said) as e:
        read_recording(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


def test_a_tensor_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    path = raw(tmp_path / "r.safetensors", {"x": torch.zeros(2), "y": torch.zeros(2)}, **header(["x"]))
    with pytest.raises(CheckpointError, match="stage 'y' is in the file, but not listed as a stage"):
        read_recording(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_recording(tmp_path / "r.safetensors")
    (tmp_path / "r.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_recording(tmp_path / "r.safetensors")
    whole = FIXTURE.read_bytes()
    (tmp_path / "r.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_recording(tmp_path / "r.safetensors")


def test_recordings_of_different_runs_are_not_compared() -> None:
    tape = {"start/x": torch.zeros(2)}
    for key, x, y in (("steps", 3, 4), ("model", "ab", "cd"), ("prompt", "a fox", "an owl")):
        with pytest.raises(ConfigError, match=f"different runs: {key} is {x!r} and {y!r}"):
            compare(Recording(tape, {key: x}), Recording(tape, {key: y}))
        assert compare(Recording(tape, {key: x}), Recording(tape)).equal, "what one does not say, it may share"
    with pytest.raises(ConfigError, match="different runs: seed"):
        compare(Recording(tape, {"seed": 1}), Recording(tape, {"seed": 1}), judge=Recording(tape, {"seed": 2}))


def test_recordings_of_different_models_are_told_apart() -> None:
    sd, ddpm = tiny_sd(), tiny_ddpm()
    assert recording.architecture(sd.config) == recording.architecture(tiny_sd(seed=1).config), "weights don't count"
    assert recording.architecture(sd.config) != recording.architecture(ddpm.config)
    a = Recording({"start/x": torch.zeros(2)}, run_of(sd, REQUEST))
    b = Recording({"start/x": torch.zeros(2)}, run_of(ddpm, asked(None, steps=3, seed=5)))
    with pytest.raises(ConfigError, match="different runs: model is"):
        compare(a, b)


def test_recordings_with_nothing_in_common_are_not_compared() -> None:
    with pytest.raises(ConfigError, match=r"no stage is common to both: mine has 'x', \.\.\.; yours has 'y'"):
        compare(
            Recording({"x": torch.zeros(2)}, {"program": "mine"}),
            Recording({"y": torch.zeros(2)}, {"program": "yours"}),
        )


def test_nan_in_a_recording_is_where_they_part() -> None:
    a = Recording({"step.0/x": torch.zeros(2), "step.1/x": torch.tensor([0.0, torch.nan])})
    report = compare(a, a, tolerance=1e9)
    assert outcome(report) == "first difference at step.1/x"
    assert reasons(report)["how far"] == "not finite: 1 NaN in A, 1 in B, of 2 values"
    assert "NaN" in text(report)


def test_a_run_from_a_picture_with_two_calls_a_step_is_watched_from_the_row_it_begins_at() -> None:
    """Which row that is depends on the sampler's order; the watched sampler has the one that it is."""
    pipe = tiny_sd()
    picture = Image.new("RGB", (64, 64), "red")
    request = asked(steps=5, sampler=SAMPLERS["heun"](), image=picture, strength=0.6)
    shown: list[str] = []

    def tap(stage: str, value: Tensor) -> Tensor:
        shown.append(stage)
        return value

    Ours(pipe, request).run(tap)
    run = pipe.steps(request.prompt, steps=5, sampler="heun", image=picture, strength=0.6, seed=0)
    assert len({stage.split("/")[0] for stage in shown if stage.startswith("step.")}) == len(run.rows)
