"""Output: pixels become PNG files that carry their recipe, and the recipe is read back.

The recipe is JSON in a text chunk under the key "minidiff". To read it, only the chunks of text are parsed (tEXt, zTXt
and iTXt; PNG 3rd edition, section 11.3.3): the picture itself may be large, or damaged, and is not decoded.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.console import one_line
from minidiff.errors import CheckpointError
from minidiff.storage.reading import open_regular
from minidiff.storage.writing import Existing, atomic

if TYPE_CHECKING:
    from PIL import Image

KEY = "minidiff"
LONGEST_RECIPE = 16 << 20  # bytes: room for the longest prompt
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MOST_CHUNKS = 1 << 20  # of a file; the pixels of a picture of a gigabyte are in some 100,000


def to_unit(pixels: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1]; values outside are clamped."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert float (B, 3 or 1, H, W) in [0, 1] to PIL images, rounded to the nearest of 256 levels."""
    from PIL import Image

    arrays = (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def save_png(image: Image.Image, path: str | os.PathLike[str], existing: Existing = "replace") -> Path:
    """Write ``image`` to ``path`` as PNG, atomically, with the recipe that ``generate`` left in it; return the path.

    ``existing``: treatment of a file that has the name already. "replace" takes its place, "refuse" raises
    :class:`ConfigError`, "next" takes the next free name: ``star-2.png`` after ``star.png``.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if KEY in image.info:
        info.add_text(KEY, image.info[KEY])
    with atomic(path, existing) as file:
        image.save(file, format="PNG", pnginfo=info)
    return file.path


def label(image: Image.Image, recipe: dict[str, Any]) -> Image.Image:
    """Put ``recipe`` into ``image``, as JSON in ASCII, so that any prompt survives any PNG reader."""
    image.info[KEY] = json.dumps(recipe)
    return image


def read_recipe(image: Image.Image | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the recipe of a picture or of a PNG file.

    Raises :class:`CheckpointError` for a file that is no PNG, and for a picture whose recipe is missing or damaged.
    """
    if isinstance(image, (str, os.PathLike)):
        name, text = os.fspath(image), text_of(image, KEY, LONGEST_RECIPE)
    else:
        name, text = "the picture", image.info.get(KEY)
    if text is None:
        raise CheckpointError(f"{name}: carries no recipe; it was not saved by minidiff")
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{name}: its recipe is damaged ({one_line(e, 200)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: its recipe is damaged, a {type(found).__name__} where an object should be")
    return found


def text_of(path: str | os.PathLike[str], key: str, most: int) -> str | None:
    """Return the first text in a PNG file under ``key``, or None.

    Raises :class:`CheckpointError` for a file that is no PNG, and for a text that is damaged or longer than ``most``
    bytes.
    """
    for kind, data in _texts(path, most):
        name, _, rest = data.partition(b"\0")
        if name == key.encode("latin-1"):
            try:
                return _decoded(kind, rest, most)
            except (ValueError, IndexError, zlib.error) as e:  # UnicodeDecodeError is a ValueError
                raise CheckpointError(f"{os.fspath(path)}: its text {key!r} is damaged ({e})") from None
    return None


def _texts(path: str | os.PathLike[str], most: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, content) of every chunk of text."""
    with open_regular(path) as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise CheckpointError(f"{os.fspath(path)}: carries no recipe; pictures of minidiff are PNG files")
        for _ in range(MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return
            length, kind = struct.unpack(">I4s", head)
            if kind not in TEXTS:
                file.seek(length + 4, os.SEEK_CUR)
                continue
            if length > most:
                raise CheckpointError(f"{os.fspath(path)}: has a text of {length:,} bytes; {most:,} is the most")
            data, check = file.read(length), file.read(4)
            if len(data) < length or check != struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))):
                raise CheckpointError(f"{os.fspath(path)}: a text in it is damaged; get the picture again")
            yield kind, data


def _decoded(kind: bytes, data: bytes, most: int) -> str:
    """Decode the bytes after a text's name, led by a compression method in two of the kinds, by languages in one."""
    if kind == b"tEXt":
        return data.decode("latin-1")
    if kind == b"zTXt":
        return _inflated(data[1:], most).decode("latin-1")
    packed = data[0] != 0
    _, _, rest = data[2:].partition(b"\0")  # the language
    _, _, rest = rest.partition(b"\0")  # the name in it
    return (_inflated(rest, most) if packed else rest).decode("utf-8")


def _inflated(data: bytes, most: int) -> bytes:
    inflate = zlib.decompressobj()
    out = inflate.decompress(data, most)
    if inflate.unconsumed_tail or not inflate.eof:
        raise ValueError(f"it is cut short, or longer than {most:,} bytes")
    return out
