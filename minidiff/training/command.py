"""``minidiff train``: from the command line's options to a run. The grammar stands in arguments.py."""

from __future__ import annotations

import dataclasses
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minidiff import checkpoint
from minidiff.config import Level, ModelConfig, ScheduleConfig, UNetConfig, check, from_json
from minidiff.errors import CheckpointError
from minidiff.pipeline import StableDiffusion, Unconditional, assemble, random_model
from minidiff.training.batch import Data
from minidiff.training.data import FirstOf, PictureSet, ShapesStream, Shuffled, TorchvisionSet
from minidiff.training.distributed import Replicas, is_main, local_device, started_by_torchrun
from minidiff.training.images import ImageFolder
from minidiff.training.latents import CachedLatents
from minidiff.training.loop import Trainer
from minidiff.training.ranks import Alone
from minidiff.training.run import MODEL, check_folder, train
from minidiff.training.settings import TrainConfig
from minidiff.training.state import Keeper

Pipe = StableDiffusion | Unconditional
SIZE = 64  # pixels of a new model's pictures, unless --size says otherwise
SHAPES, TORCHVISION = "shapes", "torchvision:"
SHAPES_CACHED = 20_000  # how many of the endless set are taken where a finite one is needed
LATENTS = "latents.safetensors"


def run(args: Namespace, open_model: Callable[[str], Pipe], device: torch.device) -> Path | None:
    """Do what ``args`` ask for, with the model that ``open_model`` makes of a path; the path of what was trained.

    One of several processes that is not the main one is silent, and has no path to tell.
    """
    device = local_device(device)
    if not is_main():
        args.quiet = True
        warnings.simplefilter("ignore")
    folder = Path(args.out)
    ranks, keeper = machines(args, device)
    check_folder(folder, args.resume, keeper)
    before = keeper.facts(folder) if args.resume else {}
    config = settings(args, before.get("settings", {}))
    if args.model is not None:
        pipe = open_model(args.model)
    elif args.resume and args.config is None and (folder / MODEL).is_file():
        pipe = reopen(folder / MODEL, from_json(ModelConfig, before["model"]))
    else:
        pipe = new_model(args, config.seed)
    pipe.to(device, torch.float32)
    size = picture_size(args, pipe)
    data = open_data(args, args.data, pipe, config, size)
    held_out = None if args.held_out is None else open_data(args, args.held_out, pipe, config, size, cache=False)
    try:
        trainer = Trainer(pipe, data, config, ranks)
        train(trainer, folder, resume=args.resume, held_out=held_out, progress=not args.quiet, keeper=keeper)
    finally:
        ranks.leave()
    return folder / MODEL if ranks.main else None


def machines(args: Namespace, device: torch.device) -> tuple[Alone, Keeper]:
    """Who trains, and how it is kept: this process alone, replicas, or (``--fsdp``) slices."""
    if not started_by_torchrun():
        check(not args.fsdp, "--fsdp spreads a model over processes: torchrun --nproc-per-node 4 -m minidiff train ...")
        return Alone(), Keeper()
    if not args.fsdp:
        return Replicas(device), Keeper()
    from minidiff.training.sharded import ShardKeeper, Shards

    return Shards(device), ShardKeeper()


def settings(args: Namespace, before: dict[str, Any]) -> TrainConfig:
    """The options that are fields of :class:`TrainConfig`; one that was not given is as ``before``, or the default."""
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(TrainConfig)}
    given["parts"] = None if args.parts is None else args.parts.split("+")
    found = before | {name: value for name, value in given.items() if value is not None}
    for name in ("clip", "ema"):
        if found.get(name) == 0:  # on a command line, 0 says none
            found[name] = None
    if "warmup" not in found:
        found["warmup"] = min(500, found.get("steps", TrainConfig.steps) // 10)
    return from_json(TrainConfig, found)


def reopen(path: Path, config: ModelConfig) -> Pipe:
    """The model of a run that goes on: what is frozen is there as it was, what learns will be read from the state."""
    found = checkpoint.read(path)
    try:
        return assemble(config, found.file.lazy, "cpu", torch.float32, str(path))
    finally:
        found.file.close()


def new_model(args: Namespace, seed: int) -> Pipe:
    """A model with random weights: that of ``--config``, or a small one that works on pixels and knows no text."""
    if args.config is None:
        size = SIZE if args.size is None else args.size
        check(
            8 <= size <= 256, f"--size {size}: the small pixel model works from 8 to 256; a larger one needs --config"
        )
        return random_model(small_model(size), seed)
    path = Path(args.config)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; --config names a model's config as JSON")
    return random_model(from_json(ModelConfig, path.read_text(encoding="utf-8")), seed)


def small_model(size: int) -> ModelConfig:
    """A DDPM of about 5 M parameters (Ho et al. 2020, appendix B, at a quarter of the width) for ``size`` pixels."""
    widths = (48, 96, 144, 144)[: 2 if size < 16 else 3 if size < 32 else 4]
    levels = [Level(channels=c) for c in widths[:-1]]
    last = Level(channels=widths[-1], attention="self", heads=4)
    unet = UNetConfig(levels=(*levels, last), mid=last, in_channels=3, out_channels=3, groups=16, sample_size=size)
    schedule = ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    return ModelConfig(family="small ddpm", unet=unet, schedule=schedule, sampler={"name": "ddpm"})


def picture_size(args: Namespace, pipe: Pipe) -> int:
    """The side of the pictures in pixels: what was asked for, or what the model was made for."""
    factor = pipe.vae.config.factor if isinstance(pipe, StableDiffusion) else 1
    size: int = pipe.unet.config.sample_size * factor if args.size is None else args.size
    check(size % factor == 0, f"--size {size} is not divisible by {factor}, the pixels that one latent spans")
    return size


def open_data(args: Namespace, source: str, pipe: Pipe, config: TrainConfig, size: int, cache: bool = True) -> Data:
    """The stream that ``source`` names: "shapes", "torchvision:NAME", or a folder."""
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
