"""PNG files: pixels from numbers, and the recipe inside."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff.errors import CheckpointError
from minidiff.pipeline.png import KEY, label, read_recipe, save_png, to_pil, to_unit
from tests.tolerances import assert_close

PROMPTS = {
    "plain": "a photo of an astronaut riding a horse",
    "empty": "",
    "emoji": "a 👩‍👩‍👧‍👦 family 😀 with 🏳️‍🌈",
    "lone surrogates": "\ud800 high, \udfff low",
    "quotes": "\"double\" 'single' `back` \\ back\\slash {brace} </tag> %s",
    "lines": "one\ntwo\r\nthree\ttab\0null\x1b[31mescape\x7f\x80",
    "long": "an ocean of words " * 600,
    "long emoji": "😀" * 10_000,
    "languages": "日本語 العربية עברית ไทย Ελληνικά ßſİı",
    "latin-1": "café ÿ §",
    "noncharacters": "\ufffe\uffff\U0010ffff",
}


def picture() -> Image.Image:
    return Image.frombytes("RGB", (5, 4), bytes(range(60)))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_recipe_survives_the_png(tmp_path: Path, prompt: str) -> None:
    recipe: dict[str, Any] = {
        "prompt": prompt,
        prompt[:50]: 1,
        "seed": 2**64 - 1,
        "scale": 7.5,
        "none": None,
        "n": [{}],
    }
    path = tmp_path / "a.png"
    image = label(picture(), recipe)
    assert read_recipe(image) == recipe
    save_png(image, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert read_recipe(path) == recipe
    assert read_recipe(str(path)) == recipe
    with Image.open(path) as opened:
        assert read_recipe(opened) == recipe
        assert opened.format == "PNG"
        assert opened.tobytes() == picture().tobytes()
        assert opened.info[KEY].isascii()  # any reader of PNG files gets it whole
    with Image.open(path) as opened:
        save_png(opened, tmp_path / "again.png")  # the recipe stays when the picture is saved once more
    assert read_recipe(tmp_path / "again.png") == recipe


def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "a.png")
    with pytest.raises(CheckpointError, match=r"a\.png: carries no recipe"):
        read_recipe(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match="the picture: carries no recipe"):
        read_recipe(picture())
    picture().save(tmp_path / "a.jpg")
    with pytest.raises(CheckpointError, match=r"a\.jpg: carries no recipe"):
        read_recipe(tmp_path / "a.jpg")


@pytest.mark.parametrize("text", ["", "no json", "[1, 2]", '"text"', "5", "null", "{", "[" * 100_000])
def test_a_recipe_that_is_damaged(tmp_path: Path, text: str) -> None:
    info = PngInfo()
    info.add_text(KEY, text)
    picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(CheckpointError, match=r"a\.png: ") as caught:
        read_recipe(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    image = picture()
    image.info[KEY] = text
    with pytest.raises(CheckpointError, match="the picture: "):
        read_recipe(image)
    image.info[KEY] = (1, 2)
    with pytest.raises(CheckpointError, match="the picture: "):
        read_recipe(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, format="PNG")
    whole = buffer.getvalue()
    signature = whole[:8]
    cases = {
        "empty": b"",
        "text": b"hello, I am no picture",
        "signature": signature,
        "cut": whole[: len(whole) // 2],
        "crc": whole[:20] + b"\xff" + whole[21:],
        "bad chunk": signature + b"\xff" * 100,
        "enormous": signature
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b""),
        "bad data": whole[:33] + chunk(b"IDAT", b"nonsense") + chunk(b"IEND", b""),
        "text bomb": whole[:33] + chunk(b"zTXt", KEY.encode() + b"\0\0" + zlib.compress(b"1" * 2**26)) + whole[33:],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_recipe(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file"):
        read_recipe(tmp_path / "nothing.png")
    with pytest.raises(CheckpointError):
        read_recipe(tmp_path)


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        save_png(picture(), tmp_path / "no" / "a.png")

    def fail(self: Any, file: Any, **options: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(picture(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_rounded_to_the_nearest_level() -> None:
    levels = torch.arange(256) / 255
    values = torch.stack([levels, levels, levels]).reshape(1, 3, 16, 16)
    for shift in (0.0, 0.49 / 255, -0.49 / 255):
        (image,) = to_pil((values + shift).clamp(0, 1))
        assert image.mode == "RGB"
        assert image.size == (16, 16)
        assert bytes(image.getchannel("G").tobytes()) == bytes(range(256))
    (edge,) = to_pil(torch.full((1, 3, 1, 1), 0.5))
    assert edge.getpixel((0, 0)) == (128, 128, 128)  # 127.5, rounded to even as the reference does


def test_channels_and_sides_stay_in_place() -> None:
    pixels = torch.zeros(2, 3, 4, 6)
    pixels[1, 0, 3, 5] = 1.0  # red, lower right
    pixels[1, 2, 0, 5] = 1.0  # blue, upper right
    first, second = to_pil(pixels)
    assert first.size == second.size == (6, 4)
    assert first.getextrema() == ((0, 0),) * 3
    assert second.getpixel((5, 3)) == (255, 0, 0)
    assert second.getpixel((5, 0)) == (0, 0, 255)
    assert second.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    (image,) = to_pil(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).to(dtype))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_one_channel_is_a_grey_picture(tmp_path: Path) -> None:
    images = to_pil((torch.arange(12) / 255).reshape(2, 1, 2, 3))
    assert [i.mode for i in images] == ["L", "L"]
    assert images[1].size == (3, 2)
    assert images[1].tobytes() == bytes(range(6, 12))
    save_png(label(images[1], {"a": 1}), tmp_path / "a.png")
    assert read_recipe(tmp_path / "a.png") == {"a": 1}


def test_to_unit() -> None:
    found = to_unit(torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]))
    assert_close(found, torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]))


def test_the_recipe_is_ascii_json() -> None:
    image = label(picture(), {"prompt": "é😀"})
    assert image.info[KEY] == json.dumps({"prompt": "é😀"})
    assert image.info[KEY].isascii()
