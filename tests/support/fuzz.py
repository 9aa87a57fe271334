"""Damaged and hostile checkpoints, by the thousand: what a reader of strangers' files must live with.

A case is a number. It picks one of the small sound checkpoints of :func:`sources`, damages it in one of the ways below
with a generator seeded by that number, and :func:`verdict` reads what came out. Four ends are allowed: the file is
refused with one of minidiff's errors; it reads as the very model that it was; only weights differ, and only because
bits of weights were changed, which a layout without a hash cannot tell; or an adapter differs likewise.

What no reader can tell is left out: a float16 tensor said to be bfloat16.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import weights_convert
from minidiff.errors import MinidiffError
from minidiff.storage import checkpoint
from tests.support.convert_sources import OVERRIDE, original_tensors, write_folder
from tests.support.tiny import SD, tiny_sd
from weights_convert import read_embedding, read_lora

Random = np.random.Generator


class Case(NamedTuple):
    """One damaged file: what was done, and whether only the bytes of weights were touched."""

    source: str
    how: str
    data: bytes
    weights_only: bool


class Mark:
    """Unpickled by a careless reader, it makes a file: the proof that something ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def sources(folder: Path) -> dict[str, Path]:
    """Small sound checkpoints of every layout, written to ``folder``."""
    found = {
        name: folder / name for name in ("minidiff.safetensors", "original.safetensors", "zip.ckpt", "legacy.ckpt")
    }
    tiny_sd().save(found["minidiff.safetensors"])
    tensors = original_tensors()
    safetensors.torch.save_file(tensors, found["original.safetensors"])
    torch.save({"state_dict": tensors, "epoch": 3}, found["zip.ckpt"])
    torch.save({"state_dict": tensors}, found["legacy.ckpt"], _use_new_zipfile_serialization=False)
    found["float8.safetensors"] = folder / "float8.safetensors"
    narrow = {k: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for k, t in tensors.items()}
    safetensors.torch.save_file(narrow, found["float8.safetensors"])
    write_folder(folder / "folder")
    found["folder"] = folder / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = {f"{name}.lora_A.weight": torch.ones(3, 16), f"{name}.lora_B.weight": torch.ones(16, 3)}
    found["lora.safetensors"] = folder / "lora.safetensors"
    safetensors.torch.save_file(adapter, found["lora.safetensors"])
    found["word.pt"] = folder / "word.pt"
    torch.save({"<cat>": torch.ones(2, 16)}, found["word.pt"])
    return found


class Base:
    """The sound files in a folder, and what they read as: case k damages the (k modulo their count)-th of them."""

    def __init__(self, folder: Path) -> None:
        self.paths = sources(folder)
        self.data = {name: path.read_bytes() for name, path in self.paths.items()}
        self.sound = {name: read(name, path) for name, path in self.paths.items()}
        self.mark = folder / "a program was run"
        self.folder = folder

    def damaged(self, number: int) -> Case:
        """Case ``number``."""
        name = list(self.paths)[number % len(self.paths)]
        rng = np.random.default_rng(number)
        ways = SAFETENSORS if name.endswith(".safetensors") or name == "folder" else PICKLES
        how = str(rng.choice(list(ways)))
        return Case(name, how, *ways[how](self.data[name], rng, self.mark))

    def try_case(self, number: int) -> tuple[Case, str]:
        """Case ``number`` and its :func:`verdict`."""
        case = self.damaged(number)
        inside = case.source == "folder"  # a file among others: damaged in its place, and mended again
        path = self.paths[case.source] if inside else self.folder / f"damaged{self.paths[case.source].suffix}"
        try:
            end = verdict(case, path, self.sound[case.source])
        finally:
            if inside:
                path.write_bytes(self.data[case.source])
        if self.mark.exists():
            self.mark.rmdir()
            return case, "a program was run"
        return case, end


# --- what is done to any file ----------------------------------------------------------------------------------------


def truncate(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    return data[: int(rng.integers(len(data)))], False


def grow(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    return data + rng.bytes(int(rng.integers(1, 4096))), False


def zero_a_run(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 600))
    out = data[:at] + bytes(len(data[at : at + n])) + data[at + n :]
    return out, in_weights(data, at)


def flip_anywhere(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    out, at = bytearray(data), int(rng.integers(len(data)))
    out[at] ^= 1 << int(rng.integers(8))
    return bytes(out), in_weights(data, at)


def flip_in_front(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    """Where the header or the pickle's instructions are."""
    end = body(data) if looks_like_safetensors(data) else min(len(data), 40_000)
    out, at = bytearray(data), int(rng.integers(end))
    for _ in range(int(rng.integers(1, 4))):
        out[at] ^= 1 << int(rng.integers(8))
        at = min(at + int(rng.integers(1, 9)), end - 1)
    return bytes(out), not looks_like_safetensors(data) and in_weights(data, at)


def looks_like_safetensors(data: bytes) -> bool:
    return len(data) > 9 and data[8:9] == b"{"


def body(data: bytes) -> int:
    """Where a safetensors file's weights begin."""
    return 8 + int.from_bytes(data[:8], "little")


def in_weights(data: bytes, at: int) -> bool:
    """Whether a byte belongs to weights. A zip of torch's guards them by checksums that torch does not look at."""
    return at >= body(data) if looks_like_safetensors(data) else True


# --- what is done to safetensors -------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any], Random], Any]) -> Callable[[bytes, Random, Path], tuple[bytes, bool]]:
    """A way that rewrites the table of tensors and keeps the rest."""

    def way(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
        table = json.loads(data[8 : body(data)])
        told = change(table, rng)
        text = told if isinstance(told, bytes) else json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data[body(data) :], False

    return way


def entry(table: dict[str, Any], rng: Random) -> dict[str, Any]:
    names = [name for name in table if name != "__metadata__"]
    found: dict[str, Any] = table[names[int(rng.integers(len(names)))]]
    return found


def wrong_dtype(table: dict[str, Any], rng: Random) -> None:
    e = entry(table, rng)
    e["dtype"] = str(
        rng.choice(
            [d for d in ("F64", "F16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "x", "") if d != e["dtype"]]
        )
    )


def wrong_shape(table: dict[str, Any], rng: Random) -> None:
    e = entry(table, rng)
    shape = e["shape"]
    e["shape"] = [[*shape, 1], [*shape[::-1], 1], shape[1:], [-1, *shape], [2**62, *shape], ["a"], 7, None][
        int(rng.integers(8))
    ]


def wrong_offsets(table: dict[str, Any], rng: Random) -> None:
    e, other = entry(table, rng), entry(table, rng)
    a, b = e["data_offsets"]
    lies = [
        [a - 4, b - 4],
        [a + 4, b + 4],
        [b, a],
        [a, 2**63],
        [-4, b],
        other["data_offsets"],
        [a, b, b],
        [a],
        "ab",
        [0.5, b],
    ]
    lie = lies[int(rng.integers(len(lies)))]
    e["data_offsets"] = [a - 4, b - 4] if lie == [a, b] else lie


def missing_entry(table: dict[str, Any], rng: Random) -> None:
    del table[str(rng.choice([name for name in table if name != "__metadata__"]))]


def renamed_entry(table: dict[str, Any], rng: Random) -> None:
    name = str(rng.choice([name for name in table if name != "__metadata__"]))
    new = [name + ".x", "", name[::-1], "a" * 100_000, "\x00", "../../" + name][int(rng.integers(6))]
    table[new] = table.pop(name)


def odd_json(table: dict[str, Any], rng: Random) -> bytes:
    deep = 200_000
    return [
        b"[" * deep + b"]" * deep,
        b'{"a":' * deep + b"1" + b"}" * deep,
        b"{}",
        b"null",
        b'{"__metadata__":{"a":1}}',
        b'{"a":1e999}',
        b"\xff\xfe{}",
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 100_000 + b'1],"data_offsets":[0,4]}}',
        b"",
    ][int(rng.integers(9))]


def odd_metadata(table: dict[str, Any], rng: Random) -> None:
    given = table.get("__metadata__", {})
    lies: list[Any] = [
        {"minidiff.version": "1"},
        {"minidiff.version": "1", "minidiff.config": "["},
        {"a": 1},
        [],
        None,
        {"a": "b" * 10**6},
    ]
    lie = lies[int(rng.integers(len(lies)))]
    table["__metadata__"] = {**given, **lie} if isinstance(lie, dict) else lie


def other_config(table: dict[str, Any], rng: Random) -> None:
    """Another number somewhere in minidiff's own config; of another layout, in the table."""
    given = table.get("__metadata__") or {}
    if "minidiff.config" in given:
        digits = [i for i, c in enumerate(given["minidiff.config"]) if c.isdigit()]
        at = digits[int(rng.integers(len(digits)))]
        old = given["minidiff.config"]
        given["minidiff.config"] = old[:at] + str((int(old[at]) + int(rng.integers(1, 9))) % 10) + old[at + 1 :]
    else:
        wrong_shape(table, rng)


def lying_config(table: dict[str, Any], rng: Random) -> None:
    """A number in minidiff's own config that no model has, under a header that is said to be whole."""
    given = table.get("__metadata__") or {}
    if "minidiff.config" not in given:
        return wrong_shape(table, rng)
    for key in ("minidiff.header", "minidiff.hash"):
        given.pop(key, None)
    config = json.loads(given["minidiff.config"])
    places = [(at, key) for at in inside(config) for key in keys_of(at) if type(at[key]) in (int, float)]
    at, key = places[int(rng.integers(len(places)))]
    lies: list[Any] = [2**63, -(10**30), 10**400, float("nan"), "9", {}, [[]], [0] * 100, -1e308]
    at[key] = lies[int(rng.integers(len(lies)))]
    given["minidiff.config"] = json.dumps(config)
    return None


def inside(found: Any) -> list[Any]:
    """Every object and short list in parsed JSON."""
    below = [found[key] for key in keys_of(found)]
    return [found, *(x for b in below for x in inside(b))] if isinstance(found, (dict, list)) else []


def keys_of(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return list(found)
    return list(range(len(found))) if isinstance(found, list) and len(found) < 100 else []


def wrong_length(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    lies = [0, 1, body(data) - 9, body(data) - 7, len(data), len(data) - 8, 2**31, 2**62, 2**64 - 1]
    return struct.pack("<Q", lies[int(rng.integers(len(lies)))]) + data[8:], False


# --- what is done to pickles -----------------------------------------------------------------------------------------


def hostile(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    """A pickle that makes a folder when it is run, alone or in the place of a zip's own."""
    protocol = int(rng.integers(0, 5))
    program = pickle.dumps({"state_dict": Mark(mark), "a": torch.ones(1)}, protocol=protocol)
    if rng.integers(2) or not zipfile.is_zipfile(io.BytesIO(data)):
        return program, False
    return rezipped(data, {"data.pkl": program}), False


def opcodes(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    """Instructions put in front of, or in the place of, the real ones."""
    call = b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR."
    code = [
        call,
        b"\x80\x02" + call,
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(str(mark))]) + str(mark).encode() + b"\x85R.",
        b"(i" + b"os\nsystem\n.",
        b"\x80\x02" + b"(" * 200_000 + b".",
        b"\x80\x02" + b"]" + b"]a" * 100_000 + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"\x80\x02X" + struct.pack("<I", 2**31) + b"abc",
        b"\x80\x02" + b"]q\x00" + b"h\x00h\x00e" * 50_000 + b".",
        b"",
    ][int(rng.integers(10))]
    if rng.integers(2) and zipfile.is_zipfile(io.BytesIO(data)):
        return rezipped(data, {"data.pkl": code}), False
    return code, False


def foreign_memory(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    """Tensors over bytes that are not in the file, and keys whose hash takes for ever."""
    name = [
        b"torch\nFloatTensor",
        b"torch\nTensor",
        b"torch.storage\nUntypedStorage",
        b"torch._utils\n_rebuild_parameter",
    ]
    made = b"c" + name[int(rng.integers(len(name)))] + b"\n"
    deep = b")" + b"q\0h\0\x86" * int(rng.integers(60, 3000))
    text = b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
    count = int(rng.integers(2**31, 2**62))
    far = b"ctorch._utils\n_rebuild_tensor_v2\n((" + text + b"\x8a\x08" + struct.pack("<q", count) + b"tQK\0"
    code = [
        b"\x80\2}X\1\0\0\0a" + made + b"K\4\x85Rs.",
        b"\x80\2}X\1\0\0\0a" + made + b"K\4\x85\x81s.",
        b"\x80\2}" + deep + b"Ns.",
        b"\x80\2}X\1\0\0\0ctorch\nSize\n" + deep + b"\x85Rs.",
        b"\x80\2}X\1\0\0\0a" + far + b"K\4\x85K\1\x85\x89}tRs.",
        b"\x80\2}X\1\0\0\0a" + far + deep + deep + b"\x89}tRs.",
        b"\x80\4" + deep + deep + b"\x93.",
    ][int(rng.integers(7))]
    if rng.integers(2) and zipfile.is_zipfile(io.BytesIO(data)):
        return rezipped(data, {"data.pkl": code}), False
    return code, False


def short_record(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    """A storage of which a part, or more than all, is in the archive."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data[: -int(rng.integers(1, 40))], False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n for n in archive.namelist() if "/data/" in n]
        name = names[int(rng.integers(len(names)))]
        content = archive.read(name)
    content = content[: -int(rng.integers(1, 9))] if rng.integers(2) else content + b"\0" * int(rng.integers(1, 9))
    return rezipped(data, {name.partition("/")[2]: content}), False


def bomb(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    """A few kilobytes that unpack to half a gigabyte: as the pickle, as a tensor, as something nobody asked for."""
    which = ("data.pkl", "data/0", "extra")[int(rng.integers(3))]
    return BOMBS[which], False


def missing_record(data: bytes, rng: Random, mark: Path) -> tuple[bytes, bool]:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data[::-1], False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [n for n in archive.namelist() if "/data" in n]
    return rezipped(data, {names[int(rng.integers(len(names)))].partition("/")[2]: None}), False


def rezipped(data: bytes, changes: dict[str, bytes | None]) -> bytes:
    """A zip of torch's with records replaced, or left out where the new content is None."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            inner = name.partition("/")[2]
            content = changes.get(inner, old.read(name)) if inner in changes else old.read(name)
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def _bomb(which: str) -> bytes:
    plain = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(4)}}, plain)
    out = io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in old.namelist():
            inner = name.partition("/")[2]
            new.writestr(name, bytes(500_000_000) if inner == which else old.read(name))
        if which == "extra":
            new.writestr("archive/extra", bytes(500_000_000))
    return out.getvalue()


class _Bombs(dict[str, bytes]):
    def __missing__(self, which: str) -> bytes:
        self[which] = _bomb(which)
        return self[which]


BOMBS = _Bombs()
ANY = {f.__name__: f for f in (truncate, grow, zero_a_run, flip_anywhere, flip_in_front)}
TABLE = (
    wrong_dtype,
    wrong_shape,
    wrong_offsets,
    missing_entry,
    renamed_entry,
    odd_json,
    odd_metadata,
    other_config,
    lying_config,
)
SAFETENSORS = ANY | {f.__name__: header(f) for f in TABLE} | {"wrong_length": wrong_length}
PICKLES = ANY | {f.__name__: f for f in (hostile, opcodes, bomb, missing_record, foreign_memory, short_record)}


# --- what became of it -----------------------------------------------------------------------------------------------


def read(name: str, path: Path) -> tuple[str, dict[str, Tensor]]:
    """Everything that minidiff makes of a file: its config as text, and all tensors, checked as conversion does."""
    if name == "lora.safetensors":
        adapter = read_lora(path, SD)
        return "", {f"{k}.{half}": getattr(u, half) for k, u in adapter.updates.items() for half in ("down", "up")}
    if name == "word.pt":
        word = read_embedding(path, SD)
        return word.name, dict(word.vectors)
    source = path.parent.parent if name == "folder" else path
    target = path.with_name("out.safetensors")
    override = None if name in ("folder", "minidiff.safetensors") else OVERRIDE
    weights_convert.convert(source, target, config=override)
    found = checkpoint.open_checkpoint(target)
    try:
        return str(found.config), {k: t.load().clone() for k, t in found.file.lazy.items()}
    finally:
        found.file.close()


def verdict(case: Case, path: Path, sound: tuple[str, dict[str, Tensor]]) -> str:
    """ "refused", "equal" or "weights"; anything else is a fault of ours, in words. ``path``: where the file goes."""
    path.write_bytes(case.data)
    target = path.with_name("out.safetensors")
    target.unlink(missing_ok=True)
    try:
        config, tensors = read(case.source, path)
    except MinidiffError as e:
        if target.exists() or list(path.parent.glob(".*.part")):
            return "refused, but left a file behind"
        return "refused" if "\n" not in str(e) else f"refused in several lines: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    if config != sound[0] or tensors.keys() != sound[1].keys():
        return "accepted another model"
    shapes = all(t.shape == sound[1][k].shape and t.dtype == sound[1][k].dtype for k, t in tensors.items())
    if shapes and all(torch.equal(t, sound[1][k]) for k, t in tensors.items()):
        return "equal"
    return "weights" if shapes and case.weights_only else "accepted other weights"


ALLOWED = ("refused", "equal", "weights")
