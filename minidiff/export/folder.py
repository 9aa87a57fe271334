"""Writing of an export: programs, tokenizer tables, schedule and plans, complete under its name or not at all.

    manifest.json  unet.onnx  unet.onnx.data  vae_encoder.onnx ...  text_encoder.onnx ...
    tokenizer/vocab.json  tokenizer/merges.txt ...   tokenizer_2/ ...   the tables, in the layout of transformers
    schedule.json                                    alpha_bar at every timestep, and what it was made from
    plans/pndm-50.json                               as `minidiff plan --json` prints it

Every program is read back and run at several sizes before the folder gets its name; an export that is further from the
model than its bound is an error, and leaves nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minidiff.config import check, to_json
from minidiff.console import warn
from minidiff.errors import UnsupportedError
from minidiff.export import formats
from minidiff.export.formats import BOUNDS
from minidiff.export.manifest import FORMAT, NAME, Export, digests, ends, write_json
from minidiff.export.programs import Program, programs
from minidiff.models.tokenizer_out import tokenizer_files
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.samplers import sampler_from_config, sampler_to_config
from minidiff.samplers.linear import table
from minidiff.schedule import NoiseSchedule
from minidiff.storage.writing import atomic_folder
from minidiff.version import VERSION

Pipe = StableDiffusion | Unconditional
PlanChoice = tuple[str, int]
"""Name of a sampler, and number of steps."""


def export(
    pipe: Pipe,
    folder: str | Path,
    to: formats.Format = "torch",
    *,
    plans: Sequence[PlanChoice] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write the networks of ``pipe`` into ``folder``, which must be new or empty, in the format ``to``.

    ``plans``: the plans that are written beside them; None: that of the model's own sampler, if it is linear. ``tell``
    is called with what is done next. Raises :class:`ConfigError` for a model that is not plain float32 on the CPU, or
    if a compiler or onnx is missing; :class:`CheckpointError` for a folder that cannot be written; and
    :class:`UnsupportedError` for a sampler that is not linear, or an export beyond its bound.
    """
    check(to in BOUNDS, f"to={to!r}: known are {', '.join(BOUNDS)}")
    _check_plain(pipe)
    formats.need(to)
    made = _plans(pipe, plans)
    with atomic_folder(folder) as part:
        entries = {}
        for program in programs(pipe.config, pipe.parts):
            tell(f"{program.name}: exporting")
            entries[program.name] = _written(to, program, part)
            tell(f"{program.name}: within {entries[program.name]['measured']:.2g} of the model")
        for name, content in made.items():
            write_json(part / "plans" / f"{name}.json", content)
        for name in ("tokenizer", "tokenizer_2"):
            _write_tokenizer(getattr(pipe.config, name), part / name)
        write_json(part / "schedule.json", _schedule(pipe.schedule, asdict(pipe.config.schedule)))
        manifest = _manifest(pipe, to, entries, [f"plans/{name}.json" for name in made])
        manifest["files"] = digests(part)
        write_json(part / NAME, manifest)
        _sync(part)
    return Export(Path(folder), manifest)


def _sync(folder: Path) -> None:
    """Flush the files of a folder to the disk, before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _check_plain(pipe: Pipe) -> None:
    """Raise :class:`ConfigError` unless the networks are those of the model, in float32 on the CPU."""
    where = f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}"
    plain = pipe.dtype == torch.float32 and pipe.device.type == "cpu"
    check(plain, f"the model is in {where}; an export is made of float32 on the CPU: load it with dtype=torch.float32")
    changed = [*pipe.fast, *pipe.approximations, *["low_memory"] * (pipe.low_memory is not None)]
    check(not changed, f"the model is changed by {', '.join(changed)}: load it anew, and export it as it is")


def _written(to: str, program: Program, folder: Path) -> dict[str, Any]:
    """Write a program and hold it against the network; return its entry in the manifest."""
    path = formats.write(to, program, formats.traced(program), folder)
    found, bound = formats.measured(program, formats.reading(to, program, path)), BOUNDS[to].relative
    if not found <= bound:
        raise UnsupportedError(
            f"{program.name}: {to} is {found:.3g} of the largest value from the model, beyond {bound:g}"
        )
    return {"file": path.name, **ends(program), "bound": bound, "measured": found}


def _plans(pipe: Pipe, choices: Sequence[PlanChoice] | None) -> dict[str, Any]:
    """Return the plans as JSON, by the names of their files."""
    own, found = pipe.config.sampler, {}
    usual = [(str(own["name"]), pipe.own_steps())] if "name" in own else []
    for name, steps in usual if choices is None else choices:
        sampler: Any = sampler_from_config(own if name == own.get("name") else {"name": name})
        try:
            made = table(sampler, sampler.plan(pipe.schedule, steps)).to_json()
        except UnsupportedError as e:
            if choices is not None:
                raise
            warn(f"no plan is written: {e}")
            continue
        asked = {"sampler": sampler_to_config(sampler), "schedule": asdict(pipe.config.schedule)}
        found[f"{name}-{steps}"] = {"format": "minidiff plan 1", **asked, **made}
    return found


def _schedule(schedule: NoiseSchedule, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": config, "alpha_bar": schedule.alphas_cumprod.tolist()}


def _write_tokenizer(config: Any, folder: Path) -> None:
    if config is None:
        return
    for name, content in tokenizer_files(config):
        if isinstance(content, str):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        else:
            write_json(folder / name, content)


def _manifest(pipe: Pipe, to: str, entries: Mapping[str, Any], plans: list[str]) -> dict[str, Any]:
    config, vae = pipe.config, pipe.config.vae
    return {
        "format": FORMAT,
        "to": to,
        "family": config.family,
        "model": pipe.identity,
        "minidiff": VERSION,
        "torch": str(torch.__version__),
        "config": json.loads(to_json(config)),
        "prediction": config.schedule.prediction,
        "scaling_factor": 1.0 if vae is None else vae.scaling_factor,
        "factor": 1 if vae is None else vae.factor,
        "programs": entries,
        "plans": plans,
    }
