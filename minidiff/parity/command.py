"""``minidiff parity``, ``minidiff parity record`` and ``minidiff parity compare``: from options to a report.

The grammar stands in cli/parity.py, which also hands in what only the command line may import: the converter.
"""

from __future__ import annotations

import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minidiff import console
from minidiff.config import ModelConfig
from minidiff.console import say
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.parity import names, pictures, recording, theirs
from minidiff.parity.engine import find
from minidiff.parity.ours import PROMPT, Asked, Ours, asked
from minidiff.parity.page import page
from minidiff.parity.report import Report, text
from minidiff.parity.stages import NOT_CALLED, Deep, Names, first_step_only
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.pipeline.request import options
from minidiff.samplers import check_name, sampler_from_config, sampler_from_diffusers, sampler_to_config
from minidiff.storage.writing import Existing, atomic, check_place
from minidiff.version import VERSION

Pipe = StableDiffusion | Unconditional
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
LARGEST = 256  # pixels by default: at full size a step's layers alone take gigabytes
LAYERS: dict[str, Deep] = {"first": first_step_only, "all": lambda scope: True, "none": lambda scope: False}
TAKEN = ("negative_prompt", "steps", "guidance_scale", "seed")  # options that go into the request as they are
EQUAL, PARTED = 0, 1  # exit statuses


class Converter(NamedTuple):
    """Interface to weights_convert for the finder: a checkpoint as a pipeline; the pairs of module names, part by part;
    and a checkpoint of any layout written as a folder of diffusers'."""

    open_model: Callable[[str, torch.device | None, torch.dtype | None], Pipe]
    module_names: Callable[[ModelConfig], dict[str, dict[str, str]]]
    write_folder: Callable[[str, str], object]


def run(args: Namespace, converter: Converter, device: torch.device | None) -> int:
    """Whichever of the three was asked for; the exit status."""
    if args.command == "parity compare":
        return compare(args)
    assert device is not None
    return (record if args.command == "parity record" else parity)(args, converter, device)


def parity(args: Namespace, converter: Converter, device: torch.device) -> int:
    """A checkpoint in minidiff and in the installed diffusers; prints the report, gives the exit status."""
    destination = _writable(args.html, args)
    if not os.path.exists(args.checkpoint):
        raise CheckpointError(f"{args.checkpoint}: no such file or folder")
    theirs.import_diffusers()  # before a large model is opened in vain
    tell = _teller(args.quiet)
    with tempfile.TemporaryDirectory() as beside:
        pipe = converter.open_model(args.checkpoint, device, DTYPES[args.dtype])
        request = replace(_request(args, pipe), draw_like_diffusers=True)
        folder = _folder(args.checkpoint, Path(beside) / "folder", converter, tell)
        reference = theirs.open_pipeline(folder, DTYPES[args.dtype], device)
        if request.image is not None:
            reference = theirs.taking_a_picture(reference, masked=request.mask is not None)
        if args.sampler is not None:
            reference, config = theirs.change_scheduler(reference, args.sampler)
            sampler = sampler_from_diffusers(config)
            if isinstance(pipe, Unconditional) and getattr(sampler, "space", "") == "sigma":
                known = f"{type(reference).__name__} scales neither the noise nor what the model sees"
                raise UnsupportedError(f"diffusers cannot run {args.sampler}: {known}; ddpm, ddim and pndm it can")
            request = replace(request, sampler=sampler, eta=getattr(sampler, "eta", 0.0))
        pairs = pair(pipe, reference, converter.module_names(pipe.config))
        about = {"model": f"{args.checkpoint} ({pipe.config.family})", **_about(pipe, request, args)}
        report = hold(pipe, reference, request, pairs, args, tell)
    return show(replace(report, about=about), args, destination)


def hold(
    pipe: Pipe, reference: Any, request: Asked, pairs: Names, args: Namespace, tell: Callable[[str], None]
) -> Report:
    """Both sides run. If they part in the UNet of a later step, again with that step's layers."""

    def run(deep: Deep) -> Report:
        a = Ours(pipe, request, {part: {x: x for x in found} for part, found in pairs.items()}, deep)
        b = theirs.Theirs(reference, request, theirs.renamed(pairs), deep)
        a.title, b.title = f"minidiff {VERSION}", f"diffusers {theirs.import_diffusers().__version__}"
        return Report(
            a.title, b.title, *_spread(find(a, b, args.tolerance, judge=args.judge, tell=tell), args.tolerance)
        )

    report = run(first_step_only)
    late = report.first and re.fullmatch(r"(step\.[1-9]\d*)/prediction", report.first.stage)
    if late:
        tell(f"they part in the UNet of {late[1]}; once more, with its layers")
        report = run(lambda scope: scope == late[1])
    return report


def _spread(found: tuple[Any, list[str], list[str]], tolerance: float) -> tuple[Any, float, list[str], list[str]]:
    rows, only_a, only_b = found
    return rows, tolerance, only_a, only_b


def pair(pipe: Pipe, reference: Any, tables: Names) -> dict[str, dict[str, str]]:
    """Modules and blocks that both have: {part: {minidiff's name: the reference's}}."""
    found = {}
    for part, theirs_part in theirs.parts_of(reference).items():
        ours_part, table = pipe.parts[part], dict(tables[part])
        if part.startswith("text_encoder") and hasattr(theirs_part, "text_model"):  # transformers before 5.6
            table = {x: y if y == "text_projection" else f"text_model.{y}" for x, y in table.items()}
        table = {x: y for x, y in table.items() if x not in NOT_CALLED}
        known = names.present(ours_part, theirs_part, table)
        found[part] = names.with_blocks(ours_part, theirs_part, known)
    return found


def record(args: Namespace, converter: Converter, device: torch.device) -> int:
    """A run of minidiff as a recording; prints its path."""
    out = _writable(args.out, args)
    assert out is not None
    pipe = converter.open_model(args.checkpoint, device, DTYPES[args.dtype])
    request = _request(args, pipe)
    if args.sampler is not None:
        name = check_name(args.sampler, settable=False)
        request = replace(request, sampler=sampler_from_config({"name": name}))
    side = Ours(pipe, request, deep=LAYERS[args.layers], title=f"minidiff {VERSION}")
    found = recording.record(side, run_of(pipe, request))
    recording.write(out, found, _existing(args))
    if not args.quiet:
        size = out.stat().st_size / 1e6
        say(f"{len(found.tape):,} stages, {size:.1f} MB; `minidiff parity compare` holds another recording against it")
    console.show(out)
    return EQUAL


def compare(args: Namespace) -> int:
    """Two recordings; prints the report, gives the exit status."""
    destination = _writable(args.html, args)
    a, b = recording.read(args.a), recording.read(args.b)
    judge = None if args.judge is None else recording.read(args.judge)
    report = recording.compare(a, b, args.tolerance, judge)
    about = {"A's file": str(args.a), "B's file": str(args.b), **report.about}
    return show(replace(report, about=about), args, destination)


def show(report: Report, args: Namespace, destination: Path | None) -> int:
    """Print the report, and write it as a page if asked; the exit status."""
    console.show(text(report, every=args.all), longest=console.LONGEST_LINE)
    if destination is not None:
        with atomic(destination, _existing(args)) as file:
            file.write(page(report).encode())
        if not args.quiet:
            say(f"the report as a page: {destination}")
    return EQUAL if report.equal else PARTED


def run_of(pipe: Pipe, request: Asked) -> dict[str, Any]:
    """Return a description of the run, for a recording's header."""
    r = request
    sampler = sampler_to_config(pipe.sampler(r.sampler))
    text_only = {
        "prompt": r.prompt,
        "negative": r.negative_prompt,
        "scale": r.guidance_scale,
        "width": r.width,
        "height": r.height,
    }
    return {
        "family": pipe.config.family,
        "model": recording.architecture(pipe.config),
        **(text_only if isinstance(pipe, StableDiffusion) else {}),
        **({"strength": r.taken_strength} if r.image is not None else {}),
        "steps": r.steps,
        "seed": r.seed,
        "sampler": sampler["name"],
        "sampler_options": sampler,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def _request(args: Namespace, pipe: Pipe) -> Asked:
    """The run that was asked for. Raises :class:`ConfigError` for what a model without text cannot take."""
    found = {name: getattr(args, name) for name in TAKEN if getattr(args, name) is not None}
    found["eta"] = getattr(pipe.sampler(None), "eta", 0.0)
    if isinstance(pipe, Unconditional):
        flags = {f.name: option.flag for f, option in options(Asked)} | {"prompt": "--prompt", "size": "--size"}
        for option in ("prompt", "negative_prompt", "guidance_scale", "size", "image", "mask", "strength"):
            if getattr(args, option) is not None:
                raise ConfigError(f"{args.checkpoint}: a {pipe.config.family} model takes no {flags[option]}")
        return asked(None, **found)
    config = pipe.vae.config
    height, width = (min(side * config.factor, max(LARGEST, config.factor)) for side in pipe.unet.config.sides)
    height, width = args.size or (height, width)
    begun = pictures.starting_from(args, pipe, width, height)
    return asked(args.prompt or PROMPT, **{**found, "width": width, "height": height, **begun})


def _about(pipe: Pipe, r: Asked, args: Namespace) -> dict[str, str]:
    """The run in a few words, for the report."""
    sampler = sampler_to_config(pipe.sampler(r.sampler))["name"]
    run = f"{r.steps} steps of {sampler}, seed {r.seed}"
    if isinstance(pipe, StableDiffusion):
        run += f", {r.width} x {r.height}, guidance scale {r.guidance_scale:g}, prompt {r.prompt!r}"
        run += f", negative {r.negative_prompt!r}"
    if r.image is not None:
        run += f", from {args.image or 'a picture made for this'} at strength {r.taken_strength:g}"
        run += f", painting where {args.mask or 'a mask made for this'} is white" if r.mask is not None else ""
    threads = torch.get_num_threads()
    with_threads = f" with {threads} thread{'s' if threads > 1 else ''}" if pipe.device.type == "cpu" else ""
    return {"run": run, "computed": f"in {args.dtype} on {pipe.device.type}{with_threads}, torch {torch.__version__}"}


def _folder(checkpoint: str, beside: Path, converter: Converter, tell: Callable[[str], None]) -> str:
    """The checkpoint as a folder that diffusers opens: itself, or written to ``beside`` for the time being."""
    if os.path.isdir(checkpoint):
        return checkpoint
    tell(f"writing {checkpoint} as a folder for diffusers")
    try:
        converter.write_folder(checkpoint, str(beside))
    except UnsupportedError as e:
        raise UnsupportedError(
            f"{checkpoint}: diffusers opens folders, and this file cannot be written as one ({e}); give the folder, or "
            "compare recordings (`minidiff parity record --help`)"
        ) from None
    return str(beside)


def _existing(args: Namespace) -> Existing:
    return "replace" if args.force else "refuse"


def _writable(path: str | None, args: Namespace) -> Path | None:
    """``path``, checked before the work begins. Raises for a file that is there, or a folder that is not."""
    if path is not None:
        check_place(path, _existing(args))
    return None if path is None else Path(path)


def _teller(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else say
