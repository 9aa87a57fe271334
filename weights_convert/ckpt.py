"""Reading of pickled checkpoints (``.ckpt``, ``.bin``, ``.pt``) without running code from them.

``torch.save`` writes a zip archive that contains the pickle as ``data.pkl`` and one uncompressed record per storage.
Before torch 1.6 it wrote five pickles in sequence (a magic number, a version, the system, the object, the names of the
storages), followed by the storages. In both cases the pickle is read as data (``unpickle.py``), nothing in it is run,
and the file is mapped: a tensor's bytes are read when they are used.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.storage.files import NAMES, WIDENED, Lazy, lazy
from minidiff.storage.reading import HEAD, LONGEST_TEXT, MISTAKEN, content_of, open_regular
from minidiff.storage.table import refuse_scaled
from weights_convert.unpickle import Foreign, Storage, unpickle

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # contents of the first two of the five pickles
LOCAL_HEADER = struct.Struct("<4s22xHH")  # header of a zip record: magic, ..., lengths of name and extra field


def read_pickle(path: Path) -> tuple[dict[str, Lazy], list[str]]:
    """Return the tensors of a pickled checkpoint, mapped rather than read, and the names of its other entries.

    A wrapping ``state_dict`` is unwrapped. Other entries are those that are not tensors (``optimizer_states``,
    ``epoch``). Raises as :func:`read_object` does, and :class:`UnsupportedError` for quantized weights with scales.
    """
    found = read_object(path)
    others = []
    if isinstance(found.get("state_dict"), dict):
        others = [str(k) for k in found if k != "state_dict"]
        found = found["state_dict"]
    others += [str(k) for k, v in found.items() if not isinstance(v, Tensor)]
    foreign = next(((k, v.kind) for k, v in found.items() if isinstance(v, Foreign)), None)
    if foreign is not None:
        raise CheckpointError(f"{path}: tensor {quote(str(foreign[0]))} is {foreign[1]}, which minidiff does not read")
    refuse_scaled(path, (k for k in found if isinstance(k, str)))
    return {str(k): _lazy(path, str(k), v) for k, v in found.items() if isinstance(v, Tensor)}, others


def read_object(path: Path) -> dict[Any, Any]:
    """Return the dict that a pickle holds, unchanged.

    Raises :class:`CheckpointError` for a file that is missing, damaged or no pickle, or that contains an object other
    than tensors and those on the list of stand-ins, with its name; nothing in it is executed.
    """
    with open_regular(path) as file:
        head = file.read(HEAD)
        kind = content_of(head)
        readers: dict[str, Callable[[Path, BinaryIO], Any]] = {"torch zip": _zipped, "pickle": _legacy}
        if kind not in readers:
            what = MISTAKEN.get(kind, "no pickle of torch's")
            raise CheckpointError(f"{path}: is {what}")
        try:
            found = readers[kind](path, file)
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None
        except Exception as e:  # a damaged pickle or archive can raise anything
            raise CheckpointError(f"{path}: a damaged pickle ({type(e).__name__}: {str(e)[:200]})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected tensors by name")
    return found


def _lazy(path: Path, name: str, tensor: Tensor) -> Lazy:
    if tensor.dtype not in NAMES and tensor.dtype not in WIDENED:
        raise CheckpointError(f"{path}: tensor {quote(name)} is of {tensor.dtype}, which minidiff does not read")
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise CheckpointError(f"{path}: tensor {quote(name)} has strides {tensor.stride()}; the pickle is damaged")
    return lazy(tensor)


class _Map:
    """Mapped file with its storages: each has a key, a dtype and a size."""

    def __init__(self, path: Path, size: int, find: Callable[[str, int], int]) -> None:
        self.whole, self.size, self.find = torch.UntypedStorage.from_file(str(path), False, size), size, find
        self.found: dict[str, Storage] = {}

    def load(self, key: str, dtype: torch.dtype | None, count: int) -> Storage:
        """Return the storage with that key; ``find`` returns the offset of its bytes."""
        nbytes = count * (1 if dtype is None else dtype.itemsize)
        if key not in self.found:
            start = self.find(key, nbytes)
            if not 0 <= start <= start + nbytes <= self.size:
                raise CheckpointError(f"storage {quote(key)} of {nbytes:,} bytes is not in the file; it is damaged")
            self.found[key] = Storage(self.whole[start : start + nbytes], dtype, nbytes)
        if (self.found[key].dtype, self.found[key].nbytes) != (dtype, nbytes):
            raise CheckpointError(f"storage {quote(key)} is described in two ways; it is damaged")
        return self.found[key]


def _zipped(path: Path, file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {i.filename: i for i in archive.infolist()}
        packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1]
        if packed:  # torch.save never compresses, and a compressed record may have any size
            raise CheckpointError(f"{quote(packed[0])} in it is compressed; torch.save writes no such archive")
        inner = next((n for n in records if n.endswith("/data.pkl") or n == "data.pkl"), None)
        if inner is None:
            raise CheckpointError("a zip archive, but none that torch.save writes")
        root = inner.removesuffix("data.pkl")
        order = records.get(f"{root}byteorder")
        if order is not None and order.file_size < 16 and archive.read(order) != b"little":
            raise CheckpointError("its numbers are big-endian, which minidiff does not read")
        if records[inner].file_size > LONGEST_TEXT:
            raise CheckpointError(
                f"its pickle has {records[inner].file_size:,} bytes, and {LONGEST_TEXT:,} is the most"
            )
        program = io.BytesIO(archive.read(inner))

    def find(key: str, nbytes: int) -> int:
        record = records.get(f"{root}data/{key}")
        size = 0 if record is None else record.file_size
        if record is None or size != nbytes:
            raise CheckpointError(f"storage {quote(key)} of {nbytes:,} bytes has a record of {size:,}; it is damaged")
        file.seek(record.header_offset)
        magic, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        if magic != b"PK\x03\x04":
            raise CheckpointError(f"the record of storage {quote(key)} is damaged")
        return record.header_offset + LOCAL_HEADER.size + int(name) + int(extra)

    return unpickle(program, _Map(path, file.seek(0, io.SEEK_END), find).load)


def _legacy(path: Path, file: BinaryIO) -> Any:
    """Read the older format. The object precedes the storages, so it is read twice: for their sizes, then itself."""
    sizes: dict[str, int] = {}

    def note(key: str, dtype: torch.dtype | None, count: int) -> Storage:
        nbytes = count * (1 if dtype is None else dtype.itemsize)
        sizes[key] = nbytes
        entries[key] = count
        return Storage(None, dtype, nbytes)

    entries: dict[str, int] = {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first, version, system = (unpickle(data, note) for _ in range(3))
        little = isinstance(system, dict) and system.get("little_endian") is True
        if first != MAGIC or version != PROTOCOL or not little:
            raise CheckpointError("a pickle, but none that torch.save writes")
        begin = data.tell()
        unpickle(data, note)
        starts: dict[str, int] = {}
        for key in unpickle(data, note):
            (count,) = struct.unpack("<q", data.read(8))
            if key in starts or count != entries.get(key):
                raise CheckpointError(
                    f"storage {quote(key)} has {count:,} entries, and another number elsewhere; it is damaged"
                )
            starts[key] = data.tell()
            data.seek(starts[key] + sizes[key])
        data.seek(begin)
        return unpickle(data, _Map(path, len(data), lambda key, _: starts[key]).load)
