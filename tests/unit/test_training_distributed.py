"""Distributed training: two processes on gloo, started by torchrun, give the same examples and weights as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.config import ModelConfig
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.pipeline import random_model
from minidiff.storage.files import TensorFile
from minidiff.training.distributed import Replicas
from minidiff.training.settings import TrainConfig
from minidiff.training.sharded import ShardKeeper, Shards
from minidiff.training.task import make_task
from tests.support.tiny import DDPM, SD, tiny_ddpm
from tests.tolerances import BATCH, assert_close

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
OPTIONS = ["--steps", "3", "--batch", "4", "--rate", "1e-3", "--curve", "constant", "--warmup", "0", "--seed", "3"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight pictures and a tiny config."""
    from PIL import Image

    path = tmp_path_factory.mktemp("distributed")
    (path / "photos").mkdir()
    for i in range(8):
        image = Image.new("RGB", (16, 16), (30 * i, 128, 255 - 30 * i))
        image.paste("white", (i, i, i + 6, i + 6))
        image.save(path / "photos" / f"{i}.png")
    (path / "photos" / "broken.png").touch()
    (path / "tiny.json").write_text(json.dumps(asdict(DDPM)))
    return path


def launch(workplace: Path, ranks: int, out: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Train with so many processes, one thread each."""
    start = (
        [*LAUNCH, str(ranks), "-m", "minidiff"]
        if ranks > 1 or "--fsdp" in options
        else [sys.executable, "-m", "minidiff"]
    )
    command = [
        *start,
        "train",
        "--data",
        "photos",
        "--config",
        "tiny.json",
        "--out",
        out,
        *OPTIONS,
        *options,
        "--device",
        "cpu",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def tensors(workplace: Path, out: str) -> dict[str, Tensor]:
    file = TensorFile(workplace / out / "state.safetensors")
    return {name: entry.load() for name, entry in file.lazy.items()}


def single(workplace: Path) -> dict[str, Tensor]:
    """The result of one process on the whole batch."""
    if not (workplace / "joined").exists():
        launch(workplace, 1, "joined")
    return tensors(workplace, "joined")


def test_two_processes_are_one(workplace: Path) -> None:
    """Equal bits to one process that takes the batch in the same two halves; with the batch in one piece, equal up to
    the order of summation, in the weights: the moments of the optimiser are far smaller than the tolerance."""
    two = launch(workplace, 2, "two")
    launch(workplace, 1, "halves", "--accumulate", "2")
    assert two.stdout.split() == ["two/model.safetensors"]
    assert two.stderr.count("1 of 9 pictures cannot be read") == 1
    assert two.stderr.count("warning:") == 1
    assert (workplace / "two" / "log.csv").read_text().count("\n") == 4
    ours, halves, joined = tensors(workplace, "two"), tensors(workplace, "halves"), single(workplace)
    assert ours.keys() == halves.keys() == joined.keys()
    for name, tensor in ours.items():
        assert_close(tensor, halves[name], where=name)
        if name.startswith("weights."):
            assert_close(tensor, joined[name], BATCH, where=name)


def test_parts_of_a_batch_and_resuming_with_another_number_of_processes(workplace: Path) -> None:
    """Each process takes its share of every part, and exchanges after the last; one goes on where two stopped."""
    launch(workplace, 2, "parts", "--accumulate", "2", "--steps", "2")
    launch(workplace, 1, "parts", "--resume", "--accumulate", "4")
    parts = tensors(workplace, "parts")
    for name, tensor in single(workplace).items():
        if name.startswith("weights."):
            assert_close(parts[name], tensor, BATCH, where=name)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 slices a model on GPUs only")
def test_slices_are_one_model(workplace: Path) -> None:
    """FSDP with two processes, then with one that reads what two wrote, against one process without."""
    launch(
        workplace, 2, "slices", "--fsdp", "--steps", "2", "--accumulate", "2", "--sample-every", "2", "--samples", "1"
    )
    assert sorted(p.name for p in (workplace / "slices" / "state").iterdir() if p.suffix == ".distcp") == [
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    launch(workplace, 1, "slices", "--fsdp", "--resume", "--sample-every", "0")
    ours = TensorFile(workplace / "slices" / "model.safetensors").lazy
    joined = single(workplace)
    assert len(ours) > 100
    for name, entry in ours.items():
        assert_close(entry.load(), joined[f"ema.{name}"], BATCH, where=name)


def test_slices_have_the_plain_layout(workplace: Path) -> None:
    with pytest.raises(AssertionError, match=r"leave out --channels-last"):
        launch(workplace, 1, "refused", "--fsdp", "--channels-last")


@pytest.mark.parametrize(("arguments", "status"), [(["plan", "--steps", "2"], 0), (["nonsense"], 2)])
def test_the_command_ends_without_taking_the_interpreter_apart(arguments: list[str], status: int) -> None:
    """Threads of torch's may still be at work then, and one that needs the interpreter aborts the process."""
    script = "import atexit, sys; atexit.register(print, 'apart'); from minidiff.cli import command; command()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "apart" not in done.stdout
    assert bool(done.stdout) == (status == 0)


@pytest.mark.parametrize("left", [".state.new", ".state.old"])
def test_slices_that_a_kill_left_half_way(tmp_path: Path, left: str) -> None:
    """Between the two renames there is no "state": the new one is taken if it is whole, else the old one."""
    keeper = ShardKeeper()
    assert not keeper.exists(tmp_path)
    for name in (".state.new", ".state.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    for name in {".state.old", left}:
        (tmp_path / name / ".metadata").touch()
    assert keeper.exists(tmp_path)
    assert (tmp_path / "state" / "who").read_text() == left


def test_slices_that_are_in_place_stay_there(tmp_path: Path) -> None:
    """Whatever stands beside them; and without the file that is written last they are no run."""
    for name in ("state", ".state.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    (tmp_path / ".state.new" / ".metadata").touch()
    assert not ShardKeeper().exists(tmp_path)
    (tmp_path / "state" / ".metadata").touch()
    assert ShardKeeper().exists(tmp_path)
    assert (tmp_path / "state" / "who").read_text() == "state"
    assert (tmp_path / ".state.new").is_dir()


def test_only_the_main_process_puts_slices_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.training.sharded.is_main", lambda: False)
    (tmp_path / ".state.new").mkdir()
    (tmp_path / ".state.new" / ".metadata").touch()
    assert not ShardKeeper().exists(tmp_path)
    assert (tmp_path / ".state.new").is_dir()


def test_slices_of_another_run(tmp_path: Path) -> None:
    """A tensor that is missing, one too many, and a description that is gone: one line each."""
    from tests.unit.test_training_loop import pixel_trainer, run

    keeper, trainer = ShardKeeper(), pixel_trainer()
    run(trainer, 1)
    keeper.save(trainer, tmp_path)
    assert keeper.facts(tmp_path)["done"] == 1
    other = pixel_trainer()
    name = next(iter(other.weights))
    weight = other.weights.pop(name)
    with pytest.raises(CheckpointError, match=rf"state: tensor '.*{name}.*' is missing or does not belong"):
        keeper.resume(other, tmp_path)
    other.weights |= {name: weight, "extra": torch.nn.Parameter(torch.zeros(1))}
    with pytest.raises(CheckpointError, match=r"state: tensor '.*extra.*' is missing or does not belong"):
        keeper.resume(other, tmp_path)
    (tmp_path / "state" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json: no such file"):
        keeper.resume(pixel_trainer(), tmp_path)


@pytest.mark.parametrize(
    ("own", "others", "wanted"), [(False, 0, False), (True, 0, True), (False, 1, True), (True, 3, True)]
)
def test_what_one_process_says_holds_for_all(
    own: bool, others: float, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(others))
    assert Replicas.any(Replicas.__new__(Replicas), own) is wanted


@pytest.mark.parametrize(
    ("config", "parts", "wanted"),
    [
        (SD, ("unet",), False),
        (SD, ("unet", "text_encoder"), False),
        (replace(SD, text_layer="penultimate"), ("unet",), False),
        (replace(SD, text_layer="penultimate"), ("unet", "text_encoder"), True),
    ],
)
def test_weights_that_no_loss_reaches_are_not_waited_for(
    config: ModelConfig, parts: Any, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer of a text encoder whose last but one is read."""
    told: list[bool] = []
    monkeypatch.setattr(
        torch.nn.parallel,
        "DistributedDataParallel",
        lambda _, find_unused_parameters: told.append(find_unused_parameters),
    )
    Replicas.wrap(Replicas.__new__(Replicas), make_task(random_model(config), TrainConfig(parts=parts)))
    assert told == [wanted]


def test_a_torch_that_slices_on_cards_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(UnsupportedError, match="can slice a model on GPUs only"):
        Shards.wrap(Shards.__new__(Shards), make_task(tiny_ddpm(), TrainConfig()))


def test_parts_are_quiet_until_the_last() -> None:
    """What DistributedDataParallel is told: to exchange gradients after the last part, and not before."""

    class Told(torch.nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            self.require_backward_grad_sync = True

    told, seen = Told(), []
    for last in (False, False, True):
        with Replicas.quiet(Replicas.__new__(Replicas), told, last):
            seen.append(told.require_backward_grad_sync)
    assert seen == [False, False, True]


def test_what_a_kill_left_of_the_state_before_is_not_in_the_way(tmp_path: Path) -> None:
    """Killed after both renames, before the old slices are deleted: the next save is as any other."""
    from tests.unit.test_training_loop import everything, pixel_trainer, run, same

    keeper, trainer = ShardKeeper(), pixel_trainer()
    run(trainer, 1)
    keeper.save(trainer, tmp_path)
    (tmp_path / ".state.old").mkdir()
    (tmp_path / ".state.old" / "slice").touch()
    run(trainer, 2)
    keeper.save(trainer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state"]
    other = pixel_trainer()
    keeper.resume(other, tmp_path)
    assert other.done == 2
    same(everything(other), everything(trainer))
