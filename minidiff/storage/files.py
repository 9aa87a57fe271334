"""Tensors on disk: safetensors read through mmap and written as a stream.

The safetensors format consists of eight bytes of length, a JSON table of names, shapes and byte ranges, and the bytes.
``table.py`` reads the table. Tensors are mapped here, since the library's ``get_tensor`` never frees some 60 bytes of
each. Writing is done here, too, so that a checkpoint passes through memory one tensor at a time and carries the hash of
its content in its header.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.storage.table import identity_of, one_line, read_table
from minidiff.storage.writing import Existing, atomic

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# 8-bit floats are a storage format: they are read as float16, which holds every value of both kinds.
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
STORED = DTYPES | FLOAT8
WIDENED = dict.fromkeys(FLOAT8.values(), torch.float16)
# NaN and infinity are the numbers whose exponent bits are all set.
EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
HASH_KEY = "minidiff.hash"  # hash of all content: checked when everything is read
HEADER_KEY = "minidiff.header"  # hash of the header alone: checked whenever the file is opened
BLANK = "0" * 64  # placeholder for a hash while it is computed
FRESH_MAP = 1 << 20  # bytes read from a map before it is replaced by a new one
ALIGNMENT = 64  # bytes: one cache line, and the widest vector that a CPU kernel loads


@dataclass(frozen=True)
class Lazy:
    """Description of a tensor that is not read yet; ``load()`` reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def lazy(tensor: Tensor) -> Lazy:
    """Wrap a tensor in memory as :class:`Lazy`; float8 becomes float16."""
    dtype = WIDENED.get(tensor.dtype, tensor.dtype)
    return Lazy(tuple(tensor.shape), dtype, lambda: tensor.to(dtype))


def all_finite(tensor: Tensor) -> bool:
    """Return True if no entry is NaN or infinite; tensors that are not floating point are always finite.

    The bits are tested, which is many times faster than ``torch.isfinite``, otherwise the bottleneck of a conversion.
    """
    if tensor.dtype not in EXPONENTS:
        return True
    kind, exponent = EXPONENTS[tensor.dtype]
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(kind).numpy()
    return not bool(((bits & exponent) == exponent).any())


class TensorFile:
    """Safetensors file that is mapped into memory: a tensor costs nothing until its bytes are used.

    float8 tensors are read as float16, which holds all their values. Raises :class:`CheckpointError` for a file that is
    missing, truncated, of another format by its first bytes, or whose header does not fit its content, and
    :class:`UnsupportedError` for quantized weights with scales.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        told = read_table(path)
        self.metadata, self._table, self._identity = told.metadata, told.places, told.identity
        try:
            self._map()
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f"{self.path}: not a readable safetensors file ({one_line(e)})") from None
        self.lazy: dict[str, Lazy] = {name: self._describe(name) for name in self._table}

    def _map(self) -> Any:
        """Map the file anew, for this and the following tensors. Writing to them does not change the file."""
        # Python's mmap would keep a file descriptor for every map, and its buffers could only be freed under the GIL.
        mapped: Any = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self._identity[1])
        if identity_of(self.path) != self._identity:
            raise CheckpointError(f"{self.path}: was replaced while it was read; open it again")
        self._mapped, self._read = mapped, 0
        return mapped

    def _describe(self, name: str) -> Lazy:
        kind, shape = self._table[name].dtype, self._table[name].shape
        if kind in FLOAT8:
            return Lazy(shape, WIDENED[FLOAT8[kind]], lambda: self._load(name).to(WIDENED[FLOAT8[kind]]))
        if kind not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {quote(name)} has dtype {kind}, which minidiff does not read")
        return Lazy(shape, DTYPES[kind], lambda: self._load(name))

    def _load(self, name: str) -> Tensor:
        mapped, told = self._mapped, self._table[name]
        if mapped is None:
            raise CheckpointError(f"{self.path}: tensor {quote(name)} was requested after the file was closed")
        try:
            # What was read stays in memory as long as its map does, and a float16 file would lie there whole beside its
            # float32 copy. A new map now and then lets go of the old one, unless tensors that were kept hold it; large
            # tensors have one of their own, since some of them are soon replaced (fast/packed.py).
            if self._read and self._read + told.end - told.start > FRESH_MAP:
                mapped = self._map()
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f"{self.path}: tensor {quote(name)} cannot be read ({one_line(e)})") from None
        self._read += told.end - told.start
        part = mapped[told.start : told.end]
        return torch.empty(0, dtype=STORED[told.dtype], device="cpu").set_(part).view(told.shape)

    def close(self) -> None:
        """Release the file. Tensors that were read stay valid."""
        self._mapped = None


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str],
    existing: Existing = "replace",
) -> str:
    """Write a safetensors file, one tensor at a time, atomically; return the content hash it carries.

    The hash is SHA-256 over the metadata, the table of tensors and their bytes, as 64 hex digits, under ``HASH_KEY``.
    ``existing``: treatment of an existing file, see :func:`~minidiff.storage.writing.atomic`.
    Raises :class:`CheckpointError` for a dtype that the format (or minidiff) does not have.
    """
    for name, t in tensors.items():
        if t.dtype not in NAMES:
            raise CheckpointError(f"{path}: tensor {quote(name)} has dtype {t.dtype}, which minidiff does not write")
    order = sorted(tensors, key=lambda n: (tensors[n].nbytes % ALIGNMENT != 0, -tensors[n].dtype.itemsize))
    table: dict[str, Any] = {"__metadata__": {**metadata, HEADER_KEY: BLANK, HASH_KEY: BLANK}}
    offset = 0
    for name in order:  # whole cache lines first, so that every large tensor starts at one
        t = tensors[name]
        table[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    header = put_hash(header, HEADER_KEY, hashlib.sha256(header).hexdigest())
    digest = hashlib.sha256(header)
    with atomic(path, existing) as file, ThreadPoolExecutor(max_workers=1) as beside:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            data = _bytes(name, tensors[name])
            hashed = beside.submit(
                digest.update, data
            )  # hashing and writing take about equally long, and run in parallel
            file.write(data)
            hashed.result()
        file.seek(8)
        file.write(put_hash(header, HASH_KEY, digest.hexdigest()))
    return digest.hexdigest()


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise :class:`CheckpointError` if the header of a file by :func:`write_tensors` was changed after writing.

    A changed digit in a config would silently give another model. Older files without this hash are accepted.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, os.path.getsize(path)))
    # Looked up in the parsed table, not in the bytes: a rewritten header still has its keys.
    told = (json.loads(header).get("__metadata__") or {}).get(HEADER_KEY)
    blank = put_hash(put_hash(header, HEADER_KEY, BLANK), HASH_KEY, BLANK)
    if told is not None and told != hashlib.sha256(blank).hexdigest():
        raise CheckpointError(f"{path}: its header is not what minidiff wrote; the file is damaged, get it again")


def content_hash(path: str | os.PathLike[str]) -> str:
    """Recompute the hash of a file that :func:`write_tensors` wrote, by reading all of it.

    Raises :class:`CheckpointError` for a file that is missing, or that carries no hash.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))  # a header cannot be longer than its file
        if _value(header, HASH_KEY) is None:
            raise CheckpointError(f"{path}: carries no content hash; it was not written by minidiff")
        digest = hashlib.sha256(put_hash(header, HASH_KEY, BLANK))
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _value(header: bytes, key: str) -> str | None:
    """Return the hash under ``key`` in a header's bytes, or None."""
    mark = f'"{key}":"'.encode()
    at = header.find(mark)
    return None if at < 0 else header[at + len(mark) :][:64].decode("ascii", "replace")


def put_hash(header: bytes, key: str, value: str) -> bytes:
    """Return a header's bytes with the hash under ``key``, if there is one, replaced."""
    mark = f'"{key}":"'.encode()
    at = header.find(mark)
    start = at + len(mark)
    return header if at < 0 else header[:start] + value.encode() + header[start + 64 :]


def _bytes(name: str, entry: Lazy) -> memoryview:
    tensor = entry.load()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        got, want = (tuple(tensor.shape), tensor.dtype), (entry.shape, entry.dtype)
        raise CheckpointError(f"tensor {quote(name)} turned out to be {got} instead of {want}")
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)
