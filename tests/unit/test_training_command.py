"""``minidiff train``: training from scratch, resuming, and its error messages."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli import main, parser
from minidiff.storage.files import TensorFile, write_tensors
from minidiff.training import run, state
from minidiff.training.command import settings, small_model
from minidiff.training.loop import Trainer
from minidiff.training.run import claimed
from minidiff.training.settings import TrainConfig
from minidiff.training.state import KEY
from tests.support.tiny import DDPM, SD, tiny_sd
from tests.tolerances import assert_close

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


def test_pillows_remarks_on_odd_metadata_are_not_shown(photos: Path, tmp_path: Path, tiny: str, capfd: Any) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    Image.new("RGB", (16, 16)).save(photos / "odd.jpg", exif=exif)
    data = (photos / "odd.jpg").read_bytes()
    count = data.index(b"\x01\x0f\0\x02") + 4  # the length of that text, after its tag and its type
    (photos / "odd.jpg").write_bytes(data[:count] + b"\x7f" + data[count + 1 :])
    with pytest.warns(UserWarning, match="Tag data larger than file"):
        Image.open(photos / "odd.jpg").getexif()
    capfd.readouterr()
    assert main(["train", "--data", str(photos), "--out", str(tmp_path / "run"), "--config", tiny, *TINY]) == 0
    assert capfd.readouterr().err == ""


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


def states(*folders: Path) -> list[dict[str, bytes]]:
    """The bytes that matter of each run."""
    names = ("state.safetensors", "model.safetensors", "log.csv")
    return [{name: (folder / name).read_bytes() for name in names} for folder in folders]


def test_a_folder_has_one_run_at_a_time(photos: Path, tmp_path: Path, tiny: str, capfd: Any) -> None:
    """The second is told, begins nothing and disturbs nothing; whoever was killed stands in nobody's way."""
    out = tmp_path / "new" / "run"
    begin = ["--data", str(photos), "--config", tiny, "--out", str(out), *TINY]
    with claimed(out):
        assert "another run is using this folder" in complaint(capfd, *begin)
        assert [p.name for p in out.iterdir()] == [".run.minidiff.lock"]
    assert not (tmp_path / "new").exists()  # nothing came of it
    out.mkdir(parents=True)
    (out / ".run.minidiff.lock").touch()  # of one that was killed
    assert main(["train", *begin]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["log.csv", "model.safetensors", "state.safetensors"]
    with claimed(out):
        assert "another run is using" in complaint(capfd, *begin[:2], *begin[4:], "--resume")


def test_what_fails_early_leaves_no_folder(photos: Path, tmp_path: Path, tiny: str, capfd: Any) -> None:
    options = ["--data", photos, "--config", tiny, "--quiet"]
    complaint(capfd, *options, "--out", tmp_path / "a" / "b", "--rate", "0")
    complaint(capfd, *options, "--out", tmp_path / "c", "--resume")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ddpm.json", "photos"]


@pytest.mark.parametrize("kind", ["pixels", "frozen and random", "frozen, from a file"])
def test_killed_between_the_first_state_and_the_first_model(
    photos: Path, tmp_path: Path, tiny: str, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Nothing is said again: the config is in the state, what learns too, and what is frozen is as it was."""
    (tmp_path / "sd.json").write_text(json.dumps(asdict(SD)))
    tiny_sd().save(tmp_path / "sd.safetensors")
    told = {
        "pixels": ["--config", tiny],
        "frozen and random": ["--config", str(tmp_path / "sd.json"), "--parts", "vae", "--size", "16"],
        "frozen, from a file": ["--model", "sd.safetensors", "--size", "16"],
    }[kind]
    size = told[-2:] if "--size" in told else []
    monkeypatch.chdir(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    data = ["train", "--data", str(photos), *TINY]
    assert main([*data, *told, "--out", str(whole)]) == 0

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "export", killed)
        assert main([*data, *told, "--out", str(broken)]) == 130
    assert sorted(p.name for p in broken.iterdir()) == ["log.csv", "state.safetensors"]
    monkeypatch.chdir(photos)
    assert main([*data, *size, "--out", str(broken), "--resume"]) == 0
    ours, theirs = states(broken, whole)
    assert ours == theirs
    if kind == "frozen, from a file":  # the file is another one by now
        (broken / "model.safetensors").unlink()
        tiny_sd(seed=1).save(tmp_path / "sd.safetensors")
        capfd.readouterr()
        said = complaint(capfd, *data[1:], *size, "--out", broken, "--resume", "--steps", "5")
        assert "sd.safetensors: is not the model that this run began with" in said


def test_killed_between_the_last_state_and_its_model(
    photos: Path, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is left to do, and yet the model must be that of the last one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    begin = ["train", "--data", str(photos), *TINY]
    assert main([*begin, "--config", tiny, "--out", str(whole)]) == 0

    def killed(trainer: Trainer, path: Path) -> None:
        if trainer.done == 4:
            raise KeyboardInterrupt
        real(trainer, path)

    real = run.export
    with monkeypatch.context() as patched:
        patched.setattr(run, "export", killed)
        assert main([*begin, "--config", tiny, "--out", str(broken)]) == 130
    assert states(broken) != states(whole)
    assert main([*begin, "--out", str(broken), "--resume"]) == 0
    assert states(broken) == states(whole)


def test_a_state_of_before_that_was_noted(photos: Path, tmp_path: Path, capfd: Any) -> None:
    """Then what was frozen cannot be known: asked for, and not drawn anew."""
    (tmp_path / "sd.json").write_text(json.dumps(asdict(SD)))
    out, vae = tmp_path / "run", ["--parts", "vae", "--size", "16"]
    data = ["--data", str(photos), "--out", str(out), *TINY]
    assert main(["train", *data, *vae, "--config", str(tmp_path / "sd.json")]) == 0
    (out / "model.safetensors").unlink()
    old = TensorFile(out / "state.safetensors")
    facts = json.loads(old.metadata[state.KEY])
    del facts["begun"]
    write_tensors(tmp_path / "old", old.lazy, old.metadata | {state.KEY: json.dumps(facts)})
    (tmp_path / "old").replace(out / "state.safetensors")
    capfd.readouterr()
    said = complaint(capfd, *data, *vae[2:], "--resume", "--steps", "5")
    assert "is missing, with the frozen text_encoder and unet; say again what the run began with" in said


@pytest.mark.skipif(os.name != "posix", reason="sends signals to itself")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["in a step", "while saving"])
def test_a_run_that_is_asked_to_end_saves(
    photos: Path, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, number: int, status: int, where: str
) -> None:
    """The step is finished and kept, wherever the signal finds it; going on ends at the same bytes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    begin = ["train", "--data", str(photos), *TINY, "--save-every", "3"]
    assert main([*begin, "--config", tiny, "--out", str(whole)]) == 0

    def asked(self: Trainer, *args: Any) -> Any:
        found = real(self, *args)
        if self.done == (1 if where == "in a step" else 3):
            os.kill(os.getpid(), number)
        return found

    with monkeypatch.context() as patched:
        place = (Trainer, "report") if where == "in a step" else (state, "contents")
        real = getattr(*place)
        patched.setattr(*place, asked)
        assert main([*begin, "--config", tiny, "--out", str(broken)]) == status
    done = state.Keeper().facts(broken)["done"]
    assert done == (2 if where == "in a step" else 3)
    assert sorted(p.name for p in broken.iterdir()) == ["log.csv", "model.safetensors", "state.safetensors"]
    assert main([*begin, "--out", str(broken), "--resume"]) == 0
    ours, theirs = states(broken, whole)
    assert ours == theirs


@pytest.mark.skipif(os.name != "posix", reason="sends signals to itself")
def test_a_run_that_was_just_done_is_done(
    photos: Path, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.report

    def asked(self: Trainer, *args: Any) -> Any:
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "report", asked)
    assert main(["train", "--data", str(photos), *TINY, "--config", tiny, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_a_log_is_written_to_no_other_file(photos: Path, tmp_path: Path, tiny: str, capfd: Any) -> None:
    """A link under its name is replaced, a pipe is refused at once."""
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "precious").write_text("precious")
    (out / "log.csv").symlink_to(tmp_path / "precious")
    begin = ["--data", str(photos), *TINY, "--config", tiny, "--out", str(out)]
    assert main(["train", *begin]) == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert (out / "log.csv").read_text().count("\n") == 5
    (out / "log.csv").unlink()
    os.mkfifo(out / "log.csv")
    capfd.readouterr()
    resumed = ["--data", photos, "--out", out, "--resume", "--steps", "5", "--quiet"]
    assert "log.csv: is a named pipe" in complaint(capfd, *resumed)


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
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert float(found[1]) == value, field.name
        else:
            assert found[1] == {("unet",): "unet", None: "off", False: "off"}.get(value, value), field.name


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
