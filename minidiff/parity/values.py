"""Values of a recording, read in pieces by numpy alone: a stage of any size passes through a megabyte of memory.

A value knows its shape (channels first), and reads its numbers in the order in which they are stored, channels last if
that is how the file has them. Two values of the same order are compared as they lie; otherwise the pieces of one are
read so that they match the other's (:func:`pieces`).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.parity.header import FLOATS, NAMES, Entry, Header, read_header
from minidiff.storage.reading import open_regular
from minidiff.storage.table import Place, header_hash, read_table

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PIECE = 1 << 15  # numbers of one side that are in work at a time; they fit the processor's cache
BLOCK = 1 << 24  # bytes read at a time where channels have to change their place
# numpy's types of the stored numbers. bfloat16, which it does not have, is read as its bits and widened.
TYPES: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype("<u2"), "bool": np.dtype("u1")}


@dataclass(frozen=True)
class Value:
    """One stage: ``read(start, count)`` returns the bytes of ``count`` numbers, in the order of storage.

    ``shape`` has the channels first; with ``last`` they are stored last. ``dtype`` is the stored one, ``computed`` the
    one it was computed in, both by name. ``sha256``: of a value of which nothing else is kept. ``whole``: the shape of
    the value of which this holds the corners (:func:`corners`), as a printed tensor does.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Any]
    computed: str = ""
    last: bool = False
    sha256: str | None = None
    whole: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Count of the numbers."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """True if the numbers are floats."""
        return self.dtype in FLOATS

    @property
    def precision(self) -> str:
        """The float that the value was computed in: the coarser of ``computed`` and ``dtype``."""
        known = self.computed in FLOATS and FLOATS.index(self.computed) > FLOATS.index(self.dtype)
        return self.computed if known else self.dtype

    def numbers(self, start: int, count: int) -> Array:
        """Return numbers in the order of storage, flat, in a type that numpy has."""
        found: Array = widened(self.read(start, count), self.dtype)
        return found

    def array(self) -> Array:
        """Return the whole value in its shape."""
        shape = self.shape
        if self.last:
            shape = (shape[0], shape[2], shape[3], shape[1])
        stored: Array = self.numbers(0, self.size).reshape(shape)
        return stored.transpose(0, 3, 1, 2) if self.last else stored

    def half(self, k: int) -> Value:
        """Return one half of the batch: the first for k = 0, the second for k = 1."""
        shape = (self.shape[0] // 2, *self.shape[1:])
        offset = k * math.prod(shape)
        return replace(self, shape=shape, read=lambda start, count: self.read(offset + start, count))


@dataclass
class Source:
    """A recording that is compared: its title, the description of its run, and its values by stage, in order."""

    title: str
    run: Mapping[str, Any]
    values: Mapping[str, Value]
    identity: str = ""
    close: Callable[[], None] = field(default=lambda: None)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def open_recording(path: str | os.PathLike[str]) -> Source:
    """Open a recording; values are read from the file when they are needed, until it is closed.

    Raises :class:`CheckpointError` for a file that is missing, damaged or no recording, and for one whose header does
    not match its contents.
    """
    table = read_table(path)
    header = read_header(path, table.metadata, table.places)
    opened: Any = open_regular(path)
    found = os.fstat(opened.fileno())
    if (found.st_ino, found.st_size, found.st_mtime_ns) != table.identity:
        opened.close()
        raise CheckpointError(f"{path}: was replaced while it was read; open it again")
    try:
        values = {entry.name: _value(path, opened.raw, header, entry, table.places) for entry in header.entries}
    except BaseException:
        opened.close()
        raise
    return Source(header.title, header.run, values, header_hash(path)[:16], opened.close)


def of_hash(entry: Entry) -> Value:
    """Return the value of a stage of which only a hash is kept."""
    return Value(entry.shape, entry.dtype, _nothing, entry.computed or "", sha256=entry.sha256)


def _value(path: Any, file: Any, header: Header, entry: Entry, places: Mapping[str, Place]) -> Value:
    if entry.sha256 is not None:
        return of_hash(entry)
    computed = entry.computed or str(header.run.get("dtype", ""))
    place = places[entry.name]
    if place.dtype not in NAMES:
        raise CheckpointError(
            f"{path}: stage {quote(entry.name)} has dtype {place.dtype}, which recordings do not have; store it wider"
        )
    dtype, shape = NAMES[place.dtype], place.shape
    last = header.layout_of(path, entry, shape, dtype in FLOATS) == "NHWC"
    if last:
        shape = (shape[0], shape[3], shape[1], shape[2])
    width = type_of(dtype).itemsize

    def read(start: int, count: int) -> bytes:
        file.seek(place.start + start * width)
        data: bytes = file.read(count * width)
        while len(data) < count * width:
            more = file.read(count * width - len(data))
            if not more:
                raise CheckpointError(f"{path}: ends within stage {quote(entry.name)}; it was cut while it was read")
            data += more
        return data

    return Value(shape, dtype, read, computed, last)


def _nothing(start: int, count: int) -> bytes:
    raise AssertionError("a hash has no numbers")


def value_of(thing: Any, computed: str = "") -> Value:
    """Return a tensor or an array in memory as a value."""
    if isinstance(thing, Value):
        return thing
    if hasattr(thing, "detach"):  # a tensor of torch, which is not imported here
        thing = thing.detach().cpu().contiguous()
        dtype = str(thing.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            thing = thing.view(_int16_of(thing))
        array: Array = thing.numpy()
    else:
        array = np.asarray(thing)
        dtype = array.dtype.name
        if dtype == "bfloat16":  # of the package ml_dtypes
            array = array.view(np.uint16)
    flat = np.asarray(array, order="C").reshape(-1)
    return Value(tuple(array.shape), dtype, lambda start, count: flat[start : start + count], computed)


def _int16_of(tensor: Any) -> Any:
    import torch

    return torch.int16


def type_of(dtype: str) -> np.dtype[Any]:
    """Return numpy's type of numbers that are stored as ``dtype``."""
    return TYPES[dtype] if dtype in TYPES else np.dtype(dtype).newbyteorder("<")


def widened(raw: Any, dtype: str) -> Array:
    """Return bytes, or an array of them, as flat numbers; bfloat16 becomes float32, of which it is the upper half."""
    array: Array = np.frombuffer(raw, dtype=type_of(dtype)) if isinstance(raw, (bytes, bytearray)) else raw
    if dtype == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.view(np.uint8) if dtype == "bool" else array


def corners(value: Value, edge: int = 3) -> Value:
    """Return the first and last entries along each dimension, as torch prints a large tensor."""
    array = value.array()
    for axis, n in enumerate(array.shape):
        if n > 2 * edge:
            array = np.take(array, [*range(edge), *range(n - edge, n)], axis)
    flat = np.asarray(array, order="C").reshape(-1)
    dtype = "float32" if value.dtype == "bfloat16" else value.dtype
    read: Callable[[int, int], Array] = lambda start, count: flat[start : start + count]  # noqa: E731
    return Value(tuple(array.shape), dtype, read, value.precision, whole=value.shape)


def pieces(a: Value, b: Value) -> Iterator[tuple[Array, Array]]:
    """Yield the numbers of two values of one shape, flat and in pieces, so that those that belong together meet."""
    if a.last == b.last:
        for start in range(0, a.size, PIECE):
            count = min(PIECE, a.size - start)
            yield a.numbers(start, count), b.numbers(start, count)
        return
    first, last = (b, a) if a.last else (a, b)
    for x, y in _across(first, last):
        yield (y, x) if a.last else (x, y)


def _across(first: Value, last: Value) -> Iterator[tuple[Array, Array]]:
    """Yield pieces of a value with the channels first, and of one with the channels last: some rows of one picture."""
    n, c, h, w = first.shape
    rows = max(1, min(h, PIECE // max(1, w * c)))
    for k in range(n if first.size else 0):
        for top in range(0, h, rows):
            count = min(rows, h - top)
            if count == h:
                x = first.numbers(k * c * h * w, c * h * w)
            else:
                parts = [first.numbers(((k * c + i) * h + top) * w, count * w) for i in range(c)]
                x = np.concatenate(parts)
            y = last.numbers((k * h + top) * w * c, count * w * c).reshape(count * w, c).T
            yield x, y.reshape(-1)


def sha256_of(value: Value) -> str:
    """Return the hash of a value's bytes, channels first."""
    digest = hashlib.sha256()
    width = type_of(value.dtype).itemsize
    if not value.last:
        step = BLOCK // width
        for start in range(0, value.size, step):
            digest.update(_raw(value, start, min(step, value.size - start)).tobytes())
        return digest.hexdigest()
    n, c, h, w = value.shape
    some = max(1, min(c, BLOCK // max(1, h * w * width)))  # channels that are gathered at a time
    rows = max(1, min(h, BLOCK // max(1, c * w * width)))
    for k in range(n):
        for channel in range(0, c, some):
            parts = []
            for top in range(0, h, rows):
                count = min(rows, h - top)
                block = _raw(value, (k * h + top) * w * c, count * w * c).reshape(count * w, c)
                parts.append(block[:, channel : channel + some].T)
            digest.update(np.concatenate(parts, axis=1).tobytes())
    return digest.hexdigest()


def _raw(value: Value, start: int, count: int) -> Array:
    raw = value.read(start, count)
    return np.frombuffer(raw, dtype=type_of(value.dtype)) if isinstance(raw, bytes) else raw
