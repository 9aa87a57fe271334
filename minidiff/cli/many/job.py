"""The job's file: what was decided when the first picture of ``--prompts`` was made, and holds for every later run."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minidiff.config import quote, read_value
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.recipe import plain
from minidiff.pipeline.request import Request, options
from minidiff.storage.reading import read_object
from minidiff.storage.writing import atomic

FILE = "job.json"
# Arguments that change no picture, or have an entry of their own.
BESIDE = ("command", "debug", "quiet", "prompts", "out", "model", "seed", "together")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Facts that a job's pictures depend on.

    ``lines``: hash of the file; ``options``: what else the command line gave; ``names``: pattern of the files' names;
    ``model``: identity, with the hashes of adapters and controls; ``inputs``: hashes of other files (:mod:`inputs`);
    ``place``: dtype, device and versions.
    """

    lines: str
    options: dict[str, Any]
    names: str
    seeds: tuple[int, ...]
    together: int = 0
    threads: int = 0
    model: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    place: str = ""


def given(args: Namespace) -> dict[str, Any]:
    """Return the options of the command line that shape the pictures, as JSON has them."""
    found = {name: value for name, value in vars(args).items() if name not in BESIDE}
    set_ = {name: value for name, value in found.items() if value not in (None, False, [])}
    return dict(json.loads(json.dumps(plain(set_))))


def load(folder: Path) -> Job | None:
    """Read the job of a folder; None if there is none. Raises :class:`CheckpointError` for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        job: Job = read_value(Job, read_object(path), "job")
        if job.together < 1 or job.threads < 1 or not job.seeds:
            raise ConfigError(f"together={job.together}, threads={job.threads}, seeds={job.seeds}")
    except ConfigError as e:
        raise CheckpointError(f"{path}: is damaged ({e}); name another folder with --out") from None
    return job


def save(job: Job, folder: Path) -> None:
    """Write the job of a new folder."""
    with atomic(folder / FILE, "refuse") as file:
        file.write((json.dumps(asdict(job), indent=1) + "\n").encode())


def check_same(before: Job, now: Job, folder: Path, names: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` if this run would make other pictures than those begun: if one of the fields ``names``
    differs, or a file that both read."""
    for name in names:
        then, here = getattr(before, name), getattr(now, name)
        if then != here:
            what = "; ".join(_changes(name, then, here))
            raise ConfigError(f"{folder / FILE}: was begun with {what}; name another folder with --out")
    others = [name for name in before.inputs if before.inputs[name] != now.inputs.get(name, before.inputs[name])]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        what = f"another {quote(others[0])}{more}"
        raise ConfigError(f"{folder / FILE}: was begun with {what}; name another folder with --out")


def _changes(name: str, then: Any, here: Any) -> Iterator[str]:
    if name == "seeds":
        yield f"--seed {_listed(then)}, this run has {_listed(here)}"
    elif name == "options":
        flags = {f.name: option.flag for f, option in options(Request) if option.flag}
        for key in sorted(k for k in {*then, *here} if then.get(k) != here.get(k)):
            values = [quote(both[key]) if key in both else "none" for both in (then, here)]
            yield f"{flags.get(key, '--' + key.replace('_', '-'))} {values[0]}, this run has {values[1]}"
    else:
        yield {"lines": "other lines", "model": "another model"}.get(name, f"other {name}: {quote(then)}")


def _listed(seeds: tuple[int, ...]) -> str:
    return ",".join(map(str, seeds))
