"""A whole run in a folder: the loop, with a bar on the screen, a journal, samples and checkpoints beside it.

folder/state.safetensors    where the run is: what `--resume` reads
folder/model.safetensors    the model with its averaged weights: what `minidiff generate --model` reads
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
from minidiff.pipeline.picture import save_png, to_pil, to_unit
from minidiff.storage.checkpoint import write
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
    """Train to the end of the run, writing to ``folder``; the last step's report, None if there was none to do.

    ``resume``: go on from the state in ``folder``. ``held_out``: data to measure the loss on whenever samples are made.
    ``progress``: None for a bar on a terminal or in a notebook, True for a line now and then elsewhere, too, False for
    nothing, or a function that is given each report. ``stop`` is asked after every step; if it says so, the step is
    saved and the run ends there. ``alone``: the caller holds the folder (:func:`claimed`), or else it is done here.
    Whatever else stops a run (Ctrl-C, a kill, a loss that is not finite), the last checkpoint stands.

    Raises :class:`ConfigError` if the folder holds a run that is not to be resumed, none that is, or one at work.
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
        if trainer.done >= c.steps:  # perhaps it was killed between the last state and the model of it
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
                if not last and trainer.ranks.any(stop()):  # or it was said while that was written
                    break
            if c.sample_every and (last or report.step % c.sample_every == 0):
                look(trainer, folder, held_out, journal)
    finally:
        counter.__exit__()
        if journal is not None:
            journal.close()
    return report


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it for one run. Raises :class:`ConfigError` if another run is at work in it.

    Folders that are empty in the end, because something went wrong early, are removed again.
    """
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        taken = f"{folder}: another run is at work in this folder; wait for its end, or name another one"
        with locked(folder / "run", taken):
            yield
    finally:
        with suppress(OSError):  # one is not empty, and then none around it is
            for f in new:
                f.rmdir()


def check_folder(folder: Path, resume: bool, keeper: Keeper) -> None:
    """Raise :class:`ConfigError` if ``folder`` holds a run that is not to be resumed, or none and one should be."""
    there = keeper.exists(folder)
    if resume and not there:
        raise ConfigError(f"{folder}: holds no {keeper.name} to resume; leave --resume out to begin a run")
    if there and not resume:
        raise ConfigError(f"{folder}: holds a run already; go on with --resume, or name another folder")


def export(trainer: Trainer, path: Path) -> None:
    """Write the model with its averaged weights as a minidiff file. Every process takes part, the main one writes.

    A VAE gets its ``scaling_factor`` measured on the first pictures: the UNet that will be trained on its latents
    expects unit variance.
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
                write(path, config, tensors)
            except OSError as e:
                raise unsaved(e, trainer.done, path) from e


def look(trainer: Trainer, folder: Path, held_out: Data | None, journal: Journal | None) -> None:
    """A grid of samples, and the loss on held-out data: both with the averaged weights. Only the main process has a
    ``journal``, and writes."""
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
    """Pictures (N, 3, H, W) in [0, 1]: drawn by the model, the same noise every time; of a VAE, pictures repeated."""
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
    """(N, C, H, W) -> one picture (C, rows * H, columns * W), nearly square, the last row filled up with black."""
    columns = round(len(pictures) ** 0.5)
    missing = -len(pictures) % columns
    pictures = torch.cat([pictures, pictures.new_zeros(missing, *pictures.shape[1:])])
    return rearrange(pictures, "(r c) ch h w -> ch (r h) (c w)", c=columns)
