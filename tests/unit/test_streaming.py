"""Files whose tensors are written while they are made: contents, places, and what interrupts them."""

import errno
import os
from pathlib import Path

import pytest
import torch

from minidiff.errors import CheckpointError
from minidiff.storage import streaming
from minidiff.storage.files import HEADER_KEY, TensorFile, check_header
from minidiff.storage.streaming import SOME_KEY, Stream, streamed
from minidiff.storage.table import header_hash, read_table


@pytest.fixture(params=["long", "short", "crowded"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Room and buffers for a few hundred kilobytes: of a file that keeps its room, is moved up, or down."""
    monkeypatch.setattr(streaming, "ROOM", 2048 if request.param == "crowded" else 1 << 16)
    monkeypatch.setattr(streaming, "CHUNK", 1 << 14)
    monkeypatch.setattr(streaming, "BUFFERS", 3)
    monkeypatch.setattr(streaming, "SHORT", 1 << 30 if request.param == "short" else 0)
    return str(request.param)


def tensors() -> dict[str, torch.Tensor]:
    """Values of every dtype, some of no whole cache lines, some longer than a buffer, one transposed."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {f"x.{k}": torch.randn(16 * (k + 1), 7 * k + 16, generator=g) for k in range(30)}
    found |= {"odd": torch.randn(3, 5, generator=g), "none": torch.zeros(0, 4), "t": torch.tensor(981)}
    found |= {"half": torch.randn(5, 3).bfloat16(), "wide": torch.randn(7).double(), "yes": torch.tensor([True])}
    found["turned"] = torch.randn(64, 96, generator=g).T
    found["small"] = torch.randn(16, generator=g).to(torch.float8_e4m3fn)
    return found


@pytest.mark.parametrize("direct", [True, False])
def test_a_stream_is_read_as_it_was_written(
    sizes: str, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(streaming, "_directly", lambda file, on: False)
    given = tensors()
    with streamed(tmp_path / "a.safetensors") as stream:
        for name, value in given.items():
            changed = value.clone()
            stream.add(name, changed)
            changed.zero_()  # it was copied
        stream.finish({"format": "pt", "said": "yes"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    check_header(tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert {key: file.metadata[key] for key in file.metadata.keys() - {HEADER_KEY, SOME_KEY}} == {
        "format": "pt",
        "said": "yes",
    }
    assert file.lazy.keys() == given.keys()
    for name, value in given.items():
        found = file.lazy[name].load()
        wanted = value.half() if value.dtype == torch.float8_e4m3fn else value
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found, wanted), name
    places = read_table(tmp_path / "a.safetensors").places
    assert all(places[name].start % 64 == 0 for name in given if name.startswith("x.")), "at a cache line"
    begin = min(place.start for place in places.values())
    assert (begin == 1 << 16) == (sizes == "long"), "the room is kept by a long file"
    assert sizes != "crowded" or begin > 2048, "the header has more room than was left for it"


def test_other_values_have_another_header(tmp_path: Path) -> None:
    x = torch.randn(100, 1000)
    hashes = []
    for name, value in (("a", x), ("b", x), ("c", x + 1e-6)):
        put(tmp_path / name, [value])
        hashes.append(header_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size < 410_000, "a short file has no room left over"


def test_a_full_disk_ends_a_stream(sizes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def full(self: Stream, buffer: torch.Tensor, size: int) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Stream, "_write_all", full)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "a", [torch.zeros(1 << 10)] * 1000)
    assert written == 3, "nothing is written after an error"
    written = 0
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "a", [torch.zeros(1 << 14)])
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="direct writes are Linux's")
def test_a_disk_that_refuses_direct_writes_gets_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ROOM", 1000)  # which is no multiple of a disk's blocks
    x = torch.randn(1 << 23)  # more than one buffer
    put(tmp_path / "a", [x])
    assert torch.equal(TensorFile(tmp_path / "a").lazy["0"].load(), x)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex64, which minidiff does not write"):
        put(tmp_path / "a", [torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(CheckpointError, match="'x' is written twice"):
        put(tmp_path / "a", [torch.zeros(3)] * 2, "x", "x")
    assert os.listdir(tmp_path) == []


def put(path: Path, values: list[torch.Tensor], *names: str) -> None:
    """Write a stream."""
    with streamed(path) as stream:
        for k, value in enumerate(values):
            stream.add(names[k] if names else f"{k}", value)
        stream.finish({})
