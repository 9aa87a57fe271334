"""Data for training: the user's folders with all that may be wrong in them, shuffled streams, cached latents."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.errors import CheckpointError, ConfigError
from minidiff.training.batch import Batch
from minidiff.training.data import FirstOf, ShapesStream, Shuffled, TorchvisionSet, normalised
from minidiff.training.images import ImageFolder, to_pixels
from minidiff.training.latents import CachedLatents
from tests.tolerances import assert_close
from tests.unit.tiny import tiny_sd

COLOURS = ["red", "lime", "blue", "white", "black"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five plain pictures of different sizes and formats, one of them in a folder of its own."""
    path = tmp_path / "pictures"
    (path / "inner").mkdir(parents=True)
    for i, (colour, suffix) in enumerate(zip(COLOURS, ("png", "jpg", "webp", "bmp", "gif"), strict=True)):
        place = path / "inner" if colour == "black" else path
        Image.new("RGB", (20 + 7 * i, 30 - 3 * i), colour).save(place / f"{colour}.{suffix}", quality=95)
    (path / "notes.md").write_text("not a picture")
    return path


def write_captions(folder: Path) -> None:
    for file in [*folder.rglob("*.png"), *folder.rglob("*.jpg"), *folder.rglob("*.webp"), *folder.rglob("*.bmp")]:
        file.with_suffix(".txt").write_text(f"all {file.stem}\n")


@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_folder(folder: Path, memory: int) -> None:
    """Whether its pictures are kept in memory or read again makes no difference."""
    pictures = ImageFolder(folder, 16, memory=memory)
    assert [f.name for f in pictures.files] == ["blue.webp", "black.gif", "lime.jpg", "red.png", "white.bmp"]
    assert (pictures.pixels is None) == (memory == 0)
    batch = pictures.take([3, 1, 4])
    assert batch.captions is None
    assert batch.pixels.shape == (3, 3, 16, 16)
    assert batch.pixels[:, :, 5, 5].tolist() == [[1, -1, -1], [-1, -1, -1], [1, 1, 1]]


def test_captions_beside_and_in_a_list(folder: Path) -> None:
    write_captions(folder)
    line = {"file_name": "inner/black.gif", "text": "all \u2588 black", "more": 1}
    (folder / "metadata.jsonl").write_text("\n" + json.dumps(line) + "\n", encoding="utf-8")
    pictures = ImageFolder(folder, 8, captions=True)
    assert pictures.take([0, 1]).captions == ["all blue", "all \u2588 black"]


def test_captions_missing(folder: Path) -> None:
    write_captions(folder)
    with pytest.raises(ConfigError, match=r"black\.gif: has no caption .*; so do 1 of 5 pictures"):
        ImageFolder(folder, 8, captions=True)


@pytest.mark.parametrize(
    "line", ['{"file_name": "a.png"', '{"file_name": "a.png"}', "[1]", '{"file_name": 1, "text": 2}']
)
def test_a_damaged_list_of_captions(folder: Path, line: str) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b"}\n' + line)
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 2: "):
        ImageFolder(folder, 8, captions=True)


def test_captions_that_are_no_text(folder: Path) -> None:
    write_captions(folder)
    (folder / "red.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"red\.txt: a caption should be text in UTF-8"):
        ImageFolder(folder, 8, captions=True)


def test_broken_pictures_are_named_and_counted(folder: Path) -> None:
    whole = (folder / "lime.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").touch()
    with pytest.warns(
        UserWarning, match=r"3 of 8 pictures cannot be read and are left out: cut\.jpg, empty\.png, text"
    ):
        pictures = ImageFolder(folder, 8)
    assert len(pictures) == 5
    assert len(pictures.broken) == 3


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder of pictures"):
        ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(ConfigError, match="no pictures in this folder"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a.png").touch()
    with pytest.raises(ConfigError, match=r"1 of 1 pictures cannot be read: a\.png; nothing is left to train on"):
        ImageFolder(tmp_path, 8)


def test_one_picture_is_not_enough(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="only one picture to train on"):
        Shuffled(ImageFolder(tmp_path, 8))


def test_a_picture_that_breaks_later(folder: Path) -> None:
    pictures = ImageFolder(folder, 8, memory=0)
    (folder / "red.png").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"red\.png: could be read when the run began"):
        pictures.take([3])


def test_pixels_of_every_mode() -> None:
    """Transparent is white, 16 bits are scaled, the middle of a wide picture is taken."""
    assert to_pixels(Image.new("RGBA", (5, 4), (9, 9, 9, 0)), 2).unique().tolist() == [255]
    assert to_pixels(Image.new("L", (4, 4), 100), 2).unique().tolist() == [100]
    assert to_pixels(Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)), 2).unique().tolist() == [128]
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("lime", (10, 0, 20, 10))
    assert to_pixels(wide, 10)[:, 5].T.tolist() == [[0, 255, 0]] * 10
    assert to_pixels(wide, 7).shape == (3, 7, 7)


def test_pixels_reach_both_ends() -> None:
    assert normalised(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


class Numbers:
    """A set whose pictures are their own indices."""

    def __len__(self) -> int:
        return 7

    def take(self, indices: Any) -> Batch:
        return Batch(torch.tensor(list(indices), dtype=torch.float32)[:, None, None, None])


def test_a_shuffled_stream() -> None:
    """Each epoch holds every picture once, in another order; any cut of the stream gives the same examples."""
    stream = Shuffled(Numbers(), seed=3)
    whole = stream.batch(0, 21).pixels.flatten().tolist()
    epochs = [whole[0:7], whole[7:14], whole[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream.batch(5, 6).pixels.flatten().tolist() == whole[5:11]
    assert Shuffled(Numbers(), seed=4).batch(0, 21).pixels.flatten().tolist() != whole


def test_the_first_of_a_stream() -> None:
    first = FirstOf(ShapesStream(seed=1), 4)
    whole = ShapesStream(seed=1).batch(0, 4)
    batch = first.take([2, 0])
    assert len(first) == 4
    assert whole.captions is not None
    assert batch.captions == [whole.captions[2], whole.captions[0]]
    assert_close(batch.pixels, whole.pixels[[2, 0]])


def test_torchvision_by_name(tmp_path: Path) -> None:
    found = TorchvisionSet("FakeData", 16)
    batch = found.take([0, 5])
    assert len(found) == 1000
    assert batch.pixels.shape == (2, 3, 16, 16)
    assert batch.captions is None
    found.classes = [f"class {k}" for k in range(10)]
    assert found.caption(3) == "class 3"
    with pytest.raises(ConfigError, match="torchvision has no data set 'Nothing'"):
        TorchvisionSet("Nothing", 16)
    with pytest.raises(ConfigError, match=r"CIFAR10 in .*--download fetches it"):
        TorchvisionSet("CIFAR10", 16, root=str(tmp_path))


def test_cached_latents(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the encoder; read from their file the next time, and made anew for other pictures or other weights."""
    for name in ("black.gif",):
        (folder / "inner" / name).unlink()
    write_captions(folder)
    vae, pictures, path = tiny_sd().vae, ImageFolder(folder, 16, captions=True), tmp_path / "latents"
    cached = CachedLatents(pictures, vae, path)
    batch = cached.take([2, 1])
    assert batch.captions == [f"all {pictures.files[i].stem}" for i in (2, 1)]
    assert batch.latents is not None
    with torch.no_grad():
        wanted = vae.encode(pictures.take(range(4)).pixels)
    assert_close(batch.latents.mean, wanted.mean[[2, 1]])
    assert_close(batch.latents.logvar, wanted.logvar[[2, 1]])
    written = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr("minidiff.training.latents.encode", None)
        assert_close(CachedLatents(pictures, vae, path).latents.mean, cached.latents.mean)
    with torch.no_grad():
        vae.quant.bias.add_(1)  # type: ignore[operator,union-attr]
    CachedLatents(pictures, vae, path)
    assert path.read_bytes() != written


def test_reading_is_quiet(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(folder, 8)
