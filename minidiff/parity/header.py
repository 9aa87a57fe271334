"""Header of a recording: the stages in their order, and the description of the run. SPECIFICATION.md explains it.

What is read here comes from strangers: every value is checked, and what does not fit is refused in one line. Keys that
are not known are ignored, as the format asks. No torch: recordings are compared with numpy alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.parity.writer import DTYPES, LAYOUTS, VERSION

VERSIONS = ("1", VERSION)  # that are read
VERSION_KEY, STAGES_KEY, RUN_KEY = "recording.version", "recording.stages", "recording.run"
BRANCHES = ("unconditional", "conditional")  # the halves of a batch with guidance, in this order
NAMES = {code: name for name, code in DTYPES.items()}
FLOATS = ("float64", "float32", "bfloat16", "float16")
# Of two recordings that both say one of these about their runs, the values must be equal.
SAME = ("model", "prompt", "negative", "steps", "sampler", "scale", "seed", "width", "height", "strength")


@dataclass(frozen=True)
class Entry:
    """One stage as it is listed.

    ``layout``: None, the recording's own. ``computed``: name of the dtype it was computed in; None if that is the
    recording's, or the stored one. ``sha256``, ``shape`` and ``dtype``: of a stage of which only the hash is kept.
    """

    name: str
    layout: str | None = None
    computed: str | None = None
    sha256: str | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""

    def to_json(self) -> str | dict[str, Any]:
        """Return the entry as it is written."""
        told = {"layout": self.layout, "computed": self.computed}
        if self.sha256 is not None:
            told |= {"sha256": self.sha256, "shape": list(self.shape), "dtype": self.dtype}  # type: ignore[dict-item]
        found = {key: value for key, value in told.items() if value is not None}
        return {"name": self.name, **found} if found else self.name


@dataclass(frozen=True)
class Header:
    """Stages in the order of computation, and the description of the run."""

    entries: tuple[Entry, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    version: str = VERSION

    @property
    def title(self) -> str:
        """Name of the program that made the recording, with its version."""
        program = self.run.get("program", "a program that does not say its name")
        version = self.run.get("version")
        return str(program) if version is None else f"{program} {version}"

    @property
    def layout(self) -> str:
        """Layout of 4-dimensional floats that do not say another."""
        return str(self.run.get("layout", "NCHW"))

    @property
    def branches(self) -> tuple[str, ...]:
        """The halves of a batch with guidance, in order."""
        return tuple(self.run.get("branches", BRANCHES))

    def layout_of(self, path: Any, entry: Entry, shape: tuple[int, ...], floating: bool) -> str:
        """Return the layout in which a stage of this shape lies in the file.

        Raises :class:`CheckpointError` for an entry that claims one which the shape does not have.
        """
        picture = len(shape) == 4 and floating
        if entry.layout in ("NCHW", "NHWC") and not picture:
            has = f"shape {quote(shape)}" if floating else "no floats"
            raise CheckpointError(f"{path}: stage {quote(entry.name)} is listed as {entry.layout}, and has {has}")
        return (entry.layout or self.layout) if picture else "plain"

    def metadata(self) -> dict[str, str]:
        """Return the header as the strings that a safetensors file holds."""
        return {
            VERSION_KEY: VERSION,
            STAGES_KEY: json.dumps([entry.to_json() for entry in self.entries]),
            RUN_KEY: json.dumps(dict(self.run)),
        }


def read_header(path: Any, metadata: Mapping[str, str], held: Iterable[str]) -> Header:
    """Return the header in a file's ``metadata``; ``held``: the names of the tensors in the file.

    Raises :class:`CheckpointError` for a file that is no recording, for another version, and for a header that does not
    fit the file.
    """
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise CheckpointError(f"{path}: a safetensors file, but no recording; `minidiff parity record` makes one")
    if version not in VERSIONS:
        known = " and ".join(map(repr, VERSIONS))
        raise CheckpointError(f"{path}: a recording of version {quote(version)}; this minidiff reads {known}")
    listed = _json(path, metadata, STAGES_KEY, list, "a JSON list")
    run = _json(path, metadata, RUN_KEY, dict, "a JSON object")
    if version == "1":
        run = {key: value for key, value in run.items() if key not in ("version", "layout", "branches")}
        strings = all(isinstance(one, str) for one in listed)
    else:
        strings = all(isinstance(one, (str, dict)) for one in listed)
        _check_run(path, run)
    if not listed or not strings:
        raise CheckpointError(f"{path}: {STAGES_KEY} must list the names of stages, and lists {quote(listed)}")
    entries = tuple(_entry(path, one) for one in listed)
    _check_names(path, entries, set(held))
    return Header(entries, run, version)


def _check_names(path: Any, entries: Iterable[Entry], held: set[str]) -> None:
    counts = Counter(entry.name for entry in entries)
    stored = {entry.name for entry in entries if entry.sha256 is None}
    for problem, names in (
        ("is listed as a stage, but missing", stored - held),
        ("is in the file, but not listed as a stage", held - counts.keys()),
        ("is listed with a hash, and is in the file as well", held & (counts.keys() - stored)),
        ("is listed more than once", {name for name, n in counts.items() if n > 1}),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: stage {quote(min(names))} {problem}{more}; record it again")


def _json(path: Any, metadata: Mapping[str, str], key: str, kind: type, what: str) -> Any:
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise CheckpointError(f"{path}: {key} in its header should be {what}; record it again")
    return found


def _check_run(path: Any, run: Mapping[str, Any]) -> None:
    layout, branches = run.get("layout", "NCHW"), run.get("branches", list(BRANCHES))
    if layout not in LAYOUTS:
        raise CheckpointError(f"{path}: the layout {quote(layout)} is none of {', '.join(LAYOUTS)}")
    if branches not in (list(BRANCHES), list(BRANCHES)[::-1]):
        raise CheckpointError(f"{path}: branches should list {' and '.join(BRANCHES)}, and lists {quote(branches)}")


def _entry(path: Any, told: str | dict[str, Any]) -> Entry:
    if isinstance(told, str):
        return Entry(told)
    name = told.get("name")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: {STAGES_KEY} lists {quote(told)}, which has no name")

    def refuse(key: str) -> CheckpointError:
        return CheckpointError(f"{path}: stage {quote(name)} has {key} {quote(told.get(key))}; see SPECIFICATION.md")

    layout, computed, digest = told.get("layout"), told.get("computed"), told.get("sha256")
    if layout is not None and layout not in LAYOUTS:
        raise refuse("layout")
    if computed is not None and not isinstance(computed, str):
        raise refuse("computed")
    if digest is None:
        return Entry(name, layout, computed)
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise refuse("sha256")
    shape, dtype = told.get("shape"), told.get("dtype")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise refuse("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse("dtype")
    return Entry(name, None, computed, digest, tuple(shape), dtype)
