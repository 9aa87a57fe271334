"""Recordings: the values of all stages of a run, by name, in a file, to compare programs in different languages.

SPECIFICATION.md describes the format, ``header.py`` reads its header, and ``writer.py`` is a writer for other programs.

A recording in float64 can be a judge: ``minidiff parity compare A B --judge C`` shows which is nearer to it, by stage.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minidiff.config import ModelConfig, to_json
from minidiff.parity import comparing
from minidiff.parity.engine import Side, in_place_of
from minidiff.parity.header import Entry, Header, read_header
from minidiff.parity.importers import open_source
from minidiff.parity.report import Report
from minidiff.parity.rows import INPUT
from minidiff.parity.values import sha256_of, value_of
from minidiff.storage.files import Lazy, TensorFile, lazy, write_tensors
from minidiff.storage.streaming import streamed
from minidiff.storage.writing import Existing

RECENT = 8  # recent values among which an input is searched


@dataclass
class Recording:
    """Values by stage, in the order of computation, and the description of the run.

    ``hashes``: entries of the stages of which only a hash is kept, in the same order.
    """

    tape: Mapping[str, Tensor]
    run: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the program that made the recording, with its version."""
        return Header((), self.run).title


def record(
    side: Side, run: Mapping[str, Any], *, on: Mapping[str, Tensor] | None = None, hashed: bool = False
) -> Recording:
    """Run ``side`` and record its values, without inputs that are the unchanged output of an earlier stage.

    ``on``: values that the run is handed at every stage, after its own is recorded, so that what differs from them
    arose at that stage. ``hashed``: keep only hashes, for long runs.
    """
    tape: dict[str, Tensor] = {}
    hashes = _taken(side, lambda stage, value: tape.update({stage: value.detach().to("cpu", copy=True)}), on, hashed)
    return Recording(tape, {"program": side.title, **run}, hashes)


def record_to(
    path: str | os.PathLike[str],
    side: Side,
    run: Mapping[str, Any],
    *,
    on: Mapping[str, Tensor] | None = None,
    hashed: bool = False,
    existing: Existing = "replace",
) -> int:
    """Run ``side`` as :func:`record` does, and write its values while it goes on; return the number of stages.

    Only some hundred megabytes of them are in memory at once. ``existing``, and the errors: as in
    :func:`write_recording`.
    """
    stages: list[str] = []
    with streamed(path, existing) as file:

        def keep(stage: str, value: Tensor) -> None:
            file.add(stage, value)
            stages.append(stage)

        hashes = _taken(side, keep, on, hashed)
        entries = (*map(Entry, stages), *hashes.values())
        file.finish({"format": "pt", **Header(entries, {"program": side.title, **run}).metadata()})
    return len(entries)


def _taken(
    side: Side, keep: Callable[[str, Tensor], None], on: Mapping[str, Tensor] | None, hashed: bool
) -> dict[str, Entry]:
    """Run ``side``, and give its values to ``keep``; if they are only to be ``hashed``, return their entries."""
    hashes: dict[str, Entry] = {}
    recent: deque[Tensor] = deque(maxlen=RECENT)

    def tap(stage: str, value: Tensor) -> Tensor:
        if not (stage.endswith(INPUT) and any(value is other for other in recent)):
            if hashed:
                own = value_of(value)
                hashes[stage] = Entry(stage, sha256=sha256_of(own), shape=own.shape, dtype=own.dtype)
            else:
                keep(stage, value)
        if on is not None and stage in on:
            value = in_place_of(value, on[stage])
        recent.append(value)
        return value

    side.run(tap)
    return hashes


def write_recording(path: str | os.PathLike[str], recording: Recording, existing: Existing = "replace") -> None:
    """Write a recording, atomically. Raises :class:`CheckpointError` for a folder that does not exist.

    ``existing``: treatment of an existing file, see :func:`~minidiff.storage.writing.atomic`.
    """
    entries = (*map(Entry, recording.tape), *recording.hashes.values())
    metadata = {"format": "pt", **Header(entries, recording.run).metadata()}
    write_tensors(path, {stage: lazy(value) for stage, value in recording.tape.items()}, metadata, existing)


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Read a recording whole. What is stored as NHWC becomes NCHW.

    Raises :class:`CheckpointError` for a file that is missing, damaged or no recording, and for one whose header does
    not match its contents.
    """
    file = TensorFile(path)
    try:
        header = read_header(path, file.metadata, file.lazy)
        stored = [entry for entry in header.entries if entry.sha256 is None]
        hashes = {entry.name: entry for entry in header.entries if entry.sha256 is not None}
        return Recording({e.name: _load(path, header, e, file.lazy[e.name]) for e in stored}, header.run, hashes)
    finally:
        file.close()


def _load(path: Any, header: Header, entry: Entry, stored: Lazy) -> Tensor:
    layout = header.layout_of(path, entry, stored.shape, stored.dtype.is_floating_point)
    value = stored.load()
    return value.permute(0, 3, 1, 2).contiguous() if layout == "NHWC" else value


def compare(a: Recording, b: Recording, tolerance: float = 0.0, judge: Recording | None = None) -> Report:
    """Compare two recordings in memory; see :func:`minidiff.parity.comparing.compare`."""
    judges = [] if judge is None else [open_source(judge)]
    return comparing.compare(open_source(a), open_source(b), tolerance, judges)


def architecture(config: ModelConfig) -> str:
    """Return hex digits that identify the shape of a checkpoint's networks, whatever their weights."""
    parts = [to_json(c) for c in (config.unet, config.vae, config.text_encoder, config.text_encoder_2) if c is not None]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
