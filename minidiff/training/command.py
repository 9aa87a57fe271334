"""``minidiff train``: from the command line's options to a run. The options are defined in cli/train.py."""

from __future__ import annotations

import dataclasses
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from minidiff.config import Level, ModelConfig, ScheduleConfig, UNetConfig, check, from_json
from minidiff.console import say
from minidiff.console.signals import Stop
from minidiff.errors import CheckpointError
from minidiff.pipeline import StableDiffusion, Unconditional, assemble, random_model
from minidiff.storage import checkpoint
from minidiff.storage.reading import read_object
from minidiff.training.batch import Data
from minidiff.training.data import FirstOf, PictureSet, ShapesStream, Shuffled, TorchvisionSet
from minidiff.training.distributed import Replicas, is_main, local_device, started_by_torchrun
from minidiff.training.image_folder import ImageFolder
from minidiff.training.latents import CachedLatents
from minidiff.training.loop import Trainer
from minidiff.training.ranks import Alone
from minidiff.training.run import MODEL, check_folder, claimed, train
from minidiff.training.settings import TrainConfig
from minidiff.training.state import Keeper

Pipe = StableDiffusion | Unconditional
SIZE = 64  # side of a new model's pictures in pixels, unless --size is given
SHAPES, TORCHVISION = "shapes", "torchvision:"
SHAPES_CACHED = 20_000  # pictures of the endless set that are used where a finite one is needed
LATENTS = "latents.safetensors"


def run(args: Namespace, open_model: Callable[[str], Pipe], device: torch.device) -> Path | None:
    """Run the training that ``args`` describe and return the path of the trained model.

    ``open_model`` opens a model by its path. Processes other than the main one are silent and return None.
    """
    device = local_device(device)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata, of each of thousands of pictures
    if not is_main():
        args.quiet = True
        warnings.simplefilter("ignore")
    folder = Path(args.out)
    ranks, keeper = machines(args, device)
    with claimed(folder) if ranks.main else nullcontext():
        check_folder(folder, args.resume, keeper)
        return _run(args, open_model, device, folder, ranks, keeper)


def _run(
    args: Namespace,
    open_model: Callable[[str], Pipe],
    device: torch.device,
    folder: Path,
    ranks: Alone,
    keeper: Keeper,
) -> Path | None:
    before = keeper.facts(folder) if args.resume else {}
    config = settings(args, before.get("settings", {}))
    pipe, base_model = starting_model(args, folder, before, config, open_model)
    pipe.to(device, torch.float32)
    size = picture_size(args, pipe)
    data = open_data(args, args.data, pipe, config, size)
    held_out = None if args.held_out is None else open_data(args, args.held_out, pipe, config, size, cache=False)
    more = dict(resume=args.resume, held_out=held_out, progress=not args.quiet, keeper=keeper, alone=True)
    try:
        trainer = Trainer(pipe, data, config, ranks)
        trainer.base_model = base_model
        with Stop(stopping if ranks.main else lambda: None) as stop:
            train(trainer, folder, stop=stop, **more)
    finally:
        ranks.leave()
    if stop.asked is not None and trainer.done < config.steps:
        raise stop.asked
    return folder / MODEL if ranks.main else None


def stopping() -> None:
    """Tell a user who asks a run to stop what happens now."""
    say("stopping when this step is done and saved; --resume goes on from it (Ctrl-C once more: at once, unsaved)")


def starting_model(
    args: Namespace, folder: Path, before: dict[str, Any], config: TrainConfig, open_model: Callable[[str], Pipe]
) -> tuple[Pipe, dict[str, str] | None]:
    """Return the model that a run starts or resumes with, and "path" and "hash" of the model it was initialized from,
    None for a new one.

    For a resumed run, trained parts will be read from its state and frozen parts from the model beside it. If the run
    was killed before that model was written, frozen parts come from the model it began with. Raises
    :class:`CheckpointError` if that is unknown or is now a different model.
    """
    if args.model is not None:
        pipe = open_model(args.model)
        return pipe, {"path": os.path.abspath(args.model), "hash": pipe.hash}
    if not args.resume or args.config is not None:
        return new_model(args, config.seed), None
    made, base_model = from_json(ModelConfig, before["model"]), before.get("begun")
    if (folder / MODEL).is_file():
        return reopen(folder / MODEL, made), base_model
    if base_model is not None:
        pipe = open_model(base_model["path"])
        if pipe.hash != base_model["hash"]:
            raise CheckpointError(f"{base_model['path']}: is not the model that this run began with; restore that one")
        return pipe, base_model
    frozen = sorted(checkpoint.build(made).keys() - set(config.parts))
    if frozen and "begun" not in before:
        raise CheckpointError(
            f"{folder / MODEL}: is missing, with the frozen {' and '.join(frozen)}; say again what the run began with, "
            "by --model or --config"
        )
    return random_model(made, config.seed), None


def machines(args: Namespace, device: torch.device) -> tuple[Alone, Keeper]:
    """Choose the processes that train and the way the run is saved: one process, replicas, or (``--fsdp``) slices."""
    if not started_by_torchrun():
        check(not args.fsdp, "--fsdp spreads a model over processes: torchrun --nproc-per-node 4 -m minidiff train ...")
        return Alone(), Keeper()
    if not args.fsdp:
        return Replicas(device), Keeper()
    from minidiff.training.sharded import ShardKeeper, Shards

    return Shards(device), ShardKeeper()


def settings(args: Namespace, before: dict[str, Any]) -> TrainConfig:
    """Return the options that are fields of :class:`TrainConfig`, by default those of ``before`` or its defaults."""
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(TrainConfig)}
    given["parts"] = None if args.parts is None else args.parts.split("+")
    found = before | {name: value for name, value in given.items() if value is not None}
    for name in ("clip", "ema"):
        if found.get(name) == 0:  # on the command line, 0 means none
            found[name] = None
    if "warmup" not in found:
        found["warmup"] = min(500, found.get("steps", TrainConfig.steps) // 10)
    return from_json(TrainConfig, found)


def reopen(path: Path, config: ModelConfig) -> Pipe:
    """Return the model of a resumed run with its frozen parts; trained parts will be read from the state."""
    found = checkpoint.open_checkpoint(path)
    try:
        return assemble(config, found.file.lazy, "cpu", torch.float32, str(path))
    finally:
        found.file.close()


def new_model(args: Namespace, seed: int) -> Pipe:
    """Return a model with random weights: that of ``--config``, or a small unconditional one that works on pixels."""
    if args.config is None:
        size = SIZE if args.size is None else args.size
        check(
            8 <= size <= 256, f"--size {size}: the small pixel model works from 8 to 256; a larger one needs --config"
        )
        return random_model(small_model(size), seed)
    if not os.path.exists(args.config):
        raise CheckpointError(f"{args.config}: no such file; --config names a model's config as JSON")
    return random_model(from_json(ModelConfig, read_object(args.config)), seed)


def small_model(size: int) -> ModelConfig:
    """Config of a DDPM of about 5 M parameters (Ho et al. 2020, appendix B, a quarter as wide) for ``size`` pixels."""
    widths = (48, 96, 144, 144)[: 2 if size < 16 else 3 if size < 32 else 4]
    levels = [Level(channels=c) for c in widths[:-1]]
    last = Level(channels=widths[-1], attention="self", heads=4)
    unet = UNetConfig(levels=(*levels, last), mid=last, in_channels=3, out_channels=3, groups=16, sample_size=size)
    schedule = ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    return ModelConfig(family="small ddpm", unet=unet, schedule=schedule, sampler={"name": "ddpm"})


def picture_size(args: Namespace, pipe: Pipe) -> int:
    """Return the side of the pictures in pixels: --size, or the model's own."""
    factor = pipe.vae.config.factor if isinstance(pipe, StableDiffusion) else 1
    height, width = pipe.unet.config.sides
    check(
        args.size is not None or height == width,
        f"the model was made for {width * factor} x {height * factor} pixels, and training crops squares: say --size",
    )
    size: int = height * factor if args.size is None else args.size
    check(size % factor == 0, f"--size {size} is not divisible by {factor}, the pixels that one latent spans")
    return size


def open_data(args: Namespace, source: str, pipe: Pipe, config: TrainConfig, size: int, cache: bool = True) -> Data:
    """Open the stream that ``source`` names: "shapes", "torchvision:NAME", or a folder."""
    captions = isinstance(pipe, StableDiffusion) and config.parts != ("vae",)
    cache = cache and args.cache_latents
    check(captions or not cache, "--cache-latents: only a UNet on latents has any; this training works on pixels")
    pictures: PictureSet
    if source == SHAPES and not os.path.exists(source):
        check(size == 64, f"the shapes are 64 x 64 pixels, and pictures of {size} x {size} are wanted")
        if not cache:
            return ShapesStream(config.seed)
        pictures = FirstOf(ShapesStream(config.seed), SHAPES_CACHED)
    elif source.startswith(TORCHVISION):
        pictures = TorchvisionSet(source.removeprefix(TORCHVISION), size, download=args.download)
    else:
        pictures = ImageFolder(source, size, captions=captions, progress=not args.quiet)
    if cache:
        assert isinstance(pipe, StableDiffusion)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        pictures = CachedLatents(pictures, pipe.vae, Path(args.out) / LATENTS if is_main() else None)
    return Shuffled(pictures, config.seed)
