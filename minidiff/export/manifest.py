"""The manifest of an export: what lies in the folder, of which model it is, and how near to it each program was.

    {"format": "minidiff export 1", "to": "onnx", "family": ..., "model": identity, "minidiff": ..., "torch": ...,
     "config": {...}, "scaling_factor": ..., "factor": ...,
     "programs": {"unet": {"file": "unet.onnx",
                           "inputs": {"x": {"axes": ["batch", 4, "height", "width"], "dtype": "float32"}, ...},
                           "outputs": ["out"], "bound": 5e-05, "measured": 4.1e-07}, ...},
     "plans": ["plans/pndm-50.json"], "files": {"unet.onnx": sha256, ...}}

``bound``: the largest difference from the model that an export may have, of the output's largest value; ``measured``:
the one that it had, on random inputs of several sizes. A file whose hash differs is not opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minidiff.config import ModelConfig, quote
from minidiff.errors import CheckpointError
from minidiff.export.formats import BOUNDS, Runner, tried
from minidiff.export.programs import Program, programs
from minidiff.storage.reading import read_object

FORMAT = "minidiff export 1"
NAME = "manifest.json"
CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Export:
    """An export that was opened. ``bound``: largest difference from the model, of an output's largest value."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def to(self) -> str:
        """Format of the programs: "torch", "onnx" or "aoti"."""
        return str(self.manifest["to"])

    @property
    def bound(self) -> float:
        return BOUNDS[self.to].relative

    def path(self, program: str) -> Path:
        """Return the file of a program."""
        return self.folder / str(self.manifest["programs"][program]["file"])

    def runner(self, program: Program) -> Runner:
        """Return a function that runs a program. Raises :class:`CheckpointError` for a damaged file, and for another
        program."""
        return tried(self.to, program, self.path(program.name))

    def require(self, identity: str) -> None:
        """Raise :class:`CheckpointError` unless this is an export of the model with that identity."""
        if self.manifest["model"] != identity:
            of = f"{quote(self.manifest['model'])} ({quote(self.manifest.get('family'))})"
            raise CheckpointError(f"{self.folder}: an export of another model, {of}, and this one is {identity}")

    def programs_of(self, config: ModelConfig, parts: Mapping[str, nn.Module]) -> list[Program]:
        """Return the programs of the model that this is an export of. Raises :class:`CheckpointError` if the manifest
        tells of others."""
        found = programs(config, parts)
        names = [program.name for program in found]
        if names != list(self.manifest["programs"]):
            has = quote(list(self.manifest["programs"]))
            raise CheckpointError(f"{self.folder}: an export of {has}; the model has {names}")
        for program in found:
            entry = self.manifest["programs"][program.name]
            for side, wanted in ends(program).items():
                if entry.get(side) != wanted:
                    raise CheckpointError(
                        f"{self.folder / NAME}: {program.name}: {_apart(side, entry.get(side), wanted)}"
                    )
        return found


def ends(program: Program) -> dict[str, Any]:
    """Return inputs and outputs of a program as the manifest tells them."""
    types = {name: "int64" if name == "ids" else "float32" for name in program.inputs}
    inputs = {name: {"axes": list(axes), "dtype": types[name]} for name, axes in program.inputs.items()}
    return {"inputs": inputs, "outputs": list(program.outputs)}


def _apart(side: str, found: Any, wanted: Any) -> str:
    """Say where a program's inputs or outputs are not the model's; of two dicts, name the first entry that differs."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        name = next(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
        side, found, wanted = f"{side}: {quote(name)}", found.get(name), wanted.get(name)
    return f"{side} {quote(found)}, and the model's {json.dumps(wanted)}; export the model again"


def open_export(folder: str | Path) -> Export:
    """Open an export and check its files.

    Raises :class:`CheckpointError` for a folder that is no export, of another version, or changed since.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no export: there is no {NAME} in it; `minidiff export` writes one")
    found = read_object(path)
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format={quote(found.get('format'))}, and {FORMAT!r} is read; export the model again"
        )
    try:
        export = Export(folder, found)
        to, listed, _ = export.to, dict(found["files"]), str(found["model"])
        files = [str(entry["file"]) for entry in found["programs"].values()]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{path}: entries are missing or of another kind; export the model again") from None
    if to not in BOUNDS:
        raise CheckpointError(f"{path}: to={quote(to)}; known are {', '.join(BOUNDS)}")
    for name in {*listed, *files}:
        _check(folder, name, listed.get(name))
    return export


def _check(folder: Path, name: str, known: Any) -> None:
    """Raise :class:`CheckpointError` unless the file is one of the folder, with the hash that the manifest tells."""
    path = folder / name
    try:
        there = not Path(name).is_absolute() and ".." not in Path(name).parts and path.is_file()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise CheckpointError(f"{folder}: its file {quote(name)} is missing; export the model again")
    if digest(path) != known:
        raise CheckpointError(f"{path}: its content is not what {NAME} tells; export the model again")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of all files in a folder and those below it, by their paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file, with its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
