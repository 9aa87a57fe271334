"""``minidiff parity``, ``parity record`` and ``parity compare`` without diffusers: grammar, files, status, mistakes."""

from __future__ import annotations

import builtins
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minidiff.parity import recording, start_images
from tests.support.command import TEXT, Run, one_error
from tests.support.convert_sources import write_ddpm

ROOT = Path(__file__).resolve().parents[2]


COMMON = ("--steps", 2, "--size", "16x16")


def test_record_and_compare(run: Run, models: Path, tmp_path: Path) -> None:
    status, out, err = run("parity", "record", models / "text.safetensors", "a.safetensors", *COMMON)
    assert (status, out) == (0, ["a.safetensors"])
    assert len(err) == 1
    recorded = (tmp_path / "a.safetensors").stat().st_size
    stages = len(recording.read_recording(tmp_path / "a.safetensors").tape)
    assert err[0].startswith(f"minidiff: {stages:,} stages, {recorded / 1e6:.1f} MB; `minidiff parity compare`")
    run("parity", "record", models / "text.safetensors", "b.safetensors", *COMMON, "--quiet")
    status, out, err = run("parity", "compare", "a.safetensors", "b.safetensors")
    assert status == 0
    assert err == []
    assert out[-1].startswith("equal: every value is equal at all ")
    assert any(line.startswith("run ") and "prompt 'a photo of an astronaut" in line for line in out)

    found = recording.read_recording(tmp_path / "b.safetensors")
    tape = dict(found.tape)
    tape["step.1/x"] = tape["step.1/x"] * 1.01
    recording.write_recording(tmp_path / "c.safetensors", recording.Recording(tape, found.run))
    status, out, err = run("parity", "compare", "a.safetensors", "c.safetensors", "--html", "r.html", "--quiet")
    assert status == 1
    assert err == []
    assert "first difference at step.1/x" in out
    assert "first difference at step.1/x" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert run("parity", "compare", "a.safetensors", "c.safetensors", "--tolerance", "0.1")[0] == 0
    every = run("parity", "compare", "a.safetensors", "c.safetensors", "--all")[1]
    assert len(every) > len(tape) > len(out)


def test_a_judge(run: Run, models: Path) -> None:
    for name, dtype in (("a", "float32"), ("b", "bfloat16"), ("c", "float64")):
        run("parity", "record", models / "plain.safetensors", f"{name}.safetensors", "--steps", 2, "--dtype", dtype)
    status, out, _ = run("parity", "compare", "a.safetensors", "b.safetensors", "--judge", "c.safetensors")
    assert status == 1
    (line,) = [line for line in out if line.startswith("  float64")]
    assert line.endswith("A is nearer")
    assert any("float32 in A, bfloat16 in B" in line for line in out)


def test_a_recording_says_what_was_run(run: Run, models: Path, tmp_path: Path) -> None:
    run("parity", "record", models / "text.safetensors", "a.safetensors", *COMMON, "--prompt", "a fox", "--seed", 7,
        "--sampler", "euler_ancestral", "--layers", "none")  # fmt: skip
    found = recording.read_recording(tmp_path / "a.safetensors")
    said = {key: found.run[key] for key in ("prompt", "negative", "seed", "steps", "sampler", "width", "dtype")}
    assert said == {
        "prompt": "a fox",
        "negative": "",
        "seed": 7,
        "steps": 2,
        "sampler": "euler_ancestral",
        "width": 16,
        "dtype": "float32",
    }
    assert (
        run("parity", "record", models / "text.safetensors", "b.safetensors", "--steps", 1, "--layers", "none")[0] == 0
    )
    own = recording.read_recording(tmp_path / "b.safetensors").run
    assert TEXT.vae is not None
    side = TEXT.unet.sample_size * TEXT.vae.factor
    assert (own["width"], own["height"]) == (side, side), "without --size the model's own"
    assert "step.1/noise" in found.tape
    assert not any("/unet/" in stage for stage in found.tape)
    assert torch.equal(found.tape["plan/timesteps"].long(), torch.tensor([999, 0]))


def test_a_run_that_begins_from_a_picture(run: Run, models: Path, tmp_path: Path) -> None:
    """In the tiny model's case because it is asked for; a model that cannot do without gets one that is made."""
    start_images.image(None, 40, 40).save(tmp_path / "p.png")
    files = ("--image", "p.png", "--strength", "0.5")
    status, _, err = run("parity", "record", models / "text.safetensors", "a.safetensors", *COMMON, *files)
    assert (status, len(err)) == (0, 1)
    found = recording.read_recording(tmp_path / "a.safetensors")
    assert found.run["strength"] == 0.5
    assert found.tape["encode/pixels"].shape == (1, 3, 16, 16)
    in_order = ("encode/pixels", "encode/vae/encoder", "encode/latents", "encode/added", "encode/noisy", "step.0/input")
    assert sorted(in_order, key=list(found.tape).index) == list(in_order)
    assert torch.equal(found.tape["start/x"], found.tape["encode/noisy"])
    assert "step.1/x" in found.tape
    assert "step.2/x" not in found.tape, "half of two steps, the half that PNDM makes in two calls"


def test_the_made_picture_and_mask_never_change() -> None:
    """Recorded: a recording of today is held against one that another release made."""
    made = {(32, 24): ("0725b25de8b6c7a2", "4769cbbdfcaa1170"), (256, 256): ("14849f2a8400feb5", "ff60d1c42efbc65f")}
    for size, hashes in made.items():
        pair = start_images.image(None, *size), start_images.mask(None, *size)
        assert tuple(hashlib.sha256(np.asarray(p).tobytes()).hexdigest()[:16] for p in pair) == hashes, size


def test_the_made_picture_and_mask_show_much() -> None:
    for width, height in ((32, 24), (256, 256)):
        image = torch.tensor(np.asarray(start_images.image(None, width, height)))
        assert image.shape == (height, width, 3)
        assert min(len(image[..., c].unique()) for c in range(3)) >= min(height // 2, 100)
        shades = torch.tensor(np.asarray(start_images.mask(None, width, height)))
        assert shades.shape == (height, width)
        black, grey, white = (shades == 0).sum(), ((shades > 0) & (shades < 255)).sum(), (shades == 255).sum()
        assert min(black, grey, white) > shades.numel() / 20
        assert (shades < 128).logical_and(shades > 76).any(), "a threshold elsewhere would make a difference"


def test_help(run: Run) -> None:
    for argv, words in (
        (
            ("parity",),
            ("usage: minidiff parity ", "exit status: 0 if all stages are equal", "--html", "--strength", "samplers:"),
        ),
        (("parity", "record"), ("usage: minidiff parity record ", "OUT.safetensors", "--layers")),
        (("parity", "compare"), ("usage: minidiff parity compare ", "--judge", "exit status")),
    ):
        status, out, err = run(*argv, "--help")
        page = "\n".join(out)
        assert (status, err) == (0, [])
        for word in words:
            assert word in page, word


def test_without_diffusers_one_line_says_what_to_install(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("diffusers", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return inner(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    folder = write_ddpm(tmp_path / "ddpm")
    one_error(run("parity", folder), "diffusers is not installed", "pip install 'minidiff[parity]'", "compare")
    assert run("parity", "record", models / "plain.safetensors", "a.safetensors", "--steps", 1, "--quiet")[0] == 0
    assert run("parity", "compare", "a.safetensors", "a.safetensors")[0] == 0


def test_comparing_recordings_imports_no_peer(models: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom minidiff import cli\n"
        f"cli.main(['parity', 'record', {str(models / 'plain.safetensors')!r}, 'a.safetensors', '--steps', '1'])\n"
        "cli.main(['parity', 'compare', 'a.safetensors', 'a.safetensors'])\n"
        "print(sorted({'diffusers', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_mistakes_are_one_line(run: Run, models: Path, tmp_path: Path) -> None:
    text, plain = models / "text.safetensors", models / "plain.safetensors"
    one_error(run("parity", "compare", "no.safetensors", "b.safetensors"), "no.safetensors: no such file")
    one_error(run("parity", "compare", text, text), "no recording", "`minidiff parity record` makes one")
    one_error(run("parity", "record", "no", "a.safetensors"), "no: no such file or folder")
    one_error(run("parity", "record", plain, "a.safetensors", "--prompt", "a fox"), "takes no --prompt")
    one_error(run("parity", "record", plain, "a.safetensors", "--image", "p.png"), "takes no --image")
    one_error(run("parity", "record", text, "a.safetensors", "--strength", "0.5"), "give an --image too")
    one_error(run("parity", "record", text, "a.safetensors", "--mask", "p.png"), "p.png: no such file; --mask names")
    one_error(run("parity", "record", plain, "a.safetensors", "--sampler", "oiler"), "no sampler is called 'oiler'")
    one_error(run("parity", "record", text, "nowhere/a.safetensors"), "the folder nowhere does not exist")
    one_error(run("parity", "record", text, "."), "is a folder", "name a file")
    one_error(run("parity", "record", text, ".", "--force"), "is a folder", "name a file")
    one_error(run("parity", "record", text, "a.safetensors", "--size", "10x16"), "is not divisible by 8")
    one_error(run("parity", "compare", "a", "b", "--tolerance", "-1"), "should be 0 or more")
    one_error(run("parity", "record", text), "OUT.safetensors")
    one_error(run("parity"), "CHECKPOINT")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    one_error(run("parity", "record", "empty", "a.safetensors"), "empty: a folder with nothing", "not a model")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    one_error(run("parity", "record", text, "there.safetensors"), "already exists", "--force")
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    run("parity", "record", plain, "a.safetensors", "--steps", 1, "--quiet")
    run("parity", "record", plain, "b.safetensors", "--steps", 2, "--quiet")
    one_error(run("parity", "compare", "a.safetensors", "b.safetensors"), "different runs: steps is 1 and 2")
    one_error(run("parity", "compare", "a.safetensors", "a.safetensors", "--html", "b.safetensors"), "already exists")
