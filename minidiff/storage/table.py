"""Header of a safetensors file, checked, without torch: names, dtypes, shapes and places of the tensors.

The safetensors library checks that the table fits the file: sizes that overflow, holes, overlaps, bytes behind the end.
What a file of unknown origin may claim beyond that is checked here, for every reader.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minidiff.config import quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.storage.reading import PICKLES, content, mistaken, open_regular

# Keys of the scales that belong to quantized float8 and int8 weights.
SCALED = re.compile(r"(.*\.)?(scaled_fp8|scale_(weight|input)|(weight|input)_scale(_2)?|comfy_quant)")


@dataclass(frozen=True)
class Place:
    """One tensor of a file: its dtype as safetensors calls it ("F32"), its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Table:
    """Contents of a safetensors file's header. ``identity`` distinguishes the file from one that took its name."""

    metadata: dict[str, str]
    places: dict[str, Place]
    identity: tuple[int, int, int]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read the header of a safetensors file.

    Raises :class:`CheckpointError` for a file that is missing, truncated, of another format by its first bytes, or
    whose header does not fit its content, and :class:`UnsupportedError` for quantized weights with scales.
    """
    path = Path(path)
    what = mistaken(path) or ("a pickle, as torch.save writes them" if content(path) in PICKLES else None)
    if what is not None:
        raise CheckpointError(f"{path}: not a readable safetensors file; it is {what}")
    try:
        identity = identity_of(path)
        opened: Any = safe_open(str(path), framework="np")  # torch's reader would map the file once more
        metadata: dict[str, str] = dict(opened.metadata() or {})
        names = list(opened.keys())
        refuse_scaled(path, names)
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            told = json.loads(file.read(length))
        places = {name: _place(path, name, told[name], 8 + length) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({one_line(e)})") from None
    return Table(metadata, places, identity)


def _place(path: Path, name: str, told: Any, begin: int) -> Place:
    start, end = told["data_offsets"]
    shape = tuple(told["shape"])
    if any(n >= 2**63 for n in shape):  # together with a 0 they would pass as no bytes at all
        raise CheckpointError(f"{path}: tensor {quote(name)} has shape {quote(shape)}, which is too large")
    return Place(told["dtype"], shape, begin + start, begin + end)


def header_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's header with the eight bytes of its length, as 64 hex digits."""
    with open_regular(path) as file:
        length = file.read(8)
        most = min(int.from_bytes(length, "little"), os.fstat(file.fileno()).st_size)
        return hashlib.sha256(length + file.read(most)).hexdigest()


def refuse_scaled(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise :class:`UnsupportedError` if a key of a file shows that its weights are quantized with scales."""
    scale = next((name for name in names if SCALED.fullmatch(name)), None)
    if scale is not None:
        raise UnsupportedError(
            f"{path}: has {quote(scale)}, so its weights are 8-bit numbers with scales, which minidiff does not read; "
            "get the model in float16"
        )


def identity_of(path: Path) -> tuple[int, int, int]:
    """Return numbers that distinguish a file from another one that took its name."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def one_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
