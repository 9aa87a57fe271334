"""Safetensors files whose tensors are written while they are made, for what does not fit into memory.

The format begins with a header that lists all tensors, which nobody knows before the last one is there. So room is left
for it, and what it does not need is filled with spaces, which the format allows; a short file is moved up instead.

Another thread writes, so that a computation goes on while the disk takes what it made. Between the two lie a few
buffers, used again and again, since fresh memory costs four times the copy; where none is left, the computation waits.
Under Linux the disk takes the bytes from there (O_DIRECT): the copy into the system's cache would cost the computation
more time than the disk needs, and drive the model's weights out of memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.storage.files import ALIGNMENT, BLANK, HEADER_KEY, NAMES, WIDENED, put_hash
from minidiff.storage.writing import Existing, Part, atomic

if sys.platform == "linux":
    import fcntl

SOME_KEY = "minidiff.some"  # hash of some bytes of every tensor, so that files with other tensors have other headers
ROOM = 1 << 20  # bytes that are left for the header; like the next one a multiple of the disk's blocks
CHUNK, BUFFERS = 16 << 20, 48  # bytes of a buffer, and how many there are
SHORT = 64 << 20  # bytes of a file that is moved up to its header
PIECE, PIECES = 1 << 12, 16  # bytes, and about how many of a tensor are hashed


class Stream:
    """A safetensors file that is being written. ``beside``: one thread, which writes."""

    def __init__(self, file: Part, beside: ThreadPoolExecutor) -> None:
        self.file, self.room, self._beside = file, ROOM, beside
        self.table: dict[str, Any] = {}
        self.size = 0
        self._some = hashlib.sha256()
        self._odd: dict[str, Tensor] = {}
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        self._made = self._filled = 0
        self._error: BaseException | None = None
        self._buffer = self._next()
        file.raw.seek(self.room)
        _directly(file, True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. It may be changed afterwards.

        Raises :class:`CheckpointError` for a name that was there before, and for a dtype that the format (or minidiff)
        does not have; OSError if an earlier tensor could not be written.
        """
        if name in self.table or name in self._odd:
            raise CheckpointError(f"tensor {quote(name)} is written twice")
        dtype = WIDENED.get(tensor.dtype, tensor.dtype)
        if dtype not in NAMES:
            raise CheckpointError(f"tensor {quote(name)} has dtype {dtype}, which minidiff does not write")
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if tensor.nbytes % ALIGNMENT:  # at the end, so that every large tensor begins at a cache line
            self._odd[name] = tensor.clone()
        else:
            self._put(name, tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what is left, and the header."""
        for name, tensor in sorted(self._odd.items(), key=lambda entry: -entry[1].dtype.itemsize):
            self._put(name, tensor)
        self._beside.submit(self._check).result()  # after all that was to be written
        _directly(self.file, False)
        self._write_all(self._buffer, self._filled)
        told = {**metadata, HEADER_KEY: BLANK, SOME_KEY: self._some.hexdigest()}
        header = json.dumps({"__metadata__": told, **self.table}, separators=(",", ":")).encode()
        start = 8 + len(header)
        start += -start % ALIGNMENT
        if start <= self.room and self.size > SHORT:
            start = self.room
        self._move(start)
        header += b" " * (start - 8 - len(header))
        header = put_hash(header, HEADER_KEY, hashlib.sha256(header).hexdigest())
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.file.truncate(start + self.size)

    def _put(self, name: str, tensor: Tensor) -> None:
        end = self.size + tensor.nbytes
        offsets = [self.size, end]
        self.table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self.size = end
        data = tensor.reshape(-1).view(torch.uint8)
        many = len(data) // (PIECE * PIECES)
        some = data[: len(data) // PIECE * PIECE].view(-1, PIECE)[::many].contiguous().view(-1) if many else data
        self._some.update(_view(some))
        while len(data):
            part = data[: CHUNK - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled, data = self._filled + len(part), data[len(part) :]
            if self._filled == CHUNK:
                self._beside.submit(self._write, self._buffer)
                self._buffer, self._filled = self._next(), 0

    def _next(self) -> Tensor:
        """Return a free buffer; wait for one if all are waiting for the disk."""
        if self._free.empty() and self._made < BUFFERS:
            self._made += 1
            return torch.frombuffer(mmap.mmap(-1, CHUNK), dtype=torch.uint8)  # whose address fits for O_DIRECT
        found = self._free.get()
        self._check()
        return found

    def _write(self, buffer: Tensor) -> None:
        try:
            if self._error is None:
                self._write_all(buffer, CHUNK)
        except BaseException as e:
            self._error = e
        self._free.put(buffer)

    def _write_all(self, buffer: Tensor, size: int) -> None:
        data = _view(buffer[:size])
        while data:
            try:
                data = data[self.file.raw.write(data) :]
            except OSError as e:
                if e.errno != errno.EINVAL or not _directly(self.file, False):  # file systems may refuse it so late
                    raise

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _move(self, start: int) -> None:
        """Let the tensors begin at ``start``, a chunk at a time, from the end that does not overwrite another."""
        chunks = range(math.ceil(self.size / CHUNK))
        for k in () if start == self.room else chunks if start < self.room else reversed(chunks):
            self.file.seek(self.room + k * CHUNK)
            data = self.file.read(min(CHUNK, self.size - k * CHUNK))
            self.file.seek(start + k * CHUNK)
            self.file.write(data)


@contextmanager
def streamed(path: str | os.PathLike[str], existing: Existing = "replace") -> Iterator[Stream]:
    """Open a safetensors file to be written tensor by tensor; it must be finished (:meth:`Stream.finish`) in the end.

    It appears under its name whole or not at all. ``existing``, and the errors: see
    :func:`~minidiff.storage.writing.atomic`.
    """
    with atomic(path, existing) as file, ThreadPoolExecutor(max_workers=1) as beside:
        try:
            yield Stream(file, beside)
        except BaseException:
            beside.shutdown(cancel_futures=True)
            raise


def _directly(file: Part, on: bool) -> bool:
    """Let writes pass by the system's cache, if it can do that, or no longer; return True if they did the other."""
    if sys.platform == "linux":
        with suppress(OSError):
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
            return bool(flags & os.O_DIRECT) != on
    return False


def _view(data: Tensor) -> memoryview:
    found: Any = data.numpy()
    return memoryview(found)
