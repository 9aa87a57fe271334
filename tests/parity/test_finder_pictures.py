"""The finder of differences on runs from a picture: SDXL's refiner, inpainting models, and image to image.

As in ``test_finder_plants.py``: without a slip every stage is equal, and a slip is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import weights_convert
from minidiff import cli
from minidiff.models.vae import VAE
from minidiff.parity import start_images, theirs
from minidiff.parity.command import pair
from minidiff.parity.report import outcome, reasons
from minidiff.pipeline import StableDiffusion, images, prompts
from minidiff.pipeline import latents as start
from minidiff.pipeline import stable_diffusion as pipeline
from tests.parity.test_finder_plants import REQUEST, Pair
from tests.parity.test_pipeline_inpaint import mask
from tests.support.parity import twins
from tests.support.parity.controls import controlnet_twin, t2i_twin
from tests.support.parity.pairs import picture
from weights_convert.module_names import module_names

KINDS = ("refiner", "inpaint", "sdxl_inpaint")
PICTURE = replace(REQUEST, image=start_images.image(None, 32, 24), strength=0.8)
MASKED = replace(PICTURE, mask=start_images.mask(None, 32, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("pictures")

    def written(kind: str) -> Path:
        if not (root / kind).exists():
            twins.folder_twin(root / kind, kind)
        return root / kind

    return written


@pytest.fixture(scope="module")
def opened(folder: Callable[[str], Path]) -> Callable[[str], Pair]:
    found: dict[str, Pair] = {}

    def sides(kind: str) -> Pair:
        if kind not in found:
            ours = weights_convert.load(folder(kind), device="cpu")
            assert isinstance(ours, StableDiffusion)
            request = PICTURE if kind == "refiner" else MASKED
            reference = theirs.open_pipeline(folder(kind), torch.float32, "cpu")
            reference = theirs.taking_a_picture(reference, masked=request.mask is not None)
            found[kind] = Pair(ours, reference, pair(ours.parts, reference, module_names(ours.config)), request)
        return found[kind]

    return sides


# What a run from a picture shows beside the stages of any other, by kind.
SHOWN = {
    "refiner": ("step.0/pooled", "step.0/sizes"),
    "inpaint": ("encode/pixels#2", "encode/vae/encoder.mid.attn.norm#2", "step.0/mask", "step.1/masked"),
    "sdxl_inpaint": ("encode/pixels#2", "step.0/mask", "step.0/masked", "step.0/sizes"),
    "sd1": ("step.0/latents", "step.0/added", "step.0/noisy"),  # an ordinary model keeps what the mask leaves
}


@pytest.mark.parametrize("kind", SHOWN)
def test_every_stage_is_equal(opened: Callable[[str], Pair], kind: str) -> None:
    sides = opened(kind)
    report = sides.find(sides.ours)
    assert report.equal, outcome(report)
    assert all(row.chained.equal for row in report.rows)
    stages = [row.stage for row in report.rows]
    common = ("encode/pixels", "encode/vae/encoder.down.0.res.0.conv1", "encode/vae/quant", "encode/latents",
              "encode/added", "encode/noisy", "start/x", "step.1/prediction", "decode/pixels")  # fmt: skip
    for stage in (*common, *SHOWN[kind]):
        assert stage in stages
    in_order = ("plan/timesteps", "encode/pixels", "encode/noisy", "start/x", "step.0/input", "decode/pixels")
    assert sorted(in_order, key=stages.index) == list(in_order)
    assert report.only_a == []
    # diffusers also encodes a masked picture that an ordinary model does not read.
    unread = [stage for stage in report.only_b if stage.startswith("encode/") and "#2" in stage]
    assert report.only_b == (unread if kind == "sd1" else [])


# --- slips -----------------------------------------------------------------------------------------------------------

Plant = Callable[[StableDiffusion, pytest.MonkeyPatch], None]


def encoder_eps(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    vae = pipe.vae
    assert isinstance(vae, VAE)
    vae.encoder.mid.attn.norm.eps = 1e-3


def score(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "NEGATIVE_SCORE", pipeline.SCORE)


def unscaled(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    inner = start.encode
    patch.setattr(start, "encode", lambda vae, *args: inner(vae, *args) / vae.config.scaling_factor)


def row(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    inner = start.FirstSample._noisy
    patch.setattr(start.FirstSample, "_noisy", lambda self, *args: inner(replace(self, noised=self.noised - 1), *args))


def channels(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    inner = pipeline.predictor
    patch.setattr(pipeline, "predictor", lambda *args: inner(*args[:4], args[4].roll(1, dims=1), *args[5:]))


def threshold(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(images, "MASKED", 0.3)


def sides_swapped(pipe: StableDiffusion, patch: pytest.MonkeyPatch) -> None:
    inner = prompts.size_ids
    patch.setattr(prompts, "size_ids", lambda config, sizes, h, w, score: inner(config, sizes, w, h, score))


@pytest.mark.parametrize(
    ("kind", "plant", "stage", "advice"),
    [
        ("refiner", encoder_eps, "encode/vae/encoder.mid.attn.norm", "epsilon"),
        ("refiner", score, "step.0/sizes", "the refiner's score"),
        ("refiner", unscaled, "encode/latents", "the scaling factor"),
        ("refiner", row, "encode/noisy", "the row of the plan"),
        ("inpaint", channels, "step.0/mask", "the order (mask, then masked picture)"),
        ("inpaint", threshold, "encode/pixels#2", "where the mask is white"),
        ("sdxl_inpaint", sides_swapped, "step.0/sizes", "height before width"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_slip_is_named(
    opened: Callable[[str], Pair],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    plant: Plant,
    stage: str,
    advice: str,
) -> None:
    sides = opened(kind)
    planted = sides.copy()
    plant(planted, monkeypatch)
    report = sides.find(planted, judge=plant is encoder_eps)
    assert outcome(report) == f"first difference at {stage}"
    assert advice in reasons(report)["where"]
    assert report.first is not None
    if plant is encoder_eps:  # in float64 too, where SDXL's pipelines would put the VAE into float32
        assert report.first.judgement is not None
        assert report.first.judgement.gap is not None
        assert not report.first.judgement.same_function


# --- the command -----------------------------------------------------------------------------------------------------


def lines(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = cli.main(["parity", *map(str, argv), "--steps", "2", "--quiet"])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_makes_what_a_model_needs(
    folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    status, out = lines(capsys, folder(kind))
    assert status == 0, out
    assert out[-1].startswith("equal: ")
    (run,) = (line for line in out if line.startswith("run "))
    strength = 0.8 if kind == "refiner" else 1  # with a mask, as the reference's inpainting has it
    assert f"from a picture made for this at strength {strength}" in run
    assert ("painting where a mask made for this is white" in run) == (kind != "refiner")


def test_the_command_takes_files(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(50, 37).save(tmp_path / "p.png")
    mask(50, 37).save(tmp_path / "m.png")
    files = ("--image", tmp_path / "p.png", "--mask", tmp_path / "m.png", "--strength", 1, "--size", "32x24")
    status, out = lines(capsys, folder("inpaint"), *files)
    assert status == 0, out
    (run,) = (line for line in out if line.startswith("run "))
    assert f"from {tmp_path / 'p.png'} at strength 1, painting where {tmp_path / 'm.png'} is white" in run
    status, out = lines(capsys, folder("sd1"), *files[:2])  # image to image
    assert status == 0, out
    assert any(line.startswith("encode ") for line in out)


def test_a_single_file(folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights_convert.convert(folder("refiner"), tmp_path / "refiner.safetensors")
    status, out = lines(capsys, tmp_path / "refiner.safetensors")
    assert status == 0, out


# --- controls --------------------------------------------------------------------------------------------------------


def test_the_command_takes_controls(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal layer by layer, as a folder and as a file."""
    reference = controlnet_twin()
    reference.save_pretrained(str(tmp_path / "net"))
    weights_convert.convert(tmp_path / "net", tmp_path / "net.safetensors")
    picture(50, 37).save(tmp_path / "p.png")
    one, other = (f"{tmp_path / name}={tmp_path / 'p.png'},0.7" for name in ("net", "net.safetensors"))
    status, out = lines(
        capsys, folder("sd1"), "--control", one, "--control", f"{other},0,0.5", "--size", "32x24", "--all"
    )
    assert status == 0, out
    assert sum(line.split()[0].startswith("control.0/hint.conv") for line in out if line) == 12, out
    assert any(line.startswith("control.1/zero.3 ") for line in out)
    (run,) = (line for line in out if line.startswith("run "))
    assert f"under {tmp_path / 'net'}={tmp_path / 'p.png'} and " in run
    status, out = lines(capsys, folder("sd1"), "--control", one, "--image", tmp_path / "p.png", "--size", "32x24")
    assert status == 0, out


def test_the_command_takes_t2i_adapters(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t2i_twin().save_pretrained(str(tmp_path / "adapter"))
    picture(50, 37).save(tmp_path / "p.png")
    value = f"{tmp_path / 'adapter'}={tmp_path / 'p.png'}"
    status, out = lines(
        capsys, folder("sd1"), "--control", f"{value},0.5", "--control", value, "--size", "32x24", "--all"
    )
    assert status == 0, out
    assert any(line.startswith("control.1/levels.2.res.1.conv2 ") for line in out)
    status, _ = lines(capsys, folder("sd1"), "--control", f"{value},1,0,0.5", "--size", "32x24")
    assert status == 2
