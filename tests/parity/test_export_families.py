"""Export and import of every family in both layouts: the reference loads the files, and the models come back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import weights_convert
from minidiff.pipeline import load
from tests.parity.test_export import opened, silence
from tests.parity.test_pipeline_inpaint import mask
from tests.support.parity import twins
from tests.support.parity.pairs import NEGATIVE, PROMPT, RENAMED, picture, streams
from tests.tolerances import assert_close

KINDS = ("sd2", "inpaint", "sd2_inpaint", "lcm", "sdxl", "sdxl_inpaint", "refiner")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The kind, the reference's pipeline, and a folder with its own folder and the minidiff file."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = twins.folder_twin(folder / "folder", request.param)
    weights_convert.convert(folder / "folder", folder / "model.safetensors")
    return request.param, theirs, folder


def same_parts(got: Any, want: Any) -> None:
    for name in PARTS:
        if getattr(want, name, None) is None:
            assert getattr(got, name, None) is None
            continue
        ours, theirs = getattr(got, name).state_dict(), getattr(want, name).state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert_close(ours[key], tensor, where=f"{name}.{key}")


def same_latents(theirs: Any, ours: Any, kind: str) -> None:
    """The exported pipeline as it is, its own scheduler too, against ours."""
    options: dict[str, Any] = {"steps": 3, "guidance_scale": 7.5}
    if kind != "lcm":  # which takes no negative prompt
        options["negative_prompt"] = NEGATIVE
    if "inpaint" in kind or kind == "refiner":
        options |= {"image": picture(), "strength": 0.7}
    if "inpaint" in kind:
        options |= {"mask": mask(), "height": 32, "width": 32}
    want = theirs(
        PROMPT, generator=streams(5), output_type="latent", **{RENAMED.get(k, k): v for k, v in options.items()}
    ).images
    got = ours.generate(PROMPT, generator=streams(5), output="latent", progress=False, **options)
    assert want.std() > 0.05, "a dead twin would prove nothing"
    assert_close(got, want, where=kind)


def test_folder(model: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, theirs, folder = model
    weights_convert.convert(folder / "model.safetensors", tmp_path / "out", to="diffusers")
    pipe = opened(tmp_path / "out")
    assert type(pipe) is type(theirs)
    same_parts(pipe, theirs)
    same_latents(pipe, load(folder / "model.safetensors", device="cpu"), kind)
    for option in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert bool(pipe.config.get(option)) == bool(theirs.config.get(option)), option
    weights_convert.convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_single_file(model: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, theirs, folder = model
    report = weights_convert.convert(folder / "model.safetensors", tmp_path / "one.safetensors", to="original")
    if kind == "lcm":  # the reference's reader of single files has no name for the projection of the guidance scale
        assert "diffusers reads such models from folders only" in str(report)
    else:
        with silence():
            pipe: DiffusionPipeline = type(theirs).from_single_file(
                tmp_path / "one.safetensors", config=str(folder / "folder"), local_files_only=True
            )
        same_parts(pipe, theirs)
    weights_convert.convert(tmp_path / "one.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
