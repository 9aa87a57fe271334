"""Goldens: recordings of diffusers on tiny models, with the models, for the tests of any project.

``minidiff parity goldens DIR`` writes a folder for each family:

    sd1/diffusers/              the model as diffusers writes it
    sd1/original.safetensors    the same weights as a single file in the original layout (not for ddpm)
    sd1/recording.safetensors   a run of the installed diffusers, every layer of the first step and every step after

tests/fixtures/goldens holds those of the pinned diffusers, and a README that says how to use them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minidiff import console
from minidiff.console import say
from minidiff.parity import recording, start_images, theirs, twins
from minidiff.parity.kernels import machine
from minidiff.parity.ours import Asked, Ours, asked
from minidiff.pipeline.stable_diffusion import StableDiffusion
from minidiff.storage.writing import atomic_folder

if TYPE_CHECKING:
    from minidiff.parity.command import Converter

FOLDER, ORIGINAL, RECORDING = "diffusers", "original.safetensors", "recording.safetensors"
PROMPT, NEGATIVE = "a red fox", "blurry"
THREADS = 1  # the bits of a sum depend on how many share it
STEPS, SEED, WIDTH, HEIGHT = 3, 5, 16, 8


def run(args: Namespace, converter: Converter) -> int:
    """Write the goldens; print the folder."""
    theirs.import_diffusers()  # before anything is written
    torch.set_num_threads(THREADS)
    with atomic_folder(args.folder) as folder:
        write_goldens(folder, converter, args.family or twins.FAMILIES, (lambda text: None) if args.quiet else say)
    console.show(args.folder)
    return 0


def write_goldens(
    folder: Path, converter: Converter, families: Sequence[str] = twins.FAMILIES, tell: Callable[[str], None] = say
) -> None:
    """Write the goldens of ``families`` into an empty folder. Raises :class:`UnsupportedError` without diffusers."""
    for family in families:
        inner = folder / family
        inner.mkdir()
        twins.twin(family).save_pretrained(inner / FOLDER)
        if family != "ddpm":
            converter.write_original(str(inner / FOLDER), str(inner / ORIGINAL))
        found = recorded(inner / FOLDER, converter)
        recording.write_recording(inner / RECORDING, found)
        size = sum(file.stat().st_size for file in inner.rglob("*") if file.is_file()) / 1e6
        tell(f"{family}: {len(found.tape)} stages, {size:.1f} MB with the model")


def request_for(pipe: Any) -> Asked:
    """Return the run of a golden, for minidiff's model of it."""
    if not isinstance(pipe, StableDiffusion):
        return asked(None, steps=STEPS, seed=SEED, draw_like_diffusers=True)
    start: dict[str, Any] = {}
    if pipe.reads_mask:
        start = {"image": start_images.image(None, WIDTH, HEIGHT), "mask": start_images.mask(None, WIDTH, HEIGHT)}
    given = {"steps": STEPS, "seed": SEED, "width": WIDTH, "height": HEIGHT, "draw_like_diffusers": True}
    return asked(PROMPT, negative_prompt=NEGATIVE, **given, **start)


def recorded(folder: Path, converter: Converter) -> recording.Recording:
    """Run diffusers on the model in ``folder``, and record it."""
    from minidiff.parity.command import pair, run_of

    ours = converter.open_model(str(folder), torch.device("cpu"), torch.float32)
    request = request_for(ours)
    pipe = theirs.open_pipeline(folder, torch.float32, "cpu")
    pairs = pair(Ours(ours, request).parts, pipe, converter.module_names(ours.config))
    diffusers = theirs.import_diffusers()
    side = theirs.Theirs(pipe, request, theirs.renamed(pairs))
    run = {"version": diffusers.__version__, **run_of(ours, request), **machine()}
    return with_noise(recording.record(side, run), recording.record(Ours(ours, request, deep=lambda scope: False), run))


def with_noise(found: recording.Recording, own: recording.Recording) -> recording.Recording:
    """Add the noise of each step, which diffusers draws inside its schedulers, from minidiff's run of the same.

    It is added before the sample that it went into, where both programs computed the same one.
    """
    tape: dict[str, torch.Tensor] = {}
    for stage, value in found.tape.items():
        noise = f"{stage.removesuffix('/x')}/noise"
        if stage.endswith("/x") and noise in own.tape and torch.equal(own.tape[stage], value):
            tape[noise] = own.tape[noise]
        tape[stage] = value
    return recording.Recording(tape, found.run)
