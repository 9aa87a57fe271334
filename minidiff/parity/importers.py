"""Recordings from other tools' files: ``.npz`` of numpy, dumps of a dict by torch.save, transformers' debugging tree.

None of them is executed: arrays of objects are refused, and of a pickle only tensors are built (``weights_only``). The
debugging tree of ``model_addition_debugger_context`` holds each tensor as it is printed: four digits, and of a large
tensor the first and last three along each dimension. Such a value is compared with the same corners of the other
side's, and the report says "slices only".
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minidiff.config import quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.parity.header import NAMES
from minidiff.parity.rows import INPUT
from minidiff.parity.values import Array, Source, Value, of_hash, open_recording, type_of, value_of
from minidiff.parity.writer import DTYPES
from minidiff.storage.reading import PICKLES, content_of, open_regular, read_json
from minidiff.storage.table import read_table

LONGEST_TREE = 1 << 30  # bytes of a debugging tree; text, of which a large model's has some 100 MB
EDGE = 3  # entries that torch prints at either end of a dimension
MOST_PRINTED = 1000  # entries of a tensor that torch prints whole
DAMAGED = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
DEEPEST = 200  # nesting of modules
NUMBERS = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan)|True|False|\.\.\.", re.IGNORECASE)


def open_source(thing: Any) -> Source:
    """Open a recording, or another tool's file as one, by its content; a :class:`~minidiff.parity.Recording` is taken
    as it is.

    Raises :class:`CheckpointError` for a file that is missing, damaged, or none of these.
    """
    if hasattr(thing, "tape"):
        computed = str(thing.run.get("dtype", ""))
        values = {stage: value_of(value, computed) for stage, value in thing.tape.items()}
        return Source(thing.title, thing.run, values | {name: of_hash(entry) for name, entry in thing.hashes.items()})
    path = Path(thing)
    with open_regular(path) as file:
        head = file.read(512)
        kind = content_of(head)
        if kind == "torch zip":
            file.seek(0)
            kind = "npz" if _is_npz(file) else kind  # type: ignore[assignment]
    if kind == "npz":  # type: ignore[comparison-overlap]
        return _npz(path)
    if kind in PICKLES:
        return _dump(path)
    return _tree(path) if head.lstrip()[:1] in (b"{", b"[") else open_recording(path)


def _is_npz(file: Any) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return False


def _npz(path: Path) -> Source:
    """Open a file of ``numpy.savez``; its arrays, in their order, are the stages."""
    values = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            stage = info.filename.removesuffix(".npy")
            try:
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2_0
                    shape, backwards, dtype = read(file)
                    start = file.tell()
            except DAMAGED as e:
                raise CheckpointError(f"{path}: array {quote(stage)} cannot be read ({_said(e)})") from None
            name = "bfloat16" if dtype == np.dtype("V2") else dtype.name  # as ml_dtypes' is written
            if name not in DTYPES:
                raise CheckpointError(f"{path}: array {quote(stage)} is of {dtype}, which recordings do not have")
            if any(n < 0 for n in shape) or start + math.prod(shape) * dtype.itemsize != info.file_size:
                raise CheckpointError(f"{path}: array {quote(stage)} has shape {quote(shape)}, and other bytes")
            values[stage] = Value(tuple(shape), name, _reader(path, info.filename, start, dtype, shape, backwards))
    return Source(f"numpy ({path.name})", {}, _some(path, values))


def _header_2_0(file: Any) -> Any:
    return np.lib.format.read_array_header_2_0(file)


def _reader(
    path: Path, name: str, start: int, dtype: Any, shape: tuple[int, ...], backwards: bool
) -> Callable[[int, int], Array]:
    """Return the reader of an array, which is kept while its pieces are asked for one after the other."""
    kept: list[Array] = []

    def read(first: int, count: int) -> Array:
        if not kept:
            try:
                with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                    file.seek(start)
                    raw = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
            except DAMAGED as e:
                stage = name.removesuffix(".npy")
                raise CheckpointError(f"{path}: array {quote(stage)} cannot be read ({_said(e)})") from None
            array = raw.reshape(shape[::-1]).T if backwards else raw.reshape(shape)
            narrow = array.view(np.uint16) if dtype.itemsize == 2 and dtype.kind == "V" else array
            kept.append(np.asarray(narrow, order="C", dtype=narrow.dtype.newbyteorder("=")).reshape(-1))
        part = kept[0][first : first + count]
        if first + count >= math.prod(shape):
            kept.clear()
        return part

    return read


def _dump(path: Path) -> Source:
    """Open a dict of tensors by ``torch.save``; nested dicts and lists become names with slashes."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError(f"{path}: a file by torch.save, which needs torch; write a recording instead") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle or archive can raise anything
        raise CheckpointError(f"{path}: not a dump of tensors alone ({_said(e)[:200]})") from None
    values = {}
    for name, tensor in _tensors(found, "", 0, torch.Tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in DTYPES or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: tensor {quote(name)} is {kind}, {tensor.layout}; dump it dense and real")
        values[name] = value_of(tensor)
    return Source(f"PyTorch ({path.name})", {}, _some(path, values))


def _tensors(found: Any, name: str, depth: int, kind: type) -> Iterator[tuple[str, Any]]:
    if isinstance(found, kind):
        yield name or "output", found
    elif depth < DEEPEST and isinstance(found, (Mapping, list, tuple)):
        inner = found.items() if isinstance(found, Mapping) else enumerate(found)
        for key, value in inner:
            yield from _tensors(value, f"{name}/{key}" if name else str(key), depth + 1, kind)


def _tree(path: Path) -> Source:
    """Open the debugging tree of transformers (``..._debug_tree_FULL_TENSORS.json``)."""
    tree = read_json(path, LONGEST_TREE)
    if not isinstance(tree, dict) or not isinstance(tree.get("module_path"), str):
        raise CheckpointError(f"{path}: JSON, but not the debugging tree of transformers; no recording")
    values: dict[str, Value] = {}
    _walk(path, tree, values, 0)
    slices = any(value.whole for value in values.values())
    title = f"transformers' debugging tree of {tree['module_path']}"
    return Source(f"{title}, slices only" if slices else title, {}, _some(path, values))


def _walk(path: Path, node: Any, values: dict[str, Value], depth: int) -> None:
    if not isinstance(node, dict) or depth > DEEPEST:
        return
    module = str(node.get("module_path", "")).partition(".")[2]
    stage = module or "output"
    for key, ending in (("inputs", INPUT), ("outputs", "")):
        told = _first(node.get(key), 0)
        value = None if told is None else _printed(path, f"{stage}{ending}", told)
        if value is not None and module + ending:
            name, count = f"{stage}{ending}", 1
            while name in values:
                count += 1
                name = f"{stage}#{count}{ending}"
            values[name] = value
        if key == "inputs":
            children = node.get("children") or []
            if not isinstance(children, list):
                inside = f"the children of {quote(stage)} are {quote(children)}, and should be a list"
                raise CheckpointError(f"{path}: {inside}; write the tree again")
            for child in children:
                _walk(path, child, values, depth + 1)


def _first(told: Any, depth: int) -> dict[str, Any] | None:
    """Return the description of the first tensor in nested inputs or outputs."""
    if isinstance(told, dict) and isinstance(told.get("shape"), str) and "dtype" in told:
        return told
    inner = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    found = (_first(one, depth + 1) for one in inner if depth < DEEPEST)
    return next((one for one in found if one is not None), None)


def _printed(path: Path, stage: str, told: dict[str, Any]) -> Value | None:
    """Return a tensor of the tree; None if the tree has only its statistics."""
    shape = tuple(int(n) for n in re.findall(r"\d{1,18}", told["shape"])[:16])
    dtype = str(told["dtype"]).removeprefix("torch.")
    value = told.get("value")
    if isinstance(value, str) and value.endswith(".safetensors"):
        name = value.removeprefix("./")
        if os.path.basename(name) != name:
            raise CheckpointError(f"{path}: stage {quote(stage)} lies in {quote(value)}, outside of the tree's folder")
        return _beside(path.parent / name)
    if not isinstance(value, list):
        return None
    text = " ".join(line for line in value if isinstance(line, str))
    text = re.sub(r"(, (dtype|device|grad_fn|size|requires_grad)=.*)?\)\s*$", "", text.removeprefix("tensor("))
    printed = [word for word in NUMBERS.findall(text) if word != "..."]
    held = tuple(min(n, 2 * EDGE) for n in shape) if math.prod(shape) > MOST_PRINTED else shape
    if len(printed) != math.prod(held):
        raise CheckpointError(
            f"{path}: stage {quote(stage)} has shape {quote(shape)}, of which {math.prod(held)} numbers are printed, "
            f"and lists {len(printed)}"
        )
    numbers = [{"True": 1.0, "False": 0.0}.get(word) if word[0] in "TF" else float(word) for word in printed]
    array = np.array(numbers, dtype=np.float64).reshape(held)
    whole = shape if held != shape else None
    flat = array.reshape(-1)
    return Value(held, "float64", lambda start, count: flat[start : start + count], dtype, whole=whole)


def _beside(path: Path) -> Value:
    """Return the tensor "data" of a safetensors file."""
    place = read_table(path).places.get("data")
    if place is None:
        raise CheckpointError(f"{path}: holds no tensor called 'data'")
    if place.dtype not in NAMES:
        raise CheckpointError(f"{path}: tensor 'data' has dtype {place.dtype}, which recordings do not have")
    with open_regular(path) as file:
        file.seek(place.start)
        raw = np.frombuffer(file.read(place.end - place.start), type_of(NAMES[place.dtype]))
    return Value(place.shape, NAMES[place.dtype], lambda start, count: raw[start : start + count])


def _some(path: Path, values: dict[str, Value]) -> dict[str, Value]:
    if not values:
        raise CheckpointError(f"{path}: holds no tensors")
    return values


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a map of names, a JSON object {first recording's name: second's}. Raises :class:`CheckpointError`."""
    found = json.loads(json.dumps(read_json(path)))
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{path}: should be a JSON object of names, {{first recording's: second's}}")
    if len(set(found.values())) < len(found):
        raise CheckpointError(f"{path}: gives one stage of the second recording to two of the first")
    return found
