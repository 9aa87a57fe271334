# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the minidiff authors. This file may be copied into any project, as it is.
"""Writer of recordings that needs numpy alone: one file, to be copied beside the program that is to be compared.

    with Writer("mine.safetensors", "my port", version="1.2", layout="NHWC", steps=4) as recording:
        recording.add("start/x", x)
        recording.add("step.0/unet/conv_in", y)             # in the order of computation
        recording.add("step.0/x", z, computed="bfloat16")   # stored wider than it was computed

The file appears under its name when the ``with`` block ends, and not at all if it ends by an error. Values pass through
a temporary file beside it, so a long recording takes no memory. SPECIFICATION.md, beside this file in minidiff,
describes the format, and ``minidiff parity compare`` compares two of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from types import TracebackType
from typing import Any

import numpy as np

VERSION = "2"
# Names of dtypes, and what safetensors calls them.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
LAYOUTS = ("NCHW", "NHWC", "plain")


class Writer:
    """A recording that is being written.

    ``program`` and ``version`` name the producer. ``layout``: the layout of 4-dimensional floats, "NCHW" or "NHWC".
    ``dtype``: the dtype that the program computes in, if all stages have the same. Everything else describes the run
    (``prompt="a fox", steps=4, sampler="ddim", ...``) and must be what JSON can hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        program: str,
        *,
        version: str | None = None,
        layout: str = "NCHW",
        dtype: str | None = None,
        **run: Any,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
        self.path, self.layout = os.path.abspath(path), layout
        self.run: dict[str, Any] = {"program": program, **run}
        for key, value in (("version", version), ("dtype", dtype), ("layout", layout if layout != "NCHW" else None)):
            if value is not None:
                self.run[key] = value
        self.stages: list[str | dict[str, Any]] = []
        self.names: set[str] = set()
        self.table: dict[str, Any] = {}
        self.size = 0
        self.data: Any = tempfile.TemporaryFile(dir=os.path.dirname(self.path))  # noqa: SIM115

    def add(
        self,
        stage: str,
        value: Any,
        *,
        layout: str | None = None,
        computed: str | None = None,
        stored: str | None = None,
        hashed: bool = False,
    ) -> None:
        """Add the value of a stage: anything that ``numpy.asarray`` takes, on the host.

        ``layout``: where it is not that of the recording. ``computed``: the dtype it was computed in, where that is
        neither the recording's nor the one it is stored in. ``stored="bfloat16"``: the value holds the 16 bits of each
        number, as uint16. ``hashed``: keep only a hash, which tells if two values are equal, but not how far apart.
        """
        if not stage or stage == "__metadata__" or stage in self.names:
            raise ValueError(f"stage {stage!r}: the name is empty, reserved, or was added before")
        array = np.asarray(value)
        dtype = array.dtype.name if stored is None else stored
        if dtype not in DTYPES or (stored is not None and array.dtype.itemsize != (2 if stored == "bfloat16" else 0)):
            raise ValueError(f"stage {stage!r}: {array.dtype} as {dtype} is not stored; widen it to float32 or int64")
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        entry: dict[str, Any] = {"name": stage}
        if layout is not None and layout != self.layout:
            if layout not in LAYOUTS or (layout != "plain" and array.ndim != 4):
                raise ValueError(f"stage {stage!r}: layout={layout!r} does not fit the shape {array.shape}")
            entry["layout"] = layout
        if computed is not None:
            entry["computed"] = computed
        if hashed:
            floats = dtype.endswith(("float64", "float32", "float16"))
            if array.ndim == 4 and floats and entry.pop("layout", self.layout) == "NHWC":
                array = array.transpose(0, 3, 1, 2)
            entry.update(shape=list(array.shape), dtype=dtype, sha256=hashlib.sha256(_bytes(array)).hexdigest())
        else:
            data = _bytes(array)
            self.data.write(data)
            self.table[stage] = {
                "dtype": DTYPES[dtype],
                "shape": list(array.shape),
                "data_offsets": [self.size, self.size + len(data)],
            }
            self.size += len(data)
        self.names.add(stage)
        self.stages.append(entry if len(entry) > 1 else stage)

    def close(self) -> None:
        """Write the file under its name, replacing one that was there."""
        metadata = {
            "recording.version": VERSION,
            "recording.stages": json.dumps(self.stages),
            "recording.run": json.dumps(self.run),
        }
        header = json.dumps({"__metadata__": metadata, **self.table}, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % 64)
        folder, name = os.path.split(self.path)
        part = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.part")
        try:
            with open(part, "xb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                self.data.seek(0)
                shutil.copyfileobj(self.data, file, 1 << 20)
            os.replace(part, self.path)
        except BaseException:
            if os.path.exists(part):
                os.unlink(part)
            raise
        finally:
            self.data.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.data.close()


def _bytes(array: Any) -> memoryview:
    flat: Any = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    return memoryview(flat)
