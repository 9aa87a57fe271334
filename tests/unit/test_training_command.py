"""``minidiff train`` from the command line: a run from nothing, going on with it, and what it says when it cannot."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.arguments import parser
from minidiff.cli import main
from minidiff.files import TensorFile, write_tensors
from minidiff.training.command import settings, small_model
from minidiff.training.settings import TrainConfig
from minidiff.training.state import KEY
from tests.tolerances import assert_close
from tests.unit.tiny import DDPM, SD, tiny_sd

TINY = ["--steps", "4", "--batch", "2", "--rate", "1e-3", "--save-every", "2", "--quiet", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures, a bright square at different places, with captions."""
    path = tmp_path / "photos"
    path.mkdir()
    for i in range(12):
        image = Image.new("RGB", (24, 20), (40, 60, 120))
        image.paste((250, 220, 180), (2 + i, 4 + i // 2, 10 + i, 12 + i // 2))
        image.save(path / f"{i:02}.png")
        (path / f"{i:02}.txt").write_text(f"square number {i}")
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The config of a tiny pixel model, as a file."""
    (tmp_path / "ddpm.json").write_text(json.dumps(asdict(DDPM)))
    return str(tmp_path / "ddpm.json")


def complaint(capfd: Any, *argv: Any) -> str:
    """The one line that ``argv`` ends in."""
    assert main(["train", *map(str, argv)]) == 2
    lines = capfd.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    return str(lines[0])


def test_a_folder_of_pictures_trains_a_model_and_the_loss_falls(photos: Path, tmp_path: Path, tiny: str) -> None:
    """From about 1.3 to below 0.5 in 40 steps: the mean over the last ten."""
    run = tmp_path / "run"
    options = [*TINY, "--steps", "40", "--batch", "8", "--rate", "5e-3", "--sample-every", "40", "--samples", "4"]
    assert main(["train", "--data", str(photos), "--out", str(run), "--config", tiny, *options]) == 0
    losses = [float(line.split(",")[1]) for line in (run / "log.csv").read_text().split()[1:]]
    assert losses[0] > 0.9
    assert sum(losses[-10:]) / 10 < 0.5
    assert Image.open(run / "samples" / "step-0000040.png").size == (16, 16)
    assert main(["generate", "--model", str(run / "model.safetensors"), "--steps", "2", "--sampler", "ddim", "--quiet",
                 "--out", str(tmp_path / "new.png")]) == 0  # fmt: skip


def test_going_on_needs_no_repeated_options_and_ends_at_the_same_weights(
    photos: Path, tmp_path: Path, tiny: str
) -> None:
    begin = ["train", "--data", str(photos), "--curve", "constant", *TINY]
    assert main([*begin, "--out", str(tmp_path / "whole"), "--config", tiny]) == 0
    assert main([*begin, "--out", str(tmp_path / "half"), "--config", tiny, "--steps", "2", "--warmup", "0"]) == 0
    rest = ["train", "--data", str(photos), "--out", str(tmp_path / "half"), "--steps", "4", "--quiet"]
    assert main([*rest, "--resume", "--device", "cpu"]) == 0
    whole, half = (TensorFile(tmp_path / name / "state.safetensors").lazy for name in ("whole", "half"))
    assert len(whole) > 300
    for name, tensor in whole.items():
        assert_close(half[name].load(), tensor.load(), where=name)


def test_going_on_with_other_pictures_is_said(photos: Path, tmp_path: Path, capfd: Any) -> None:
    """With counts; captions and cached latents included. A state of before there were marks says nothing."""
    tiny_sd().save(tmp_path / "sd.safetensors")
    out = tmp_path / "run"
    begin = ["train", "--data", str(photos), "--size", "16", "--out", str(out), "--cache-latents"]
    assert main([*begin, "--model", str(tmp_path / "sd.safetensors"), *TINY]) == 0
    capfd.readouterr()
    go_on = [*begin, "--resume", "--quiet", "--device", "cpu", "--steps"]
    assert main([*go_on, "5"]) == 0
    assert capfd.readouterr().err == ""
    (photos / "03.png").unlink()
    (photos / "04.png").rename(photos / "4.png")
    (photos / "04.txt").rename(photos / "4.txt")
    (photos / "05.txt").write_text("another text")
    Image.new("RGB", (20, 20), "red").save(photos / "06.png")
    assert main([*go_on, "6"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("minidiff: warning: ")
    assert "other pictures or captions than before: 1 added (4.png), 2 gone (03.png, 04.png), 2 changed (05.png" in line
    assert line.endswith("12 then, 11 now")
    assert main([*go_on, "7"]) == 0
    assert capfd.readouterr().err == ""
    old = TensorFile(out / "state.safetensors")
    facts = json.loads(old.metadata[KEY])
    del facts["pictures"]
    write_tensors(out / "state.safetensors", old.lazy, {"format": "pt", KEY: json.dumps(facts)})
    (photos / "4.png").unlink()
    assert main([*go_on, "8"]) == 0
    assert capfd.readouterr().err == ""


def test_a_text_model_is_tuned_on_cached_latents(photos: Path, tmp_path: Path, capfd: Any) -> None:
    model = tiny_sd()
    model.save(tmp_path / "sd.safetensors")
    begin = ["train", "--data", str(photos), "--model", str(tmp_path / "sd.safetensors"), "--size", "16", *TINY]
    out = tmp_path / "run"
    assert main([*begin, "--out", str(out), "--cache-latents", "--ema", "0"]) == 0
    assert capfd.readouterr().out.strip() == str(out / "model.safetensors")
    assert (out / "latents.safetensors").is_file()
    tuned = minidiff.load(out / "model.safetensors", device="cpu")
    assert not tuned.unet.conv_in.weight.equal(model.unet.conv_in.weight)
    for part in ("vae", "text_encoder"):
        for name, w in tuned.parts[part].state_dict().items():
            assert_close(w, model.parts[part].state_dict()[name], where=name)
    assert main([*begin[:3], "--out", str(out), "--resume", "--size", "16", "--steps", "5", "--quiet"]) == 0
    assert main([*begin, "--out", str(tmp_path / "vae"), "--parts", "vae"]) == 0


def test_a_new_model_of_the_default_size(photos: Path, tmp_path: Path) -> None:
    assert (
        main(["train", "--data", str(photos), "--out", str(tmp_path / "run"), "--size", "8", *TINY, "--steps", "1"])
        == 0
    )
    model = minidiff.load(tmp_path / "run" / "model.safetensors", device="cpu")
    assert model.generate(1, steps=1, sampler="ddim", output="tensor", progress=False).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere"], "no such folder of pictures"),
        (["--data", "torchvision:Nothing"], "torchvision has no data set 'Nothing'"),
        (["--model", "a", "--config", "b"], "--model and --config are both given"),
        (["--config", "nothing.json"], "nothing.json: no such file"),
        (["--batch", "3", "--accumulate", "2"], "does not divide"),
        (["--curve", "steep"], "cosine"),
        (["--rate", "0"], "rate=0.0 must be above 0"),
        (["--fsdp"], "torchrun"),
        (["--resume"], "holds no state.safetensors"),
        (["--size", "1000"], "--size 1000"),
        (["--parts", "vae"], "vae cannot be trained: this small ddpm model has only unet"),
        (["--cache-latents"], "only a UNet on latents has any"),
        (["--held-out", "nowhere"], "no such folder of pictures"),
    ],
)
def test_mistakes_are_one_line(photos: Path, tmp_path: Path, capfd: Any, options: list[str], words: str) -> None:
    begin = ["--data", photos, "--out", tmp_path / "run", "--size", "8", "--quiet", "--device", "cpu"]
    assert words in complaint(capfd, *begin, *options)


def test_captions_missing_and_other_settings(photos: Path, tmp_path: Path, capfd: Any, tiny: str) -> None:
    (tmp_path / "sd.json").write_text(json.dumps(asdict(SD)))
    (photos / "03.txt").unlink()
    out = ["--out", tmp_path / "run"]
    said = complaint(capfd, "--data", photos, *out, "--config", tmp_path / "sd.json", *TINY)
    assert "03.png: has no caption" in said
    assert main(["train", "--data", str(photos), "--out", str(tmp_path / "run"), "--config", tiny, *TINY]) == 0
    capfd.readouterr()
    assert "batch=2, now it is 4" in complaint(capfd, "--data", photos, *out, *TINY, "--batch", "4", "--resume")


def test_help(capfd: Any) -> None:
    assert main(["train", "--help"]) == 0
    out = capfd.readouterr().out
    assert "--resume" in out
    assert "examples:" in out
    assert torch.is_grad_enabled()


def options(*argv: str) -> TrainConfig:
    return settings(parser().parse_args(["train", "--data", "shapes", "--out", "run", *argv]), {})


def test_what_is_not_given_has_the_default_that_the_help_names() -> None:
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    told = {a.dest: re.search(r"\(default: ([^);]*)", a.help or "") for a in commands.choices["train"]._actions}
    for field in fields(TrainConfig):
        if field.name in ("betas", "eps", "warmup"):  # these have no option; and see below
            continue
        value, found = getattr(options(), field.name), told[field.name]
        assert found is not None, field.name
        if isinstance(value, (int, float)):
            assert float(found[1]) == value, field.name
        else:
            assert found[1] == {("unet",): "unet", None: "no"}.get(value, value), field.name


def test_the_warm_up_is_a_tenth_at_most_500_steps() -> None:
    assert [options("--steps", str(n)).warmup for n in (9, 40, 4999, 5000, 90000)] == [0, 4, 499, 500, 500]
    assert options().warmup == 100
    assert options("--warmup", "7").warmup == 7


def test_nought_says_none() -> None:
    given = options("--clip", "0", "--ema", "0")
    assert (given.clip, given.ema) == (None, None)
    kept = options("--clip", "0.5", "--ema", "0.9", "--decay", "0")
    assert (kept.clip, kept.ema, kept.decay) == (0.5, 0.9, 0)


def test_a_new_model_has_fewer_levels_for_smaller_pictures() -> None:
    levels = {size: len(small_model(size).unet.levels) for size in (8, 15, 16, 31, 32, 256)}
    assert levels == {8: 2, 15: 2, 16: 3, 31: 3, 32: 4, 256: 4}
