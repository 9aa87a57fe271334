"""The training loop and its checkpoints: accumulation, precision, resuming with equal bits, and failures."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage import files
from minidiff.training import state
from minidiff.training.draws import Draws
from minidiff.training.ema import EMA
from minidiff.training.journal import COLUMNS
from minidiff.training.loop import Trainer
from minidiff.training.objective import kl_to_normal
from minidiff.training.ranks import Alone
from minidiff.training.run import MODEL, STATE, grid, samples, train
from minidiff.training.settings import TrainConfig
from tests.support.tiny import tiny_ddpm, tiny_sd
from tests.tolerances import assert_close


class Pictures:
    """Smooth blobs of two colours, number k the same in any batch; easy enough to learn something in a few steps."""

    def __init__(self, side: int = 8, captions: bool = False) -> None:
        self.side, self.captions = side, captions

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str] | None]:
        draws = Draws(77, start, count)
        centre = draws.uniform(), draws.uniform()
        row, column = torch.meshgrid(*[torch.linspace(0, 1, self.side)] * 2, indexing="ij")
        away = (row - centre[0][:, None, None]) ** 2 + (column - centre[1][:, None, None]) ** 2
        blob = torch.exp(-8 * away)[:, None] * torch.tensor([1.6, 0.4, -0.6])[:, None, None]
        return blob - 0.5, [f"a blob, number {k % 3}" for k in range(start, start + count)] if self.captions else None


def pixel_trainer(**options: Any) -> Trainer:
    found: dict[str, Any] = dict(steps=6, batch=4, rate=1e-3, warmup=2, ema=0.9, save_every=2)
    return Trainer(tiny_ddpm(), Pictures(), TrainConfig(**found | options))


def run(trainer: Trainer, steps: int) -> None:
    for report in trainer.steps():
        if report.step == steps:
            return


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in state.contents(trainer).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], where=name)


def test_accumulated_gradient_is_that_of_the_large_batch() -> None:
    """To float32's rounding: the sums over a batch are taken in another order."""
    gradients = []
    for accumulate in (1, 2, 4):
        trainer = pixel_trainer(accumulate=accumulate, clip=None)
        trainer.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
        trainer.optimizer.zero_grad = lambda: None  # type: ignore[method-assign,assignment]
        trainer.step()
        gradients.append(torch.cat([w.grad.flatten() for w in trainer.weights.values() if w.grad is not None]))
    assert gradients[0].norm() > 0.1
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-5 * gradients[0].norm()


class Watched(Alone):
    """One process that notes after which parts of a batch gradients would be exchanged."""

    def __init__(self) -> None:
        self.exchanged: list[bool] = []

    def quiet(self, task: nn.Module, last: bool) -> AbstractContextManager[None]:
        self.exchanged.append(last)
        return nullcontext()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_gradients_are_exchanged_after_the_last_part_of_a_batch_and_no_other(accumulate: int) -> None:
    ranks = Watched()
    trainer = Trainer(tiny_ddpm(), Pictures(), TrainConfig(batch=4, accumulate=accumulate, steps=2, warmup=0), ranks)
    list(trainer.steps())
    assert ranks.exchanged == 2 * [*[False] * (accumulate - 1), True]


def test_an_autoencoder_pays_for_latents_that_are_far_from_normal() -> None:
    """Kingma and Welling's bound: squared error plus the divergence, which is above 0."""
    losses = {}
    for kl in (0.0, 0.5):
        trainer = Trainer(tiny_sd(), Pictures(32), TrainConfig(parts=("vae",), batch=2, kl=kl))
        losses[kl] = float(trainer.loss(trainer.model, trainer.data, 0, 2, seed=0).detach())
    pixels = Pictures(32).batch(0, 2)[0]
    with torch.no_grad():
        found = trainer.pipe.parts["vae"].encode(pixels)  # type: ignore[operator]
    apart = float(kl_to_normal(found.mean, found.logvar).mean()) / pixels[0].numel()
    assert apart > 0.005
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * apart, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_loss_falls(precision: Any, fused: bool) -> None:
    """Twelve steps on pixels bring the loss on held-out examples below 0.8 of where it began (it reaches half)."""
    trainer = pixel_trainer(precision=precision, steps=12, batch=16, rate=1e-2, ema=None, fused=fused)
    before = trainer.evaluate(Pictures(), 32)
    reports = list(trainer.steps())
    assert [r.step for r in reports] == list(range(1, 13))
    assert trainer.evaluate(Pictures(), 32) < 0.8 * before
    assert all(w.dtype == torch.float32 for w in trainer.weights.values())


def test_a_text_model_learns_with_its_encoder() -> None:
    parts = ("unet", "text_encoder")
    trainer = Trainer(
        tiny_sd(), Pictures(32, captions=True), TrainConfig(parts=parts, steps=2, batch=2, ema=None, warmup=0)
    )
    before = everything(trainer)
    list(trainer.steps())
    moved = {name for name, w in everything(trainer).items() if name in before and not w.equal(before[name])}
    assert {name.split(".")[1] for name in moved} == {"unet", "text_encoder"}
    assert not any(p.requires_grad for p in trainer.pipe.parts["vae"].parameters())


def test_a_frozen_encoder_stays() -> None:
    trainer = Trainer(tiny_sd(), Pictures(32, captions=True), TrainConfig(steps=1, batch=2, warmup=0))
    before = {name: p.clone() for name, p in trainer.pipe.parts["text_encoder"].named_parameters()}
    trainer.step()
    for name, p in trainer.pipe.parts["text_encoder"].named_parameters():
        assert p.grad is None
        assert p.equal(before[name])


def test_an_autoencoder_learns_and_its_scale_is_measured(tmp_path: Path) -> None:
    config = TrainConfig(parts=("vae",), steps=8, batch=4, rate=3e-3, warmup=0, ema=None)
    trainer = Trainer(tiny_sd(), Pictures(32), config)
    losses = [r.loss for r in trainer.steps()]
    assert losses[-1] < 0.6 * losses[0]
    trainer.done = 7
    train(trainer, tmp_path, progress=False)
    model = minidiff.load(tmp_path / MODEL, device="cpu")
    assert isinstance(model, minidiff.StableDiffusion)
    assert model.config.vae is not None
    with torch.no_grad():
        latents = model.vae.encode(Pictures(32).batch(0, 4)[0]).mean * model.config.vae.scaling_factor
    assert abs(latents.std() - 1) < 1e-3


def test_fused_steps_differ_by_rounding() -> None:
    """From equal gradients, within four rounding errors of the largest weight."""
    trainers = [pixel_trainer(steps=1, rate=1e-3, warmup=0, ema=None, fused=fused) for fused in (False, True)]
    for trainer in trainers:
        trainer.step()
    plain, fused = (trainer.weights for trainer in trainers)
    assert trainers[1].optimizer.defaults["fused"] is True
    for name, w in plain.items():
        assert (w - fused[name]).abs().max() <= 4 * 2**-24 * w.abs().max(), name


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"fused": True, "channels_last": True}], ids=str)
def test_resumed_equals_unbroken(tmp_path: Path, options: Any) -> None:
    """The same weights, averages and moments, bit for bit, however often the run was stopped."""
    unbroken = pixel_trainer(**options)
    run(unbroken, 6)
    for stop in (2, 4):
        trainer = pixel_trainer(**options)
        if stop > 2:
            state.resume(trainer, tmp_path / "state")
        run(trainer, stop)
        state.save(trainer, tmp_path / "state")
        run(trainer, stop + 1)  # steps that nobody will hear of
    trainer = pixel_trainer(**options)
    state.resume(trainer, tmp_path / "state")
    assert trainer.done == 4
    run(trainer, 6)
    same(everything(trainer), everything(unbroken))


def test_a_state_from_before_a_setting_came_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that it lacks has its default; another value of it is another run."""
    trainer, path = pixel_trainer(), tmp_path / "state"
    run(trainer, 2)
    facts = state.facts(trainer)
    del facts["settings"]["fused"]
    monkeypatch.setattr(state, "facts", lambda _: facts)
    state.save(trainer, path)
    other = pixel_trainer()
    state.resume(other, path)
    same(everything(other), everything(trainer))
    with pytest.raises(CheckpointError, match="was trained with fused=False, now it is True"):
        state.resume(pixel_trainer(fused=True), path)


def test_the_scale_of_float16_is_resumed(tmp_path: Path) -> None:
    trainer = pixel_trainer(precision="float16")
    run(trainer, 2)
    trainer.scaler.update(512.0)
    state.save(trainer, tmp_path / "state")
    other = pixel_trainer(precision="float16")
    state.resume(other, tmp_path / "state")
    assert other.scaler.get_scale() == 512.0
    same(everything(other), everything(trainer))


def test_clipping_comes_after_unscaling() -> None:
    """With a scale of 2**16 on the loss, the gradient's length is told, and clipped, as without."""
    reports = [next(pixel_trainer(precision=p, batch=8).steps()) for p in ("float32", "float16")]
    assert reports[1].norm == pytest.approx(reports[0].norm, rel=0.1)


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    trainer = pixel_trainer(steps=3, sample_every=3, samples=3)
    train(trainer, tmp_path / "run", held_out=Pictures(), progress=False)
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == COLUMNS
    assert [row[0] for row in rows[1:]] == ["1", "2", "3"]
    names = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.*"))
    assert names == ["held_out.csv", "log.csv", MODEL, "samples/step-0000003.png", STATE]
    model = minidiff.load(tmp_path / "run" / MODEL, device="cpu")
    assert trainer.ema is not None
    for name, average in trainer.ema.average.items():
        assert_close(model.parts["unet"].get_parameter(name.removeprefix("unet.")), average, where=name)
        assert not average.equal(trainer.weights[name])


def test_the_average_follows_the_weights() -> None:
    trainer = pixel_trainer()
    wanted = EMA(trainer.weights, 0.9)
    for report in trainer.steps():
        wanted.update(trainer.weights, report.step)
    assert trainer.ema is not None
    same(trainer.ema.average, wanted.average)


def test_evaluation_uses_the_average() -> None:
    trainer = pixel_trainer()
    run(trainer, 3)
    assert trainer.ema is not None
    with trainer.averaged():
        trainer_without = replace_ema(trainer, None)
        wanted = trainer_without.evaluate(Pictures(), 8)
    trainer = replace_ema(trainer, trainer_without.kept)  # type: ignore[attr-defined]
    weights = everything(trainer)
    assert trainer.evaluate(Pictures(), 8) == wanted
    same(everything(trainer), weights)


def replace_ema(trainer: Trainer, ema: Any) -> Trainer:
    trainer.kept, trainer.ema = trainer.ema, ema  # type: ignore[attr-defined]
    return trainer


def test_the_log_goes_on_where_the_state_is(tmp_path: Path) -> None:
    """Stopped at step 3 of 6 with a checkpoint at 2: the line of step 3 is there once in the end."""
    trainer = pixel_trainer()
    stop_at(trainer, 3)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, tmp_path, progress=False)
    resumed = pixel_trainer()
    train(resumed, tmp_path, resume=True, progress=False)
    lines = (tmp_path / "log.csv").read_text().split()
    assert [line.split(",")[0] for line in lines[1:]] == [*"123456"]
    unbroken = pixel_trainer()
    run(unbroken, 6)
    same(everything(resumed), everything(unbroken))


def stop_at(trainer: Trainer, step: int) -> None:
    steps = trainer.steps

    def until() -> Iterator[Any]:
        for report in steps():
            yield report
            if report.step == step:
                raise KeyboardInterrupt

    trainer.steps = until  # type: ignore[method-assign]


RUN_FOREVER = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.unit.test_training_loop import pixel_trainer
from minidiff.training.run import train
train(pixel_trainer(steps=100000, curve="constant", save_every=1), sys.argv[1], progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_loses_the_steps_since_the_checkpoint_and_no_more(tmp_path: Path) -> None:
    """Killed while it saves after every step; the state that is left goes on as an unbroken run does."""
    root = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen([sys.executable, "-c", RUN_FOREVER.format(root=root), str(tmp_path / "run")])
    log = tmp_path / "run" / "log.csv"
    limit = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < limit:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = pixel_trainer(steps=100000, curve="constant", save_every=1)
        state.resume(trainer, tmp_path / "run" / STATE)
        assert trainer.done >= 2
        unbroken = pixel_trainer(steps=100000, curve="constant", save_every=1)
        run(unbroken, trainer.done + 1)
        trainer.step()
        same(everything(trainer), everything(unbroken))
    finally:
        torch.set_num_threads(threads)


class Poisoned(Pictures):
    """Fine until the examples of step 4."""

    def batch(self, start: int, count: int) -> tuple[Tensor, list[str] | None]:
        pixels, captions = super().batch(start, count)
        return pixels * (float("nan") if start >= 12 else 1), captions


def test_a_loss_that_is_nan_stops_the_run(tmp_path: Path) -> None:
    trainer = pixel_trainer()
    trainer.data = Poisoned()
    with pytest.raises(ConfigError, match=r"step 4: the loss is nan; the weights of step 3 stand"):
        train(trainer, tmp_path, progress=False)
    assert all(w.isfinite().all() for w in trainer.weights.values())
    resumed = pixel_trainer()
    state.resume(resumed, tmp_path / STATE)
    assert resumed.done == 2


def test_a_gradient_that_overflows_stops_the_run() -> None:
    trainer = pixel_trainer()
    next(iter(trainer.weights.values())).register_hook(lambda g: g * float("inf"))
    before = everything(trainer)
    with pytest.raises(ConfigError, match="step 1: the gradient is "):
        trainer.step()
    same(everything(trainer), before)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pixel_trainer()
    run(trainer, 2)
    state.save(trainer, tmp_path / STATE)
    before = (tmp_path / STATE).read_bytes()
    run(trainer, 3)
    written = 0
    view = files._bytes

    def full(*args: Any) -> memoryview:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return view(*args)

    monkeypatch.setattr(files, "_bytes", full)
    with pytest.raises(OSError, match=r"step 3 could not be saved .*; the checkpoint before it remains") as caught:
        state.save(trainer, tmp_path / STATE)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / STATE).read_bytes() == before
    assert os.listdir(tmp_path) == [STATE]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(batch=8), "batch=4, now it is 8"),
        (dict(rate=2e-3), "rate=0.001, now it is 0.002"),
        (dict(ema=None), "ema=0.9, now it is None"),
        (dict(seed=1), "seed=0, now it is 1"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    state.save(pixel_trainer(), tmp_path / STATE)
    with pytest.raises(CheckpointError, match=words):
        state.resume(pixel_trainer(**change), tmp_path / STATE)


OTHER: dict[str, Any] = dict(
    parts=("vae",),
    steps=20,
    batch=8,
    accumulate=2,
    seed=1,
    rate=2e-3,
    curve="linear",
    warmup=3,
    betas=(0.8, 0.999),
    eps=1e-7,
    decay=0.1,
    clip=None,
    precision="bfloat16",
    fused=True,
    channels_last=True,
    ema=0.99,
    min_snr=5.0,
    noisy=2.0,
    offset_noise=0.1,
    drop_prompt=0.2,
    kl=1e-5,
    save_every=7,
    sample_every=3,
    samples=4,
)


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_a_run_goes_on_with_the_settings_that_decide_what_is_learnt(tmp_path: Path, name: str) -> None:
    """Its length, how a batch is cut, and what is written when may be changed; nothing else."""
    trainer = pixel_trainer()
    state.save(trainer, tmp_path / STATE)
    trainer.config = replace(trainer.config, **{name: OTHER[name]})
    if name in ("steps", "accumulate", "save_every", "sample_every", "samples"):
        state.resume(trainer, tmp_path / STATE)
    else:
        with pytest.raises(CheckpointError, match=f"was trained with {name}=.*, now it is .*; use that, or another"):
            state.resume(trainer, tmp_path / STATE)


def test_a_longer_run_and_other_parts_of_a_batch_are_fine(tmp_path: Path) -> None:
    state.save(pixel_trainer(), tmp_path / STATE)
    state.resume(pixel_trainer(steps=20, accumulate=2, save_every=7), tmp_path / STATE)


def test_another_model_is_refused(tmp_path: Path) -> None:
    trainer = pixel_trainer()
    state.save(trainer, tmp_path / STATE)
    trainer.pipe.config = replace(trainer.pipe.config, unet=replace(trainer.pipe.config.unet, layers=2))
    with pytest.raises(CheckpointError, match=r"unet\.layers=1, now it is 2"):
        state.resume(trainer, tmp_path / STATE)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, m: m.pop(state.KEY), "holds no training run"),
        (lambda t, m: m.update({state.KEY: "{"}), "cannot be used"),
        (lambda t, m: m.update({state.KEY: '{"settings": {}, "model": {}}'}), "cannot be used"),
        (lambda t, m: t.pop("weights.unet.conv_in.bias"), "'weights.unet.conv_in.bias' is missing"),
        (lambda t, m: t.update({"weights.x": files.lazy(torch.ones(1))}), "'weights.x' does not belong to this model"),
        (lambda t, m: t.update({"ema.unet.conv_in.bias": files.lazy(torch.ones(1))}), "has shape"),
    ],
)
def test_damaged_states_are_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    trainer = pixel_trainer()
    state.save(trainer, tmp_path / STATE)
    file = files.TensorFile(tmp_path / STATE)
    tensors, metadata = dict(file.lazy), dict(file.metadata)
    spoil(tensors, metadata)
    metadata.pop(files.HASH_KEY)
    files.write_tensors(tmp_path / "bad", tensors, metadata)
    before = everything(trainer)
    with pytest.raises(CheckpointError, match=words) as caught:
        state.resume(trainer, tmp_path / "bad")
    assert "\n" not in str(caught.value)
    same(everything(trainer), before)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(pixel_trainer(steps=1, warmup=0), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        train(pixel_trainer(steps=1, warmup=0), tmp_path, progress=False)
    with pytest.raises(ConfigError, match=r"holds no state\.safetensors to resume"):
        train(pixel_trainer(), tmp_path / "other", resume=True, progress=False)


def test_what_a_model_lacks_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="vae cannot be trained: this tiny ddpm model has only unet"):
        Trainer(tiny_ddpm(), Pictures(), TrainConfig(parts=("vae",)))
    trainer = Trainer(tiny_sd(), Pictures(32), TrainConfig(batch=2))
    with pytest.raises(ConfigError, match="the pictures have no captions"):
        trainer.step()


@pytest.mark.parametrize("parts", [("unet",), ("vae",)])
def test_samples_are_pictures_of_the_run_and_always_of_the_same_noise(parts: Any) -> None:
    side = 64 if parts == ("unet",) else 32
    trainer = Trainer(tiny_sd(), Pictures(32, captions=True), TrainConfig(parts=parts, batch=2, samples=3, warmup=0))
    pictures = samples(trainer)
    assert pictures.shape == (3 if parts == ("unet",) else 6, 3, side, side)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert_close(samples(trainer), pictures)


@pytest.mark.parametrize(("drop_prompt", "scale"), [(0.0, 1.0), (0.1, 3.0)])
def test_samples_are_guided_if_prompts_were_dropped(
    drop_prompt: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(batch=2, samples=2, drop_prompt=drop_prompt)
    trainer = Trainer(tiny_sd(), Pictures(64, captions=True), config)
    monkeypatch.setattr(trainer.pipe, "generate", lambda captions, **options: (captions, options["guidance_scale"]))
    assert samples(trainer) == (["a blob, number 0", "a blob, number 1"], scale)


def test_grid() -> None:
    pictures = torch.arange(1, 6, dtype=torch.float32)[:, None, None, None].expand(5, 3, 2, 2)
    assert grid(pictures)[0, ::2, ::2].tolist() == [[1, 2], [3, 4], [5, 0]]


def test_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, step))

        def close(self) -> None:
            scalars.append(("closed", 0))

    stub = ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    monkeypatch.setattr("minidiff.training.journal.find_spec", lambda name: name == "tensorboard")
    train(pixel_trainer(steps=1, warmup=0), tmp_path, progress=False)
    assert scalars == [("loss", 1), ("rate", 1), ("norm", 1), ("closed", 0)]
