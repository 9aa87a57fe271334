"""Tensors on disk: safetensors files that any reader understands, mapped and read lazily."""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from minidiff.errors import CheckpointError
from minidiff.storage import files
from minidiff.storage.files import (
    ALIGNMENT,
    DTYPES,
    HASH_KEY,
    TensorFile,
    all_finite,
    content_hash,
    lazy,
    write_tensors,
)


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- what is written -------------------------------------------------------------------------------------------------


def some_tensors() -> dict[str, Tensor]:
    """Every dtype in odd and even sizes, empty and 0-dim ones, a view, an expanded one and odd names."""
    g = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (7,), (3, 5), (16, 16), (1, 1, 1, 1)]
    out = {
        f"{name}.{'x'.join(map(str, shape))}": torch.randint(0, 2, shape, generator=g).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in shapes
    }
    out |= {k: torch.randn(v.shape, generator=g).to(v.dtype) for k, v in out.items() if v.is_floating_point()}
    out["view"] = torch.randn(6, 4, generator=g).t()
    out["part"] = torch.randn(10, generator=g)[3:7]
    out["expanded"] = torch.randn(1, generator=g).expand(5)
    out["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    out['"quote" 日本語 \\ 😀 {}'] = torch.randn(3, generator=g)
    out["parameter"] = torch.nn.Parameter(torch.randn(2, generator=g))
    return out


def write(path: Path, tensors: dict[str, Tensor] | None = None, metadata: dict[str, str] | None = None) -> str:
    tensors = some_tensors() if tensors is None else tensors
    return write_tensors(path, {k: lazy(t) for k, t in tensors.items()}, metadata or {})


def bits(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, tuple(t.shape), bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # type: ignore[no-any-return]


def test_round_trip_of_every_dtype_and_shape(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    write(path, tensors, {"a": "b", "json": '{"x":"\\"y\\""}', "": "", "日本": "語😀"})
    file = TensorFile(path)
    assert file.metadata.items() >= {"a": "b", "json": '{"x":"\\"y\\""}', "": "", "日本": "語😀"}.items()
    assert file.lazy.keys() == tensors.keys()
    for name, t in tensors.items():
        entry = file.lazy[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (t.dtype, tuple(t.shape), t.numel() * t.element_size())
        assert bits(entry.load()) == bits(t)


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    write(path, tensors)
    for found in (safetensors.torch.load_file(path), safetensors.torch.load(path.read_bytes())):
        assert {k: bits(t) for k, t in found.items()} == {k: bits(t) for k, t in tensors.items()}


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {k: t.detach().contiguous().clone() for k, t in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a", {"x": "y"})
    file = TensorFile(tmp_path / "a")
    assert file.metadata == {"x": "y"}
    assert {k: bits(e.load()) for k, e in file.lazy.items()} == {k: bits(t) for k, t in tensors.items()}


def test_large_tensors_start_on_a_cache_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tensors = some_tensors() | {f"w{i}": torch.zeros(64 * i) for i in range(1, 5)}
    write(path, tensors)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start % ALIGNMENT == 0
    ends = []
    for name, entry in header(path).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            ends.append(end)
            size = tensors[name].element_size()
            assert begin % (ALIGNMENT if (end - begin) % ALIGNMENT == 0 and end > begin else size) == 0, name
    assert max(ends) + start == path.stat().st_size
    loaded = TensorFile(path).lazy
    for name in ("w1", "w2", "w3", "w4"):
        assert loaded[name].load().data_ptr() % ALIGNMENT == 0


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a", metadata={"x": "y"}) == write(tmp_path / "b", metadata={"x": "y"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    told = write(path, metadata={"x": "y", "trap": f'"{HASH_KEY}":"0"'})
    assert len(told) == 64
    assert set(told) <= set("0123456789abcdef")
    assert told == content_hash(path) == content_hash(str(path)) == TensorFile(path).metadata[HASH_KEY]


def test_the_hash_changes_with_data_name_shape_dtype_and_metadata(tmp_path: Path) -> None:
    t = torch.arange(8.0)
    flipped = t.clone()
    flipped.view(torch.int32)[3] ^= 1
    variants: list[tuple[dict[str, Tensor], dict[str, str]]] = [
        ({"a": t, "b": t}, {"x": "y"}),
        ({"a": flipped, "b": t}, {"x": "y"}),
        ({"a": t, "b": flipped}, {"x": "y"}),
        ({"a": t, "c": t}, {"x": "y"}),
        ({"a": t, "b": t.reshape(2, 4)}, {"x": "y"}),
        ({"a": t, "b": t.view(torch.int32)}, {"x": "y"}),
        ({"a": t, "b": t}, {"x": "z"}),
        ({"a": t, "b": t}, {"X": "y"}),
        ({"a": t, "b": t}, {}),
    ]
    assert len({write(tmp_path / "a", *variant) for variant in variants}) == len(variants)


def test_any_bit_that_turns_over_on_disk_shows_in_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    told = write(path, {"a": torch.arange(4.0)})
    whole = path.read_bytes()
    own = whole.index(told.encode())
    for place in range(8, len(whole)):
        if own <= place < own + 64:
            continue  # the hash itself stands there
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with suppress(CheckpointError):  # where the mark before the hash was hit
            assert content_hash(path) != told


def test_a_hash_is_asked_of_the_wrong_file(tmp_path: Path) -> None:
    cases = {
        "empty": b"",
        "text": b"hello",
        "long": b"\xff" * 100,
        "plain": safetensors.torch.save({"a": torch.ones(1)}),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="carries no content hash"):
            content_hash(tmp_path / name)
    for name in ("nothing", "."):
        with pytest.raises(CheckpointError, match="no such file"):
            content_hash(tmp_path / name)


def test_a_dtype_that_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'z' has dtype torch\.complex64"):
        write(tmp_path / "a", {"z": torch.ones(2, dtype=torch.complex64)})
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, dtype=torch.float16)])
def test_a_lazy_tensor_that_lied(tmp_path: Path, wrong: Tensor) -> None:
    entry = files.Lazy((2,), torch.float32, lambda: wrong)
    with pytest.raises(CheckpointError, match="tensor 'x' turned out to be"):
        write_tensors(tmp_path / "a", {"x": entry}, {})
    assert left_in(tmp_path) == []


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A checkpoint passes through memory tensor by tensor: each is read once, when its turn has come."""
    loaded: list[str] = []

    def entry(name: str) -> files.Lazy:
        def load() -> Tensor:
            loaded.append(name)
            return torch.ones(64)

        return files.Lazy((64,), torch.float32, load)

    write_tensors(tmp_path / "a", {n: entry(n) for n in "abc"}, {})
    assert loaded == ["a", "b", "c"]


# --- damaged files ---------------------------------------------------------------------------------------------------


def raw(table: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "4 bytes": lambda whole: whole[:4],
    "8 bytes": lambda whole: whole[:8],
    "half a header": lambda whole: whole[:100],
    "no data": lambda whole: whole[: 8 + int.from_bytes(whole[:8], "little")],
    "one byte short": lambda whole: whole[:-1],
    "one byte long": lambda whole: whole + b"\0",
    "a header that lies of its length": lambda whole: (10**6).to_bytes(8, "little") + whole[8:],
    "an enormous header": lambda whole: b"\xff" * 8 + whole[8:],
    "a short header": lambda whole: (16).to_bytes(8, "little") + whole[8:],
    "no json": lambda whole: raw(b"{nonsense}"),
    "a list": lambda whole: raw([1, 2]),
    "deep": lambda whole: raw(b"[" * 100_000),
    "no utf-8": lambda whole: raw(b'{"\xff\xfe": 1}'),
    "overlap": lambda whole: raw({"a": f32([1], 0, 4), "b": f32([1], 2, 6)}),
    "the same bytes twice": lambda whole: raw({"a": f32([2], 0, 8), "b": f32([2], 0, 8)}),
    "a hole": lambda whole: raw({"a": f32([1], 0, 4), "b": f32([1], 6, 10)}, b"\0" * 10),
    "beyond the end": lambda whole: raw({"a": f32([100], 0, 400)}),
    "backwards": lambda whole: raw({"a": f32([2], 8, 0)}),
    "a shape that lies": lambda whole: raw({"a": f32([3], 0, 8)}),
    "a negative shape": lambda whole: raw({"a": f32([-2], 0, 8)}),
    "a shape that overflows": lambda whole: raw({"a": f32([2**40, 2**40], 0, 8)}),
    "a product that wraps to the size": lambda whole: raw({"a": f32([2**63, 2, 2**62], 0, 8)}),
    "an unknown dtype": lambda whole: raw({"a": f32([2], 0, 8) | {"dtype": "F31"}}),
    "an odd dtype": lambda whole: raw({"a": f32([4], 0, 8) | {"dtype": "U16"}}),
    "metadata that is no text": lambda whole: raw({"__metadata__": {"a": 1}, "a": f32([2], 0, 8)}),
    "pickle": lambda whole: b"\x80\x02}q\x00." * 10,
    "zip": lambda whole: b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        [entry.load() for entry in TensorFile(path).lazy.values()]
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    """JSON allows it and the library takes one of the two; then their bytes do not add up, or one of them is read."""
    one, two = json.dumps(f32([1], 0, 4)), json.dumps(f32([1], 4, 8))
    path = tmp_path / "a"
    path.write_bytes(raw(f'{{"a":{one},"a":{two}}}'.encode()))
    with pytest.raises(CheckpointError):
        TensorFile(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        TensorFile(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a folder"):
        TensorFile(tmp_path)


def test_after_close(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"a": torch.arange(4.0), "b": torch.arange(4.0)})
    file = TensorFile(path)
    kept = file.lazy["a"].load()
    file.close()
    file.close()
    with pytest.raises(CheckpointError, match="tensor 'b' was requested after the file was closed"):
        file.lazy["b"].load()
    assert torch.equal(kept, torch.arange(4.0))


@pytest.mark.skipif(os.name != "posix", reason="a mapped file cannot be replaced on Windows")
def test_a_file_may_be_replaced_while_its_tensors_are_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"a": torch.arange(4.0)})
    tensor = TensorFile(path).lazy["a"].load()
    write(path, {"a": tensor + 1})
    assert torch.equal(tensor, torch.arange(4.0))
    assert torch.equal(TensorFile(path).lazy["a"].load(), torch.arange(4.0) + 1)


def test_a_new_map_takes_the_place_of_one_that_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FRESH_MAP", 7)
    tensors = {f"t{k}": torch.full((4,), float(k)) for k in range(5)}
    write_tensors(tmp_path / "a", {name: lazy(t) for name, t in tensors.items()}, {})
    file = TensorFile(tmp_path / "a")
    first = file._mapped
    kept = {name: entry.load() for name, entry in file.lazy.items()}
    assert file._mapped is not first
    assert all(torch.equal(kept[name], t) for name, t in tensors.items())


def test_a_large_tensor_has_a_map_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a small one that is kept would keep the large one in memory as well."""
    monkeypatch.setattr(files, "FRESH_MAP", 256)
    sizes = {"a": 8, "b": 8, "large": 100, "c": 8, "d": 8}
    write_tensors(tmp_path / "f", {name: lazy(torch.zeros(n)) for name, n in sizes.items()}, {})
    file = TensorFile(tmp_path / "f")
    kept = {name: file.lazy[name].load() for name in sizes}
    maps = {name: t.data_ptr() // mmap.PAGESIZE for name, t in kept.items()}  # the file is one page
    assert maps["a"] == maps["b"]
    assert maps["c"] == maps["d"]
    assert len(set(maps.values())) == 3


def test_two_files_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FRESH_MAP", 7)
    path = tmp_path / "a"
    write_tensors(path, {name: lazy(torch.zeros(4)) for name in "ab"}, {})
    file = TensorFile(path)
    file.lazy["a"].load()
    write_tensors(path, {name: lazy(torch.ones(4)) for name in "ab"}, {})
    with pytest.raises(CheckpointError, match="was replaced while it was read; open it again"):
        file.lazy["b"].load()


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, {"a": torch.arange(4.0)})
    before = path.read_bytes()
    TensorFile(path).lazy["a"].load().mul_(2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16", "I64", "I16", "BOOL", "F8_E4M3"])
def test_a_tensor_at_an_odd_address(tmp_path: Path, name: str) -> None:
    """The format aligns nothing: a header or a tensor of odd length moves all that follows."""
    dtype = files.STORED[name]
    want = torch.tensor([1.5, 0, -2, 448] if dtype.is_floating_point else [1, 0, 1, 1]).to(dtype)
    data, path = bits(want)[2], tmp_path / "a"
    table = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": name, "shape": [2, 2], "data_offsets": [3, 3 + len(data)]},
        "nothing": {"dtype": name, "shape": [2, 0], "data_offsets": [3 + len(data)] * 2},
    }
    text = json.dumps(table).encode()
    path.write_bytes(raw(text + b" " * (len(text) % 2), b"\1\2\3" + data))
    entries = TensorFile(path).lazy
    found = {key: entry.load() for key, entry in entries.items()}
    assert found["a"].tolist() == [1, 2, 3]
    assert bits(found["b"]) == bits(want.view(2, 2).to(files.WIDENED.get(dtype, dtype)))
    assert (found["nothing"].shape, found["nothing"].dtype) == ((2, 0), entries["b"].dtype)


def test_a_tensor_is_its_own_whatever_the_default_device_is(tmp_path: Path) -> None:
    """It lies on the CPU, and its storage holds its bytes alone: pickled or saved, it does not take the file along."""
    write(tmp_path / "a", {"a": torch.arange(4.0), "b": torch.zeros(1000)})
    with torch.device("meta"):
        found = TensorFile(tmp_path / "a").lazy["a"].load()
    assert (found.device.type, found.untyped_storage().nbytes()) == ("cpu", 16)
    assert torch.equal(found, torch.arange(4.0))


@pytest.mark.skipif(os.name != "posix", reason="a mapped file cannot be replaced on Windows")
@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 200)], ids=["removed", "cut off"])
def test_a_file_that_is_gone_by_the_next_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(files, "FRESH_MAP", 7)
    path = tmp_path / "a"
    write(path, {name: torch.zeros(4) for name in "ab"})
    entries = TensorFile(path).lazy
    entries["a"].load()
    change(path)
    with pytest.raises(CheckpointError, match="tensor 'b' cannot be read") as caught:
        entries["b"].load()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its memory from /proc")
def test_reading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither memory (the safetensors library leaves 60 bytes of each tensor) nor a file descriptor for each map."""
    write(tmp_path / "a", {f"t{k}": torch.zeros(64) for k in range(300)})

    def held() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE >> 10, len(os.listdir("/proc/self/fd"))

    def read() -> list[Tensor]:
        return [entry.load() for entry in TensorFile(tmp_path / "a").lazy.values()]

    for _ in range(60):
        read()
    before = held()
    for _ in range(100):
        read()
    assert held()[0] - before[0] < 900, "kilobytes; the library leaves 1,900"
    monkeypatch.setattr(files, "FRESH_MAP", 7)
    kept = read()
    assert len({t.data_ptr() // mmap.PAGESIZE for t in kept}) >= 300, "each has a map"
    assert held()[1] == before[1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its memory from /proc")
def test_loading_touches_no_data(tmp_path: Path) -> None:
    """64 MB are opened and every tensor is handed out, and the process grows by next to nothing."""
    path = tmp_path / "big"
    big = torch.ones(2**22)  # 16 MB
    write(path, {f"t{i}": big for i in range(4)})
    code = f"""
import torch
from minidiff.storage.files import TensorFile
pages = lambda: int(open("/proc/self/statm").read().split()[1]) * {os.sysconf("SC_PAGE_SIZE")}
small = TensorFile({str(tmp_path / "small")!r}).lazy["a"].load().sum()
before = pages()
tensors = [entry.load() for entry in TensorFile({str(path)!r}).lazy.values()]
grown = pages() - before
total = sum(t.sum() for t in tensors)
print(grown, pages() - before)
"""
    write(tmp_path / "small", {"a": torch.ones(4)})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, touched = map(int, done.stdout.split())
    assert grown < 4 * 2**20
    assert touched > 60 * 2**20  # the measure itself works: once summed up, the bytes are there


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_sees_what_isfinite_sees(dtype: torch.dtype, bad: float) -> None:
    limits = torch.finfo(dtype)
    tensor = torch.tensor([[0.0, -0.0, limits.max], [limits.min, limits.tiny, limits.smallest_normal]], dtype=dtype)
    assert all_finite(tensor)
    assert all_finite(tensor.t())
    tensor[1, 2] = bad
    assert not all_finite(tensor)
    assert not all_finite(tensor.t()[2:])
    assert all_finite(tensor.t()[:1])


def test_all_finite_of_nothing_and_of_integers() -> None:
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.tensor(1.5))
    assert all_finite(torch.tensor([2**62]))
