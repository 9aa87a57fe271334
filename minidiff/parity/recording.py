"""Recordings: the values of all stages of a run, by name, in a file, to compare programs in different languages.

A recording is one safetensors file, which any program can write. Its format:

* **Tensors**: one per stage, named as in the table at the top of ``stages.py``: ``prompt/ids``, ``plan/timesteps``,
  ``start/x``, ``step.0/input``, ``step.0/unet/down.0.res.0.conv1``, ``step.0/prediction``, ``step.0/out``,
  ``step.0/x``, ``decode/pixels``, ... Floats as they were computed, ids int64; pictures and latents (B, C, H, W),
  tokens (B, L, C). With guidance the UNet's batch is [negative, prompt].
* **Header** (the safetensors ``__metadata__``, whose values are strings):
  ``recording.version``: "1".
  ``recording.stages``: a JSON list of all tensors' names, each once, in the order of computation. The order in the
  file has no meaning.
  ``recording.run``: a JSON object that describes the run. All of its keys are optional. "program" is the title in
  reports; if both recordings have "model" (an identifier of the architecture), "prompt", "negative", "steps",
  "sampler", "scale", "seed", "width", "height" or "strength", the values must be equal.

Only stages that both recordings have are compared, so a program may write as few as it likes: start with ``start/x``
and every ``step.N/x``, then add the layers of the step with the first difference. ``NAME:in`` may be left out if it is
the unchanged output of an earlier stage; minidiff leaves it out. To follow a recording of minidiff exactly, a program
starts from its ``prompt/ids`` and ``start/x``, and takes a sampler's noise from ``step.N/noise`` (for inpainting, the
additional channels from ``step.0/mask`` and ``step.0/masked``), so no random generator has to be reimplemented.

A recording in float64 can be a judge: ``minidiff parity compare A B --judge C`` shows which is nearer to it, by stage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minidiff.config import ModelConfig, check, quote, to_json
from minidiff.errors import CheckpointError
from minidiff.parity.difference import difference
from minidiff.parity.engine import Judgement, Row, Side, line_up
from minidiff.parity.report import Report
from minidiff.parity.taps import INPUT
from minidiff.storage.files import TensorFile, lazy, write_tensors
from minidiff.storage.writing import Existing

VERSION = "1"
VERSION_KEY, STAGES_KEY, RUN_KEY = "recording.version", "recording.stages", "recording.run"
SAME = ("model", "prompt", "negative", "steps", "sampler", "scale", "seed", "width", "height", "strength")
RECENT = 8  # recent values among which an input is searched


@dataclass
class Recording:
    """Values by stage, in the order of computation, and the description of the run."""

    tape: Mapping[str, Tensor]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the program that made the recording."""
        return str(self.run.get("program", "a program that does not say its name"))


def record(side: Side, run: Mapping[str, Any]) -> Recording:
    """Run ``side`` and record its values, without inputs that are the unchanged output of an earlier stage."""
    tape: dict[str, Tensor] = {}
    recent: deque[Tensor] = deque(maxlen=RECENT)

    def keep(stage: str, value: Tensor) -> Tensor:
        if not (stage.endswith(INPUT) and any(value is other for other in recent)):
            tape[stage] = value.detach().to("cpu", copy=True)
        recent.append(value)
        return value

    side.run(keep)
    return Recording(tape, {"program": side.title, **run})


def write_recording(path: str | os.PathLike[str], recording: Recording, existing: Existing = "replace") -> None:
    """Write a recording, atomically. Raises :class:`CheckpointError` for a folder that does not exist.

    ``existing``: treatment of an existing file, see :func:`~minidiff.storage.writing.atomic`.
    """
    header = {
        "format": "pt",
        VERSION_KEY: VERSION,
        STAGES_KEY: json.dumps(list(recording.tape)),
        RUN_KEY: json.dumps(dict(recording.run)),
    }
    write_tensors(path, {stage: lazy(value) for stage, value in recording.tape.items()}, header, existing)


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Open a recording.

    Raises :class:`CheckpointError` for a file that is missing, damaged or no recording, and for one whose list of
    stages does not match its contents.
    """
    file = TensorFile(path)
    try:
        version = file.metadata.get(VERSION_KEY)
        if version is None:
            raise CheckpointError(f"{path}: a safetensors file, but no recording; `minidiff parity record` makes one")
        if version != VERSION:
            raise CheckpointError(f"{path}: a recording of version {quote(version)}; this minidiff reads {VERSION!r}")
        stages = _json(path, file, STAGES_KEY, list, "a JSON list")
        run = _json(path, file, RUN_KEY, dict, "a JSON object")
        if not stages or not all(isinstance(s, str) for s in stages):
            raise CheckpointError(f"{path}: {STAGES_KEY} must list the names of stages, and lists {quote(stages)}")
        listed, held = set(stages), set(file.lazy)
        for problem, names in (
            ("is listed as a stage, but missing", listed - held),
            ("is in the file, but not listed as a stage", held - listed),
            (
                "is listed more than once",
                {s for s in listed if stages.count(s) > 1} if len(listed) < len(stages) else (),
            ),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CheckpointError(f"{path}: stage {quote(min(names))} {problem}{more}; record it again")
        return Recording({stage: file.lazy[stage].load() for stage in stages}, run)
    finally:
        file.close()


def _json(path: Any, file: TensorFile, key: str, kind: type, what: str) -> Any:
    try:
        found = json.loads(file.metadata.get(key, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise CheckpointError(f"{path}: {key} in its header should be {what}; record it again")
    return found


def compare(a: Recording, b: Recording, tolerance: float = 0.0, judge: Recording | None = None) -> Report:
    """Compare two recordings, each of a program that continued with its own numbers.

    Raises :class:`ConfigError` if they are of different models or runs, or have no stage in common.
    """
    for key in SAME:
        for other in (b, judge):
            if other is not None and key in a.run and key in other.run:
                x, y = a.run[key], other.run[key]
                check(x == y, f"the recordings are of different runs: {key} is {quote(x)} and {quote(y)}")
    apart = {stage: difference(a.tape[stage], value) for stage, value in b.tape.items() if stage in a.tape}
    rows, only_a, only_b = line_up(a.tape, b.tape, apart, a.title, b.title)
    if judge is not None:
        rows = [_judged(row, a.tape[row.stage], b.tape[row.stage], judge.tape.get(row.stage)) for row in rows]
    about = {"run": ", ".join(f"{key} {a.run[key]!r}" for key in ("family", *SAME, "dtype") if key in a.run)}
    return Report(a.title, b.title, rows, tolerance, only_a, only_b, about)


def _judged(row: Row, a: Tensor, b: Tensor, truth: Tensor | None) -> Row:
    same = truth is not None and a.shape == b.shape == truth.shape and truth.dtype == torch.float64
    if truth is None or not same or row.chained.equal:
        return row
    errors = [float((side.double() - truth).square().mean().sqrt()) for side in (a, b)]
    return Row(row.stage, row.chained, None, Judgement(errors[0], errors[1], None))


def architecture(config: ModelConfig) -> str:
    """Return hex digits that identify the shape of a checkpoint's networks, whatever their weights."""
    parts = [to_json(c) for c in (config.unet, config.vae, config.text_encoder, config.text_encoder_2) if c is not None]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
