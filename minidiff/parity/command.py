"""``minidiff parity`` and ``minidiff parity record``: from options to a report or a recording.

The options are defined in cli/parity.py, which also passes in the converter, since only the command line may import it.
"""

from __future__ import annotations

import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minidiff import console
from minidiff.adapters.control import ControlModel
from minidiff.config import ControlConfig, ModelConfig
from minidiff.console import say
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.parity import controls, names, recording, start_images, theirs
from minidiff.parity.compare_command import EQUAL, existing, show, writable
from minidiff.parity.comparing import check_same_run
from minidiff.parity.engine import find
from minidiff.parity.ours import PROMPT, Asked, Ours, asked
from minidiff.parity.report import Report
from minidiff.parity.stages import NOT_CALLED, Deep, Names, first_step_only
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.pipeline.request import options
from minidiff.samplers import check_name, sampler_from_config, sampler_from_diffusers, sampler_to_config
from minidiff.storage.table import header_hash
from minidiff.version import VERSION

Pipe = StableDiffusion | Unconditional
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
LARGEST = 256  # default size in pixels: at full size the layers of one step take gigabytes
LAYERS: dict[str, Deep] = {"first": first_step_only, "all": lambda scope: True, "none": lambda scope: False}
TAKEN = ("negative_prompt", "steps", "guidance_scale", "seed")  # options that go into the request as they are


class Converter(NamedTuple):
    """Interface to weights_convert: open a checkpoint as a pipeline, list the pairs of module names of each part, write
    a checkpoint of any layout as a diffusers folder or as an original file, and open a control to work beside a
    pipeline."""

    open_model: Callable[[str, torch.device | None, torch.dtype | None], Pipe]
    module_names: Callable[[ModelConfig | ControlConfig], dict[str, dict[str, str]]]
    write_folder: Callable[[str, str], object]
    write_original: Callable[[str, str], object]
    open_control: Callable[[str, StableDiffusion], ControlModel]


def run(args: Namespace, converter: Converter, device: torch.device) -> int:
    """Run the requested one of the two commands; return the exit status."""
    return (record if args.command == "parity record" else parity)(args, converter, device)


def parity(args: Namespace, converter: Converter, device: torch.device) -> int:
    """Compare minidiff and the installed diffusers on a checkpoint; print the report, return the exit status."""
    html = writable(args.html, args)
    if not os.path.exists(args.checkpoint):
        raise CheckpointError(f"{args.checkpoint}: no such file or folder")
    theirs.import_diffusers()  # before opening a large model
    tell = teller(args.quiet)
    with tempfile.TemporaryDirectory() as beside:
        pipe = converter.open_model(args.checkpoint, device, DTYPES[args.dtype])
        request = replace(request_of(args, pipe, converter), draw_like_diffusers=True)
        folder = _folder(args.checkpoint, Path(beside) / "folder", converter, tell)
        reference = theirs.open_pipeline(folder, DTYPES[args.dtype], device)
        if request.image is not None:
            reference = theirs.taking_a_picture(reference, masked=request.mask is not None)
        if request.controls:
            written = controls.folders(args.control, Path(beside), converter.write_folder)
            reference = controls.steered(reference, request.controls, written, DTYPES[args.dtype], device)
        if args.sampler is not None:
            reference, config = theirs.change_scheduler(reference, args.sampler)
            sampler = sampler_from_diffusers(config)
            if isinstance(pipe, Unconditional) and getattr(sampler, "space", "") == "sigma":
                known = f"{type(reference).__name__} scales neither the noise nor what the model sees"
                raise UnsupportedError(f"diffusers cannot run {args.sampler}: {known}; ddpm, ddim and pndm it can")
            request = replace(request, sampler=sampler, eta=getattr(sampler, "eta", 0.0))
        tables = dict(converter.module_names(pipe.config))
        for k, control in enumerate(request.controls or ()):
            tables[f"control.{k}"] = converter.module_names(control.model.config)["control"]
        pairs = pair(Ours(pipe, request).parts, reference, tables)
        for block in controls.apart(request.controls or (), pipe.unet.config):
            del pairs["unet"][block]
        about = {"model": f"{args.checkpoint} ({pipe.config.family})", **about_run(pipe, request, args)}
        report = hold(pipe, reference, request, pairs, args, tell)
    return show(replace(report, about=about), args, html)


def hold(
    pipe: Pipe, reference: Any, request: Asked, pairs: Names, args: Namespace, tell: Callable[[str], None]
) -> Report:
    """Run both sides. If the first difference is in the UNet of a later step, run again with that step's layers."""

    tolerance = args.tolerance or 0.0

    def run(deep: Deep) -> Report:
        a = Ours(pipe, request, {part: {x: x for x in found} for part, found in pairs.items()}, deep)
        steering = controls.options(request.controls or (), reference)
        b = theirs.Theirs(reference, request, theirs.renamed(pairs), deep, steering=steering)
        a.title, b.title = f"minidiff {VERSION}", f"diffusers {theirs.import_diffusers().__version__}"
        return Report(a.title, b.title, *_spread(find(a, b, tolerance, judge=args.judge, tell=tell), tolerance))

    report = run(first_step_only)
    late = report.first and re.fullmatch(r"(step\.[1-9]\d*)/prediction", report.first.stage)
    if late:
        tell(f"first difference in the UNet of {late[1]}; running again with its layers")
        report = run(lambda scope: scope == late[1])
    return report


def _spread(found: tuple[Any, list[str], list[str]], tolerance: float) -> tuple[Any, float, list[str], list[str]]:
    rows, only_a, only_b = found
    return rows, tolerance, only_a, only_b


def pair(parts: Mapping[str, nn.Module], reference: Any, tables: Names) -> dict[str, dict[str, str]]:
    """Return the modules and blocks that both have: {part: {minidiff's name: the reference's}}."""
    found = {}
    for part, theirs_part in theirs.parts_of(reference).items():
        ours_part, table = parts[part], dict(tables[part])
        if part.startswith("text_encoder") and hasattr(theirs_part, "text_model"):  # transformers before 5.6
            table = {x: y if y == "text_projection" else f"text_model.{y}" for x, y in table.items()}
        table = {x: y for x, y in table.items() if x not in NOT_CALLED}
        known = names.present(ours_part, theirs_part, table)
        found[part] = names.with_blocks(ours_part, theirs_part, known)
    return found


def record(args: Namespace, converter: Converter, device: torch.device) -> int:
    """Record a run of minidiff; print the path of the recording."""
    out = writable(args.out, args)
    assert out is not None
    pipe = converter.open_model(args.checkpoint, device, DTYPES[args.dtype])
    request = request_of(args, pipe, converter)
    if args.sampler is not None:
        name = check_name(args.sampler, settable=False)
        request = replace(request, sampler=sampler_from_config({"name": name}))
    side = Ours(pipe, request, deep=LAYERS[args.layers])
    run, on = {"version": VERSION, **run_of(pipe, request)}, None
    if args.on is not None:
        other = recording.read_recording(args.on)
        check_same_run(run, other.run)
        run, on = {**run, "on": header_hash(args.on)[:16]}, other.tape
    stages = recording.record_to(out, side, run, on=on, hashed=args.hashes, existing=existing(args))
    if not args.quiet:
        size = out.stat().st_size / 1e6
        say(f"{stages:,} stages, {size:.1f} MB; `minidiff parity compare` compares it with another recording")
    console.show(out)
    return EQUAL


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


def request_of(args: Namespace, pipe: Pipe, converter: Converter) -> Asked:
    """Return the requested run. Raises :class:`ConfigError` for options that an unconditional model does not take."""
    found = {name: getattr(args, name) for name in TAKEN if getattr(args, name) is not None}
    found["eta"] = getattr(pipe.sampler(None), "eta", 0.0)
    if isinstance(pipe, Unconditional):
        flags = {f.name: option.flag for f, option in options(Asked)} | {"prompt": "--prompt", "size": "--size"}
        for option in ("prompt", "negative_prompt", "guidance_scale", "size", "image", "mask", "strength"):
            if getattr(args, option) is not None:
                raise ConfigError(f"{args.checkpoint}: a {pipe.config.family} model takes no {flags[option]}")
        if args.control:
            raise ConfigError(f"{args.checkpoint}: a {pipe.config.family} model takes no --control")
        return asked(None, **found)
    config = pipe.vae.config
    height, width = (min(side * config.factor, max(LARGEST, config.factor)) for side in pipe.unet.config.sides)
    height, width = args.size or (height, width)
    start = start_images.start_images(args, pipe, width, height)
    if args.control:
        found["controls"] = controls.asked(args.control, pipe, converter.open_control, width, height)
    return asked(args.prompt or PROMPT, **{**found, "width": width, "height": height, **start})


def about_run(pipe: Pipe, r: Asked, args: Namespace) -> dict[str, str]:
    """Describe the run in a few words, for the report."""
    sampler = sampler_to_config(pipe.sampler(r.sampler))["name"]
    run = f"{r.steps} steps of {sampler}, seed {r.seed}"
    if isinstance(pipe, StableDiffusion):
        run += f", {r.width} x {r.height}, guidance scale {r.guidance_scale:g}, prompt {r.prompt!r}"
        run += f", negative {r.negative_prompt!r}"
    if r.image is not None:
        run += f", from {args.image or 'a picture made for this'} at strength {r.taken_strength:g}"
        run += f", painting where {args.mask or 'a mask made for this'} is white" if r.mask is not None else ""
    if r.controls:
        run += f", under {' and '.join(f'{path}={picture}' for path, picture, _ in args.control)}"
    threads = torch.get_num_threads()
    with_threads = f" with {threads} thread{'s' if threads > 1 else ''}" if pipe.device.type == "cpu" else ""
    return {"run": run, "computed": f"in {args.dtype} on {pipe.device.type}{with_threads}, torch {torch.__version__}"}


def _folder(checkpoint: str, beside: Path, converter: Converter, tell: Callable[[str], None]) -> str:
    """Return the checkpoint as a folder that diffusers opens: itself, or a temporary one written to ``beside``."""
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


def teller(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else say
