"""Reading of picture files: every mode of Pillow, odd and damaged files, and files that are no pictures."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline import images
from minidiff.pipeline.image_files import FORMATS, formats, open_picture, suffixes, to_eight_bits
from minidiff.training.image_folder import ImageFolder, read_pixels

GREY = np.arange(256, dtype=np.uint8).reshape(8, 32)
COLOURS = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
ALPHA = np.tile(np.array([0, 1, 100, 255], dtype=np.uint8), 64).reshape(8, 32)
DEEP = GREY.astype(np.uint16) * 257  # the same picture in 16 bits

Made = tuple[Image.Image, np.ndarray[Any, Any]]  # a picture, and what it should be in 8 bits


def raw(mode: str, array: np.ndarray[Any, Any]) -> Image.Image:
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), np.ascontiguousarray(array).tobytes())


def over_white(colour: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    a = alpha / 255 if colour.ndim == 2 else alpha[..., None] / 255
    return np.rint(colour * a + 255 * (1 - a))


def with_alpha(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([array if array.ndim == 3 else array[..., None], ALPHA[..., None]], axis=-1)


def multiplied(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    a = ALPHA / 255 if array.ndim == 2 else ALPHA[..., None] / 255
    return np.rint(array * a).astype(np.uint8)


def palette(mode: str = "P") -> Made:
    image = Image.fromarray(GREY)
    image = image.convert("P")
    image.putpalette(bytes(COLOURS.reshape(-1, 3).tobytes()))
    colours = COLOURS.reshape(-1, 3)[GREY]
    if mode == "P":
        return image, colours
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    both = Image.frombytes("PA", image.size, image.tobytes())
    both.putpalette(bytes(COLOURS.reshape(-1, 3).tobytes()))
    return both, over_white(colours, ALPHA)


MODES: dict[str, Callable[[], Made]] = {
    "1": lambda: (Image.fromarray(GREY >= 128), np.where(GREY >= 128, 255, 0)),
    "L": lambda: (Image.fromarray(GREY), GREY),
    "LA": lambda: (raw("LA", with_alpha(GREY)), over_white(GREY, ALPHA)),
    "La": lambda: (raw("La", with_alpha(multiplied(GREY))), over_white(GREY, ALPHA)),
    "P": palette,
    "PA": lambda: palette("PA"),
    "RGB": lambda: (Image.fromarray(COLOURS), COLOURS),
    "RGBA": lambda: (raw("RGBA", with_alpha(COLOURS)), over_white(COLOURS, ALPHA)),
    "RGBa": lambda: (raw("RGBa", with_alpha(multiplied(COLOURS))), over_white(COLOURS, ALPHA)),
    "RGBX": lambda: (raw("RGBX", with_alpha(COLOURS)), COLOURS),
    "CMYK": lambda: (raw("CMYK", np.concatenate([255 - COLOURS, 0 * ALPHA[..., None]], axis=-1)), COLOURS),
    "YCbCr": lambda: (Image.fromarray(COLOURS).convert("YCbCr"), COLOURS),
    "HSV": lambda: (Image.fromarray(COLOURS).convert("HSV"), COLOURS),
    "LAB": lambda: (Image.fromarray(COLOURS).convert("LAB"), COLOURS),
    "I": lambda: (Image.fromarray(DEEP.astype(np.int32)), GREY),
    "I;16": lambda: (Image.fromarray(DEEP), GREY),
    "I;16L": lambda: (raw("I;16L", DEEP.astype("<u2")), GREY),
    "I;16B": lambda: (raw("I;16B", DEEP.astype(">u2")), GREY),
    "I;16N": lambda: (raw("I;16N", DEEP), GREY),
    "F": lambda: (Image.fromarray(DEEP.astype(np.float32) / 65535), GREY),
}
# Levels of 255 by which colours may be off after the way there and back (by Pillow's tables).
ROUNDING = {"YCbCr": 3, "HSV": 8, "LAB": 33, "RGBa": 1, "La": 1, "RGBA": 1, "LA": 1, "PA": 1}


def as_colours(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack([array] * 3, axis=-1) if array.ndim == 2 else array


@pytest.mark.parametrize("mode", sorted({*Image.MODES, *MODES}))
def test_every_mode_of_pillow(mode: str) -> None:
    """A mode that a later Pillow brings has no picture here, and fails until there is one."""
    if mode == "LAB" and not features.check("littlecms2"):
        pytest.skip("this Pillow was built without colour management")
    image, want = MODES[mode]()
    assert image.mode == mode
    found = to_eight_bits(image)
    assert found.mode in ("RGB", "L")
    gap = np.abs(np.asarray(found.convert("RGB")).astype(int) - as_colours(want))
    if mode in ("LA", "La", "RGBA", "RGBa"):  # where a colour shines through at 1 of 255, it is known that well
        gap = gap[ALPHA != 1]
    assert gap.max() <= ROUNDING.get(mode, 0)
    twice = to_eight_bits(found)
    assert twice is found


def test_the_range_of_deep_pictures_in_memory() -> None:
    """The narrowest that holds the values: what Pillow's conversions to deep modes leave unscaled stays as it is."""
    plain = Image.fromarray(GREY)
    for mode in ("I", "F", "I;16", "I;16B"):
        assert np.array_equal(np.asarray(to_eight_bits(plain.convert(mode))), GREY), mode
    whole = Image.fromarray((GREY.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32))
    assert np.array_equal(np.asarray(to_eight_bits(whole)), GREY)
    for white in (1.0, 255.0, 65535.0):
        image = Image.fromarray((GREY / 255 * white).astype(np.float32))
        assert np.array_equal(np.asarray(to_eight_bits(image)), GREY), white
    light = Image.fromarray(np.array([[-0.5, 0, 0.5, 1, 1.5]], dtype=np.float32))  # a little beyond is cut off
    assert np.asarray(to_eight_bits(light)).tolist() == [[0, 0, 128, 255, 255]]
    for most, white in ((1.99, 1.0), (2.0, 255.0), (255.99, 255.0), (256.0, 65535.0), (65535.9, 65535.0)):
        image = Image.fromarray(np.array([[0, white, most]], dtype=np.float32))
        assert np.asarray(to_eight_bits(image)).tolist() == [[0, 255, min(255, round(most * 255 / white))]], most
    for most, white in ((255, 255), (256, 65535), (65535, 65535), (65536, 2**31 - 1)):
        image = Image.fromarray(np.array([[0, most]], dtype=np.int32))
        assert np.asarray(to_eight_bits(image)).tolist() == [[0, round(most * 255 / white)]], most
    for value, words in (
        (np.nan, "NaN"),
        (np.inf, "NaN or infinite"),
        (65536.0, "up to 65536"),
        (1e9, "up to 1e[+]09"),
    ):
        with pytest.raises(ValueError, match=words):
            to_eight_bits(Image.fromarray(np.array([[0, value]], dtype=np.float32)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + tail


def tiff(bits: int, photometric: int, data: bytes, width: int, height: int, kind: int = 1) -> bytes:
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    entries |= {279: len(data), 339: kind}
    begin = 10 + 12 * len(entries) + 4
    out = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries.items():
        out += struct.pack(
            "<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, begin if tag == 273 else value
        )
    return out + struct.pack("<I", 0) + data


ROW = np.array([[0, 1, 128, 254, 255]])
SIXTEEN = b"\0" + (ROW * 257).astype(">u2").tobytes()
FILES: dict[str, tuple[bytes, list[int]]] = {
    "grey.png": (png(5, 1, 16, 0, SIXTEEN), [0, 1, 128, 254, 255]),
    "dark.png": (png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 0, 255)), [0, 1]),  # black it is, by the format
    "colour.png": (png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 200 * 257, 200 * 257, 200 * 257)), [200]),
    "clear.png": (png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 7, 257), chunk(b"tRNS", b"\0\7")), [255, 1]),
    "clear8.png": (png(2, 1, 8, 0, b"\0\7\1", chunk(b"tRNS", b"\0\7")), [255, 1]),
    "clear.rgb.png": (png(2, 1, 8, 2, b"\0\7\7\7\1\1\1", chunk(b"tRNS", b"\0\7\0\7\0\7")), [255, 1]),
    "palette.png": (
        png(
            3, 1, 8, 3, b"\0\0\1\2", chunk(b"PLTE", bytes([9, 9, 9, 50, 50, 50, 70, 70, 70])), chunk(b"tRNS", b"\0\xff")
        ),
        [255, 50, 70],
    ),
    "black.tif": (tiff(16, 1, (ROW * 257).astype("<u2").tobytes(), 5, 1), [0, 1, 128, 254, 255]),
    "white.tif": (tiff(16, 0, (ROW * 257).astype("<u2").tobytes(), 5, 1), [255, 254, 127, 1, 0]),
    "white8.tif": (tiff(8, 0, ROW.astype(np.uint8).tobytes(), 5, 1), [255, 254, 127, 1, 0]),
    "twelve.tif": (tiff(12, 1, b"\xff\xf8\x08", 2, 1), [255, 128]),
    "whole.tif": (tiff(32, 1, np.array([0, 2**31, 2**32 - 1], dtype="<u4").tobytes(), 3, 1), [0, 128, 255]),
    "whole16.tif": (tiff(32, 1, (ROW * 257).astype("<i4").tobytes(), 5, 1, 2), [0, 1, 128, 254, 255]),
    "whole8.tif": (tiff(32, 1, ROW.astype("<u4").tobytes(), 5, 1), [0, 1, 128, 254, 255]),
    "signed.tif": (tiff(16, 1, np.array([-5, 0, 16384, 32767], dtype="<i2").tobytes(), 4, 1, 2), [0, 0, 128, 255]),
    "float.tif": (tiff(32, 1, np.array([0, 0.5, 1], dtype="<f4").tobytes(), 3, 1, 3), [0, 128, 255]),
    "deep.pgm": (b"P5 3 1 1023\n" + np.array([0, 512, 1023], dtype=">u2").tobytes(), [0, 128, 255]),
    "text.pgm": (b"P2 3 1 15\n0 8 15\n", [0, 136, 255]),
    "bits.pbm": (b"P1 2 1\n0 1\n", [255, 0]),
    "picture": (png(1, 1, 8, 0, b"\0\x63"), [0x63]),  # no name says what it is
    "photo.jpg": (png(1, 1, 8, 0, b"\0\x63"), [0x63]),  # and this one's is wrong
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_scaled_by_what_their_format_says(name: str, tmp_path: Path) -> None:
    content, want = FILES[name]
    (tmp_path / name).write_bytes(content)
    found = open_picture(tmp_path / name)
    assert np.asarray(found.convert("L")).reshape(-1).tolist() == want
    with Image.open(tmp_path / name) as opened:  # handed over open, it is the same picture
        assert np.asarray(to_eight_bits(opened).convert("L")).reshape(-1).tolist() == want


def test_generation_masks_and_training_read_alike(tmp_path: Path) -> None:
    """One reader: a picture in 16 bits is the picture in 8, as an image, as a mask and to train on."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "plain.png")
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        deep, plain = (
            images.open_pictures(tmp_path / n, tmp_path / n, None, None, 8, 4).resized() for n in (name, "plain.png")
        )
        assert deep.mask is not None
        assert plain.mask is not None
        assert deep.pixels.equal(plain.pixels)
        assert deep.mask.equal(plain.mask)
        assert 0.4 < float(deep.mask.mean()) < 0.6
        assert read_pixels(tmp_path / name, 64).equal(read_pixels(tmp_path / "plain.png", 64))


def test_as_its_camera_says(tmp_path: Path) -> None:
    """All eight ways to hold a camera, of a picture with four other corners."""
    upright = np.kron(np.array([[10, 80], [160, 240]], dtype=np.uint8), np.ones((16, 24), dtype=np.uint8))
    undo = {3: 180, 6: 90, 8: 270}  # how the camera was turned, in degrees against the clock
    for orientation in range(1, 9):
        held = Image.fromarray(upright)
        if orientation in undo:
            held = held.rotate(undo[orientation], expand=True)
        elif orientation in (2, 4):
            held = held.transpose(
                Image.Transpose.FLIP_LEFT_RIGHT if orientation == 2 else Image.Transpose.FLIP_TOP_BOTTOM
            )
        elif orientation in (5, 7):
            held = held.transpose(Image.Transpose.TRANSPOSE if orientation == 5 else Image.Transpose.TRANSVERSE)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("a.png", "a.jpg", "a.tif", "a.webp"):
            held.save(tmp_path / name, exif=exif, **({"quality": 100} if name[-1] in "gp" else {}))
            found = np.asarray(open_picture(tmp_path / name).convert("L")).astype(int)
            assert found.shape == upright.shape, (name, orientation)
            assert np.abs(found - upright).max() <= 3, (name, orientation)
    with Image.open(tmp_path / "a.jpg") as image:  # in memory, it is as its owner holds it
        assert to_eight_bits(image).size == held.size


def animation(path: Path) -> Path:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
    return path


def said(work: Callable[[], object]) -> list[str]:
    """The warnings of ``work``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_frame_of_an_animation(name: str, tmp_path: Path) -> None:
    """And a line says that there are more."""
    path = animation(tmp_path / name)
    found: list[Image.Image] = []
    line = f"{path}: has more than one frame, of which only the first is used"
    assert said(lambda: found.append(open_picture(path))) == [line]
    assert found[0].convert("RGB").getpixel((4, 4)) == (255, 0, 0)
    assert said(lambda: images.open_pictures(path, None, None, None, 8, 4)) == [line]
    with Image.open(path) as image:
        line = "image has more than one frame, of which only the first is used"
        assert said(lambda: images.open_pictures(image, None, None, None, 8, 4)) == [line]
        image.seek(2)  # chosen by the caller
        assert said(lambda: images.open_pictures(image, None, None, None, 8, 4)) == []
    Image.new("RGB", (8, 8)).save(path)
    assert said(lambda: open_picture(path)) == []


def test_a_damaged_second_frame_is_no_reason_to_refuse_the_first(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.gif")
    whole = path.read_bytes()
    second = whole.index(b"\x21\xf9", whole.index(b"\x2c"))  # the extension before the second frame
    path.write_bytes(whole[: second + 3])
    with pytest.warns(UserWarning, match="more than one frame"):
        assert open_picture(path).convert("RGB").getpixel((4, 4)) == (255, 0, 0)


SRGB_COLORANTS = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))  # at D50
P3_COLORANTS = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
CURVES = {
    "gamma 2.2": b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)),
    "table": b"curv" + bytes(4) + struct.pack(">I5H", 5, 0, 3339, 14027, 34061, 65535),
    "para": b"para" + bytes(4) + struct.pack(">HHiiiii", 3, 0, 157286, 62119, 3417, 5072, 2651),  # sRGB's, times 65536
    "linear": b"curv" + bytes(8),
    "gamma 1.8": b"curv" + bytes(4) + struct.pack(">IH", 1, round(1.8 * 256)),
}


def profile(colorants: Any, curve: bytes, space: bytes = b"RGB ") -> bytes:
    """An ICC profile with a matrix and a curve, or for grey with a curve alone."""
    tags = {b"kTRC": curve}
    if space == b"RGB ":
        tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
        for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True):
            tags[name] = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(x * 2**16) for x in xyz))
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", 132 + len(table) + len(data), b"", 0x04000000, b"mntr", space, b"XYZ ")
    return head.ljust(128, b"\0") + table + data


PROFILES = {  # and True for sRGB
    "pillow": (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), True),
    "gamma 2.2": (profile(SRGB_COLORANTS, CURVES["gamma 2.2"]), True),
    "table": (profile(SRGB_COLORANTS, CURVES["table"]), True),
    "para": (profile(SRGB_COLORANTS, CURVES["para"]), True),
    "grey": (profile((), CURVES["gamma 2.2"], b"GRAY"), True),
    "linear": (profile(SRGB_COLORANTS, CURVES["linear"]), False),
    "gamma 1.8": (profile(SRGB_COLORANTS, CURVES["gamma 1.8"]), False),
    "grey 1.8": (profile((), CURVES["gamma 1.8"], b"GRAY"), False),
    "p3": (profile(P3_COLORANTS, CURVES["para"]), False),
    "lab": (profile(SRGB_COLORANTS, CURVES["para"]).replace(b"RGB ", b"Lab "), False),
    "lab as well": (ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), False),
    "cut": (profile(SRGB_COLORANTS, CURVES["para"])[:-30], False),
    "no profile": (b"nothing of the kind", False),
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_colour_profile_other_than_srgb_is_ignored_and_a_line_says_so(name: str, tmp_path: Path) -> None:
    icc, srgb = PROFILES[name]
    for path in (tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "a.webp"):
        Image.fromarray(COLOURS).save(path, icc_profile=icc)
        line = f"{path}: has a colour profile other than sRGB, which is ignored"
        assert said(lambda path=path: open_picture(path)) == ([] if srgb else [line])  # type: ignore[misc]
    with Image.open(tmp_path / "a.png") as image:
        lines = said(lambda: images.open_pictures(image, image, None, None, 8, 4))
        assert len(lines) == (0 if srgb else 2), "the image's and the mask's"


def test_training_says_the_same_in_a_line_for_all_of_a_kind(tmp_path: Path) -> None:
    """Once, also where the pictures are read again at every step."""
    for name in ("b.gif", "c.gif"):
        animation(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", icc_profile=PROFILES["p3"][0])
    sets: list[ImageFolder] = []
    assert said(lambda: sets.append(ImageFolder(tmp_path, 8, memory=0))) == [
        f"{tmp_path}: a colour profile other than sRGB, which is ignored, in 1 of 3 pictures: a.png",
        f"{tmp_path}: more than one frame, of which only the first is used, in 2 of 3 pictures: b.gif, c.gif",
    ]
    assert said(lambda: sets[0].take([0, 1, 2])) == []


def test_every_format_of_the_list_that_pillow_writes(tmp_path: Path) -> None:
    Image.init()
    written = 0
    for name in set(formats()) & set(Image.SAVE):
        Image.fromarray(COLOURS).save(tmp_path / "a", name)
        found = np.asarray(open_picture(tmp_path / "a").convert("RGB")).astype(int)
        lossless = name in ("PNG", "BMP", "TGA", "TIFF", "PPM", "QOI", "JPEG2000")
        assert np.abs(found - COLOURS).mean() <= (0 if lossless else 60), name
        written += 1
    assert written >= 8
    assert {".png", ".jfif", ".jpe", ".ppm", ".pgm", ".tga", ".mpo"} <= suffixes()
    assert not {".eps", ".ps", ".wmf", ".pdf", ".h5"} & suffixes()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
WHOLE = png(5, 1, 16, 0, SIXTEEN)
NO_PICTURES: dict[str, tuple[bytes, str]] = {
    "postscript": (POSTSCRIPT, "is none of PNG"),
    "dos postscript": (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(POSTSCRIPT)) + bytes(20) + POSTSCRIPT,
        "is none of",
    ),
    "wmf": (b"\xd7\xcd\xc6\x9a" + bytes(100), "is none of"),
    "emf": (b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(100), "is none of"),
    "fits": (b"SIMPLE  =                    T" + bytes(100), "is none of"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(200), ""),
    "cut": (WHOLE[:-30], ""),
    "crc": (WHOLE[:20] + b"\xff" + WHOLE[21:], ""),
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>", "a web page, not a picture"),
    "zero": (png(0, 0, 8, 0, b""), ""),
    "bomb": (png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"), ""),
    "text bomb": (WHOLE[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))) + WHOLE[33:], ""),
    "nan": (tiff(32, 1, np.array([0, np.nan], dtype="<f4").tobytes(), 2, 1, 3), "NaN"),
    "pickle": (b"\x80\4\x95" + bytes(40), "is none of"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
@pytest.mark.parametrize("called", ["a.png", "a.tif", "a"])
def test_what_is_no_picture_is_one_line(
    name: str, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called; and no program is started to look at it."""
    content, words = NO_PICTURES[name]
    (tmp_path / called).write_bytes(content)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"a program was started: {a}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="no readable picture") as caught:
            open_picture(tmp_path / called)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_no_file(tmp_path: Path) -> None:
    """None of these is waited for."""
    os.mkfifo(tmp_path / "pipe.png")
    for path, words in ((tmp_path / "pipe.png", "named pipe"), ("/dev/zero", "device"), (tmp_path, "is a folder")):
        with pytest.raises(CheckpointError, match=words):
            open_picture(path)
    with pytest.raises(CheckpointError, match=r"gone\.png: no such file; mask names a picture"):
        open_picture(tmp_path / "gone.png", "mask")


def test_pictures_of_extreme_shapes(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 3000), (60_000, 2), (65_535, 1)):
        Image.new("L", size, 77).save(tmp_path / "a.png")
        assert open_picture(tmp_path / "a.png").size == size
        assert read_pixels(tmp_path / "a.png", 8).unique().tolist() == [77]
    Image.new("L", (60_000, 2)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="60000 x 2 pixels is too small"):
        images.open_pictures(tmp_path / "a.png", None, None, None, 8, 4).resized()


def test_pictures_in_memory_that_cannot_be_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "PNG")
    buffer = io.BytesIO(buffer.getvalue()[:-40])
    for image in (Image.open(buffer), Image.new("RGB", (0, 5)), Image.fromarray(np.full((8, 8), np.nan, np.float32))):
        with pytest.raises(ConfigError, match="image cannot be read") as caught:
            images.open_pictures(image, None, None, None, 8, 4).resized()
        assert "\n" not in str(caught.value)


def test_the_list_of_formats_is_one_that_pillow_knows() -> None:
    Image.init()
    assert {*FORMATS} - {*Image.OPEN} <= {"HEIF", "AVIF", "QOI"}  # what an older Pillow lacks
    assert not {"EPS", "WMF", "PDF", "HDF5", "GRIB", "BUFR", "MPEG", "FITS"} & {*FORMATS}
