"""Training data: image folders with everything that may be wrong in them, shuffled streams, cached latents."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.errors import CheckpointError, ConfigError
from minidiff.training import changes, latents
from minidiff.training.batch import Batch
from minidiff.training.data import FirstOf, ShapesStream, Shuffled, TorchvisionSet, normalised
from minidiff.training.image_folder import ImageFolder, to_pixels
from minidiff.training.latents import CachedLatents
from tests.support.tiny import tiny_sd
from tests.tolerances import assert_close

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


WHOLE = 5 * 3 * 16**2  # bytes of five pictures


@pytest.mark.parametrize("memory", [0, WHOLE - 1, WHOLE, 2**20])
def test_a_folder(folder: Path, memory: int) -> None:
    """Whether its pictures are kept in memory or read again makes no difference."""
    pictures = ImageFolder(folder, 16, memory=memory)
    assert [f.name for f in pictures.files] == ["blue.webp", "black.gif", "lime.jpg", "red.png", "white.bmp"]
    assert (pictures.pixels is None) == (memory < WHOLE)
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
    with pytest.raises(ConfigError, match=r"red\.txt: a caption must be a short text in UTF-8"):
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
    rows = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert to_pixels(rows, 4).tolist() == rows.tolist(), "arrays of torchvision's sets, channels first"
    assert to_pixels(torch.from_numpy(rows)[1], 4).tolist() == [rows[1].tolist()] * 3, "and grey ones, without any"


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


def test_pictures_are_encoded_a_few_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, and those that are left over too."""
    monkeypatch.setattr(latents, "PART", 2)
    pictures = ImageFolder(folder, 8)
    found = [batch.pixels for batch in latents.parts(pictures)]
    assert [len(pixels) for pixels in found] == [2, 2, 1]
    assert_close(torch.cat(found), pictures.take(range(5)).pixels)


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


def test_hidden_files_and_folders_are_no_data(folder: Path) -> None:
    """Files that Jupyter, file managers and archives leave beside the pictures."""
    names = [".ipynb_checkpoints/red-checkpoint.png", ".thumbnails/1.png", "__MACOSX/._a.jpg", "__MACOSX/a.jpg"]
    names += [
        "inner/.git/a.png",
        "inner/.DS_Store",
        "@eaDir/red.png",
        "._red.png",
        ".red.png",
        "Thumbs.db",
        "desktop.ini",
    ]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0 and so on")
    (folder / "desktop.ini").write_text("[.ShellClassInfo]")
    write_captions(folder)
    (folder / "inner" / "black.txt").write_text("black")
    for captions in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ImageFolder(folder, 8, captions=captions)
        assert [f.name for f in found.files] == ["blue.webp", "black.gif", "lime.jpg", "red.png", "white.bmp"]


def test_pictures_of_every_name_are_taken_or_said(folder: Path) -> None:
    """By their suffix, of which there are more than the usual ones, or by how they begin."""
    image = Image.new("RGB", (16, 16), "red")
    taken = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.ppm": "PPM", "d.pgm": "PPM", "e.tga": "TGA", "f.avif": "AVIF"}
    taken |= {"g.jp2": "JPEG2000", "h.qoi": "QOI", "i": "PNG", "j.jpg_large": "JPEG", "k.PNG": "WEBP", "l.tmp": "WEBP"}
    taken |= {"m": "AVIF"}
    for name, kind in taken.items():
        image.save(folder / name, kind)
    (folder / "notes").write_text("no picture")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x24ftypheic" + bytes(40))
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n")
    os.mkfifo(folder / "pipe.png")
    with pytest.warns(
        UserWarning, match=r"4 of 22 pictures cannot be read and are left out: drawing\.svg, page\.eps, ph"
    ):
        found = ImageFolder(folder, 8)
    assert {file.name for file in found.files} >= taken.keys()
    assert len(found) == 18
    (folder / "only").mkdir()
    (folder / "photo.heic").rename(folder / "only" / "photo.heic")
    with pytest.raises(ConfigError, match=r"no pictures in this folder .*, but 1 of formats that are not read: photo"):
        ImageFolder(folder / "only", 8)


def test_a_folder_that_cannot_be_opened_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        ImageFolder(folder, 8)


def write_list(folder: Path, rows: list[tuple[str, str]], between: str = "\n") -> None:
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows]
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + between.join(lines).encode())


NAMES = ["blue.webp", "inner/black.gif", "lime.jpg", "red.png", "white.bmp"]


@pytest.mark.parametrize("between", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line_of_the_list(folder: Path, between: str) -> None:
    texts = ["a\u2028fox", "two\u0085lines", "three\u2029", "\u2028", "five\u2028\u2028"]
    write_list(folder, list(zip(NAMES, texts, strict=True)), between)
    assert ImageFolder(folder, 8, captions=True).texts == texts


def test_captions_keep_odd_ends_of_lines_too(folder: Path) -> None:
    write_captions(folder)
    (folder / "inner" / "black.txt").write_bytes(b"\xef\xbb\xbf all \xe2\x80\xa8 black\r\n")
    assert ImageFolder(folder, 8, captions=True).take([1]).captions == ["all \u2028 black"]


def test_a_list_that_names_absent_pictures(folder: Path) -> None:
    rows = [(name, name) for name in [*NAMES, "gone.png", "other/b.jpeg", ".hidden/c.png"]]
    write_list(folder, rows)
    with pytest.warns(
        UserWarning, match=r"metadata\.jsonl: 3 of 8 names belong to no existing picture: \.hidden/c\.png, gon"
    ):
        found = ImageFolder(folder, 8, captions=True)
    assert found.absent == [".hidden/c.png", "gone.png", "other/b.jpeg"]
    assert found.texts == NAMES


def test_names_in_the_list_are_paths(folder: Path) -> None:
    """A dot in front, letters with their accents apart as macOS writes them, and names that stand there twice."""
    (folder / "red.png").rename(folder / "re\u0301d.png")
    rows = [
        ("./blue.webp", "1"),
        ("inner//black.gif", "2"),
        ("lime.jpg", "3"),
        ("r\u00e9d.png", "4"),
        ("white.bmp", "5"),
    ]
    write_list(folder, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImageFolder(folder, 8, captions=True).texts == ["1", "2", "3", "4", "5"]
    write_list(folder, [*rows, ("lime.jpg", "3"), ("blue.webp", "6")])
    with pytest.warns(UserWarning, match=r"1 names occur more than once, the last one counts: blue\.webp"):
        assert ImageFolder(folder, 8, captions=True).texts == ["6", "2", "3", "4", "5"]


def test_marks_tell_pictures_and_captions_apart(folder: Path) -> None:
    write_list(folder, [(name, name) for name in NAMES])
    before = ImageFolder(folder, 8, captions=True)
    assert list(before.marks) == NAMES
    assert changes.said(before.marks, ImageFolder(folder, 8, captions=True, memory=0).marks) is None
    (folder / "red.png").unlink()
    Image.new("RGB", (50, 30), "blue").save(folder / "lime.jpg")
    Image.new("RGB", (8, 8), "blue").save(folder / "new.png")
    write_list(folder, [("new.png", "new"), ("blue.webp", "another"), *((name, name) for name in NAMES[1:])])
    with pytest.warns(UserWarning, match="1 of 6 names"):
        after = ImageFolder(folder, 8, captions=True)
    told = "1 added (new.png), 1 gone (red.png), 2 changed (blue.webp, lime.jpg); 5 then, 5 now"
    assert changes.said(before.marks, after.marks) == told
    assert changes.marks_of(Shuffled(after)) == after.marks
