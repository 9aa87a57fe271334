"""Training run in a folder: the loop with a progress bar, a log, samples and checkpoints.

folder/state.safetensors    state of the run, which `--resume` reads
folder/model.safetensors    the model with its averaged weights, which `minidiff generate --model` reads
folder/log.csv              loss, rate and gradient of every step
folder/samples/             a grid of pictures every so many steps
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from minidiff.console.progress import Counter, check_progress
from minidiff.errors import ConfigError
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.png import save_png, to_pil, to_unit
from minidiff.storage.checkpoint import write_checkpoint
from minidiff.storage.files import lazy
from minidiff.storage.writing import locked, sweep
from minidiff.training.batch import Batch, Data
from minidiff.training.journal import Journal
from minidiff.training.loop import Report, Trainer
from minidiff.training.state import Keeper, unsaved
from minidiff.training.task import latent_scale

MODEL = "model.safetensors"
STATE = Keeper.name
SAMPLE_STEPS = 25


def train(
    trainer: Trainer,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    held_out: Data | None = None,
    progress: bool | Callable[[Report], object] | None = None,
    keeper: Keeper | None = None,
    stop: Callable[[], bool] = lambda: False,
    alone: bool = False,
) -> Report | None:
    """Train to the end of the run, writing to ``folder``; return the report of the last step, None if there was none.

    ``resume``: continue from the state in ``folder``. ``held_out``: data on which the loss is measured whenever samples
    are made. ``progress``: None for a bar on a terminal or in a notebook, True for occasional lines elsewhere as well,
    False for nothing, or a function that is called with each report. ``stop`` is called after every step; if it returns
    True, the run is saved and ends. ``alone``: the caller holds the folder (:func:`claimed`); otherwise it is claimed
    here. If anything else ends the run (Ctrl-C, a kill, a loss that is not finite), the last checkpoint remains.

    Raises :class:`ConfigError` if the folder holds a run and ``resume`` is false, holds none and ``resume`` is true, or
    is in use by another run.
    """
    check_progress(progress)
    keeper = Keeper() if keeper is None else keeper
    folder, main = Path(folder), trainer.ranks.main
    with claimed(folder) if main and not alone else nullcontext():
        check_folder(folder, resume, keeper)
        if main:
            sweep(folder)
        trainer.ranks.wait()
        return _train(trainer, folder, resume, held_out, progress, keeper, stop)


def _train(
    trainer: Trainer,
    folder: Path,
    resume: bool,
    held_out: Data | None,
    progress: bool | Callable[[Report], object] | None,
    keeper: Keeper,
    stop: Callable[[], bool],
) -> Report | None:
    c, main = trainer.config, trainer.ranks.main
    if resume:
        keeper.resume(trainer, folder)
        if trainer.done >= c.steps:  # it may have been killed after writing the last state and before its model
            export(trainer, folder / MODEL)
    report = None
    journal = Journal(folder, trainer.done) if main else None
    told = progress if callable(progress) else None
    counter = Counter(c.steps, "step", show=False if callable(progress) or not main else progress, done=trainer.done)
    try:
        for report in trainer.steps():
            counter.count(f"loss {report.loss:.4f}, rate {report.rate:.2g}")
            if told is not None:
                told(report)
            if journal is not None:
                journal.step(report)
            last = report.step == c.steps
            if last or report.step % c.save_every == 0 or trainer.ranks.any(stop()):
                keeper.save(trainer, folder)
                export(trainer, folder / MODEL)
                if not last and trainer.ranks.any(stop()):  # or the request came while that was written
                    break
            if c.sample_every and (last or report.step % c.sample_every == 0):
                write_samples(trainer, folder, held_out, journal)
    finally:
        counter.__exit__()
        if journal is not None:
            journal.close()
    return report


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create ``folder`` and lock it for one run. Raises :class:`ConfigError` if another run is using it.

    New folders that are still empty at the end, because of an early error, are removed again.
    """
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        taken = f"{folder}: another run is using this folder; wait for its end, or name another folder"
        with locked(folder / "run", taken):
            yield
    finally:
        with suppress(OSError):  # one is not empty, and so none of its parents is
            for f in new:
                f.rmdir()


def check_folder(folder: Path, resume: bool, keeper: Keeper) -> None:
    """Raise :class:`ConfigError` if ``folder`` holds a run and ``resume`` is false, or none and it is true."""
    there = keeper.exists(folder)
    if resume and not there:
        raise ConfigError(f"{folder}: holds no {keeper.name} to resume; leave out --resume to start a run")
    if there and not resume:
        raise ConfigError(f"{folder}: already holds a run; continue it with --resume, or name another folder")


def export(trainer: Trainer, path: Path) -> None:
    """Write the model with its averaged weights as a minidiff file. Called in every process; the main one writes.

    The ``scaling_factor`` of a VAE is measured on the first pictures: a UNet expects latents of unit variance.
    """
    pipe, config = trainer.pipe, trainer.pipe.config
    with trainer.averaged():
        if trainer.config.parts == ("vae",):
            assert isinstance(pipe, StableDiffusion)
            assert config.vae is not None
            scale = latent_scale(pipe, Batch(*trainer.data.batch(0, trainer.config.batch)))
            config = replace(config, vae=replace(config.vae, scaling_factor=scale))
        states = {name: part.state_dict() for name, part in pipe.parts.items()}
        tensors = {f"{n}.{k}": lazy(trainer.ranks.whole(t)) for n, state in states.items() for k, t in state.items()}
        if trainer.ranks.main:
            try:
                write_checkpoint(path, config, tensors)
            except OSError as e:
                raise unsaved(e, trainer.done, path) from e


def write_samples(trainer: Trainer, folder: Path, held_out: Data | None, journal: Journal | None) -> None:
    """Write a grid of samples and the loss on held-out data, both with the averaged weights.

    Only the main process has a ``journal``, and writes.
    """
    with trainer.averaged():
        pictures = samples(trainer)
    loss = None if held_out is None else trainer.evaluate(held_out, trainer.config.samples)
    if journal is not None:
        (folder / "samples").mkdir(exist_ok=True)
        (image,) = to_pil(grid(pictures)[None])
        save_png(image, folder / "samples" / f"step-{trainer.done:07d}.png")
        if loss is not None:
            journal.held_out(trainer.done, loss)


@torch.no_grad()
def samples(trainer: Trainer) -> Tensor:
    """Sample pictures (N, 3, H, W) in [0, 1] from the same noise every time; of a VAE, return reconstructions."""
    c, pipe = trainer.config, trainer.pipe
    if not isinstance(pipe, StableDiffusion):
        drawn: Tensor = pipe.generate(c.samples, SAMPLE_STEPS, "ddim", seed=c.seed, output="tensor", progress=False)
        return drawn
    batch = Batch(*trainer.data.batch(0, c.samples))
    if c.parts == ("vae",):
        pixels = batch.pixels.to(pipe.device)
        return torch.cat([to_unit(pixels), to_unit(pipe.vae.decode(pipe.vae.encode(pixels).mean))])
    options: dict[str, Any] = dict(guidance_scale=3.0 if c.drop_prompt else 1.0, output="tensor", progress=False)
    captions = list(batch.captions or [""])
    pictures: Tensor = pipe.generate(captions, steps=SAMPLE_STEPS, sampler="ddim", seed=c.seed, **options)
    return pictures


def grid(pictures: Tensor) -> Tensor:
    """Arrange (N, C, H, W) as one nearly square picture (C, rows * H, columns * W); empty places are black."""
    columns = round(len(pictures) ** 0.5)
    missing = -len(pictures) % columns
    pictures = torch.cat([pictures, pictures.new_zeros(missing, *pictures.shape[1:])])
    return rearrange(pictures, "(r c) ch h w -> ch (r h) (c w)", c=columns)
