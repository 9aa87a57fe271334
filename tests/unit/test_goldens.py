"""The goldens: minidiff equals the recorded runs of diffusers, with the weights of either layout. No diffusers here.

``tests/parity/test_goldens.py`` makes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weights_convert
from minidiff.cli.parity import FAMILIES
from minidiff.parity import assert_recording, goldens, recording
from minidiff.parity.command import run_of
from minidiff.parity.goldens import FOLDER, ORIGINAL, RECORDING, STEPS, request_for
from minidiff.parity.kernels import machine
from minidiff.parity.ours import Ours
from minidiff.parity.values import open_recording
from tests.tolerances import RECORDED

GOLDENS = Path(__file__).resolve().parents[1] / "fixtures" / "goldens"
LARGEST = 3_000_000  # bytes of a family
CASES = [
    (family, layout) for family in FAMILIES for layout in (FOLDER, ORIGINAL) if (GOLDENS / family / layout).exists()
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the goldens were made with; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(goldens.THREADS)
    yield
    torch.set_num_threads(before)


def tolerance(found: recording.Recording) -> float:
    """Equal bits where the same kernels ran, otherwise the bound of another processor."""
    return 0.0 if machine().items() <= found.run.items() else RECORDED.relative


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_minidiff_equals_the_golden(family: str, layout: str, one_thread: None) -> None:
    expected = recording.read_recording(GOLDENS / family / RECORDING)
    pipe = weights_convert.load(GOLDENS / family / layout, device="cpu")
    request = request_for(pipe)
    actual = recording.record(Ours(pipe, request), run_of(pipe, request))
    report = assert_recording(actual, expected, tolerance(expected))
    stages = [row.stage for row in report.rows]
    assert len(stages) > 150
    assert f"step.{STEPS - 1}/x" in stages
    assert stages[-1] == "decode/pixels"
    assert len(report.only_a) < 8, "what minidiff does not show"


def test_a_slip_parts_from_the_golden(one_thread: None) -> None:
    expected = recording.read_recording(GOLDENS / "sd1" / RECORDING)
    pipe = weights_convert.load(GOLDENS / "sd1" / FOLDER, device="cpu")
    pipe.unet.mid.attn[0].norm.eps = 1e-3  # type: ignore[union-attr, index]
    request = request_for(pipe)
    actual = recording.record(Ours(pipe, request), run_of(pipe, request))
    with pytest.raises(AssertionError, match=r"first difference at step\.0/unet/mid\.attn\.0\.norm"):
        assert_recording(actual, expected, RECORDED.relative)


def test_all_families_and_layouts_are_there() -> None:
    assert len(CASES) == 2 * len(FAMILIES) - 1, "ddpm has one layout"
    for family in FAMILIES:
        size = sum(file.stat().st_size for file in (GOLDENS / family).rglob("*") if file.is_file())
        assert 100_000 < size <= LARGEST, family
        with open_recording(GOLDENS / family / RECORDING) as found:
            assert found.title == "diffusers 0.42.1"
            assert {"processor", "torch", "threads", "model", "seed"} <= found.run.keys()
            assert all(value.dtype in ("float32", "int64") for value in found.values.values())
    page = (GOLDENS / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{family}` |" in page for family in FAMILIES)


def test_the_goldens_say_what_was_drawn() -> None:
    """A port needs no random generator: every noise is a stage."""
    with open_recording(GOLDENS / "ddpm" / RECORDING) as found:
        assert {"start/x", "step.0/noise", "step.1/noise"} <= found.values.keys()
    with open_recording(GOLDENS / "inpaint" / RECORDING) as found:
        assert {"encode/pixels", "step.0/mask", "step.0/masked"} <= found.values.keys()
    with open_recording(GOLDENS / "sdxl" / RECORDING) as found:
        assert {"step.0/pooled", "step.0/sizes", "prompt/ids_2"} <= found.values.keys()
