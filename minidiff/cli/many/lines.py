"""Lines of ``--prompts``: a prompt each, or a JSON object with any option of a Request.

A file whose first line begins with ``{"``, or whose name ends in .jsonl, holds JSON lines. A line is read with the
types of a recipe and checked like a Request; ``control`` holds one text, or a list, in the form of ``--control``. What
is wrong with one is kept with its number, and stops no other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minidiff.cli.controls import Named, read_control
from minidiff.config import check, quote, read_value
from minidiff.console.spelling import near
from minidiff.errors import ConfigError, MinidiffError
from minidiff.pipeline.recipe import PICTURES, check_range
from minidiff.pipeline.request import Request, options
from minidiff.storage.reading import missing, read_bytes

MOST = 10_000  # pictures of one line
Check = Callable[[Any, Any], None]
"""Raises :class:`ConfigError` for a choice of sampler that does not go with a program (``like``)."""


class Line(NamedTuple):
    """A line by its number, from 1, with the fields of a request that it asks for."""

    number: int
    asked: Mapping[str, Any]


class Lines(NamedTuple):
    """A file that was read. ``broken``: what is wrong with a line, by number. ``hash``: that of the file's bytes."""

    good: list[Line]
    broken: dict[int, str]
    hash: str


def read_lines(path: str, base: Mapping[str, Any], check_sampler: Check) -> Lines:
    """Read a file. ``base``: the fields that hold for all lines that do not name them.

    Raises :class:`CheckpointError` for what is no text, and :class:`ConfigError` for a file without lines.
    """
    data = read_bytes(path)
    rows = [row.strip() for row in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]  # str.splitlines knows more ends
    if b"\0" in data:
        raise ConfigError(f"{path}: is not text in UTF-8; it should hold one prompt a line")
    if not any(rows):
        raise ConfigError(f"{path}: holds no prompts; write one a line")
    first = next(filter(None, rows))
    in_json = path.lower().endswith((".jsonl", ".ndjson")) or re.match(rb'\{\s*["}]', first) is not None
    good, broken = [], {}
    for number, row in enumerate(rows, 1):
        if row:
            try:
                own = read_options(row) if in_json else {"prompt": _text(row)}
                asked = {**base, **own}
                check_asked(asked, check_sampler)
                good.append(Line(number, asked))
            except MinidiffError as e:
                broken[number] = str(e)
    return Lines(good, broken, hashlib.sha256(data).hexdigest()[:32])


def _text(row: bytes) -> str:
    try:
        return row.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"is not text in UTF-8 (byte {e.start + 1})") from None


def kinds() -> dict[str, Any]:
    """Return the options that a line may give, with their types in JSON."""
    kept = {f.name: option.kept for f, option in options(Request) if option.kept is not None}
    return {**kept, **dict.fromkeys(PICTURES, str), "num_images": int, "control": tuple[str, ...]}


def read_options(row: bytes) -> dict[str, Any]:
    """Return the fields of a request in a JSON object. Raises :class:`ConfigError` for anything else."""
    try:
        found = json.loads(_text(row))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"is not valid JSON ({e or type(e).__name__})") from None
    check(isinstance(found, dict), f"should be a JSON object with options, not {quote(found)}")
    known = kinds()
    for name in found:
        check(name in known, f"{quote(name)} is no option of a line{near(name, known)}")
    if isinstance(found.get("sampler"), str):
        found["sampler"] = {"name": found["sampler"]}
    if isinstance(found.get("control"), str):
        found["control"] = [found["control"]]
    asked = {name: read_value(known[name], value, name) for name, value in found.items() if value is not None}
    return {**asked, "control": read_controls(asked["control"])} if "control" in asked else asked


def read_controls(texts: tuple[str, ...]) -> tuple[Named, ...]:
    """Return the controls of a line, each in the form of ``--control``. Raises :class:`ConfigError`."""
    found = []
    for text in texts:
        try:
            found.append(read_control(text))
        except argparse.ArgumentTypeError as e:
            raise ConfigError(f"control: {e}") from None
        for path in found[-1][:2]:
            check(os.path.exists(path), f"control {missing(path, 'file or folder')}")
    return tuple(found)


def check_asked(asked: Mapping[str, Any], check_sampler: Check) -> None:
    """Raise an error for a request that no model could run."""
    request = Request(**{"prompt": None, **{name: value for name, value in asked.items() if name != "control"}})
    check_range(request)
    request.check_together()
    check(request.num_images <= MOST, f"num_images={request.num_images} must be at most {MOST:,} for one line")
    check_sampler(request.sampler, request.like)
    for name in PICTURES:
        path = asked.get(name)
        check(path is None or os.path.exists(path), f"{name} {missing(path or '')}")
