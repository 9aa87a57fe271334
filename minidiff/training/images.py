"""A folder of the user's own pictures, of any size and format, with or without captions.

Every picture is read once, at the beginning: so a broken one is found before the training and not in its third hour,
and what is left has numbers that do not change. Scaled down, a set usually fits into memory, and is kept there.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check, quote, within
from minidiff.errors import CheckpointError, ConfigError
from minidiff.training.batch import Batch

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MEMORY = 2**31  # bytes of pixels that are kept; a larger folder is read again, picture by picture
NAMED = 5  # how many broken pictures a message names
CAPTIONS = "metadata.jsonl"


class ImageFolder:
    """The pictures in ``path`` and in its folders, cut to squares of ``size`` pixels; ``take`` gives a batch of them.

    ``captions``: each picture has one, in a text file beside it (``cat.png``, ``cat.txt``) or as a line of
    ``metadata.jsonl``: ``{"file_name": "cat.png", "text": "a cat"}``. Pictures that cannot be read are named in a
    warning, counted (``broken``), and left out. Raises :class:`ConfigError` for a folder that does not exist or has no
    picture that can be read, and for captions that are missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        captions: bool = False,
        progress: bool = False,
        memory: int = MEMORY,
    ) -> None:
        from tqdm import tqdm

        within(1, 65536, size=size)
        self.path, self.size = Path(path), size
        check(self.path.is_dir(), f"{path}: there is no such folder of pictures")
        found = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        check(bool(found), f"{path}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
        texts = read_captions(self.path, found) if captions else {}
        self.files: list[Path] = []
        self.broken: list[Path] = []
        keep = len(found) * 3 * size**2 <= memory
        rows: list[Tensor] = []
        for file in tqdm(found, desc="reading pictures", unit="picture", disable=not progress, leave=False):
            try:
                row = read(file, size)
            except DAMAGE:
                self.broken.append(file)
                continue
            self.files.append(file)
            if keep:
                rows.append(row)
        self._complain(len(found))
        self.pixels = torch.stack(rows) if keep else None
        self.texts = [texts[file] for file in self.files] if captions else None

    def _complain(self, found: int) -> None:
        names = ", ".join(str(f.relative_to(self.path)) for f in self.broken[:NAMED])
        more = f" and {len(self.broken) - NAMED} more" if len(self.broken) > NAMED else ""
        count = f"{len(self.broken)} of {found} pictures cannot be read"
        check(bool(self.files), f"{self.path}: {count}: {names}{more}; nothing is left to train on")
        if self.broken:
            warnings.warn(f"{self.path}: {count} and are left out: {names}{more}", stacklevel=4)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Sequence[int]) -> Batch:
        """Those pictures. Raises :class:`CheckpointError` for a file that has broken since the beginning."""
        if self.pixels is not None:
            pixels = self.pixels[list(indices)]
        else:
            pixels = torch.stack([self._read_again(self.files[i]) for i in indices])
        texts = None if self.texts is None else [self.texts[i] for i in indices]
        return Batch(pixels.float() / 127.5 - 1, texts)

    def _read_again(self, file: Path) -> Tensor:
        try:
            return read(file, self.size)
        except DAMAGE as e:
            raise CheckpointError(f"{file}: could be read when the run began, and now it cannot ({e})") from None


def read(path: Path, size: int) -> Tensor:
    """One picture file as uint8 (3, size, size). Raises one of ``DAMAGE`` if it is none."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's remarks on odd metadata
        try:
            with Image.open(path) as image:
                return to_pixels(ImageOps.exif_transpose(image), size)
        except Image.DecompressionBombError as e:
            raise ValueError(str(e)) from None


# What the library raises for files that are damaged.
DAMAGE = (OSError, ValueError, TypeError, SyntaxError, IndexError, struct.error)


def to_pixels(image: Image.Image | Tensor | Any, size: int) -> Tensor:
    """A picture of any mode and size -> uint8 (3, size, size): the short side is brought to ``size``, the middle cut.

    What is transparent becomes white.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        image = Image.fromarray(array if array.ndim == 2 else array.transpose(1, 2, 0))
    if image.mode.startswith("I"):  # 16 bits of grey, which the library would cut off at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_captions(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The caption of each file. Raises :class:`ConfigError` if any has none, saying how many, or one is unreadable."""
    listed = read_list(folder / CAPTIONS) if (folder / CAPTIONS).is_file() else {}
    texts: dict[Path, str] = {}
    for file in files:
        beside = file.with_suffix(".txt")
        name = file.relative_to(folder).as_posix()
        if name in listed:
            texts[file] = listed[name]
        elif beside.is_file():
            try:
                texts[file] = beside.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ConfigError(f"{beside}: a caption should be text in UTF-8, and this is not") from None
    missing = [f for f in files if f not in texts]
    if missing:
        where = f"a .txt file beside it or a line of {CAPTIONS}"
        raise ConfigError(
            f"{missing[0]}: has no caption ({where}); so do {len(missing)} of {len(files)} pictures in {folder}"
        )
    return texts


def read_list(path: Path) -> dict[str, str]:
    """metadata.jsonl as a dict from file name to text. Raises :class:`ConfigError`, naming the line, if it is wrong."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: should be text in UTF-8, and is not") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            example = '{"file_name": "cat.png", "text": "a cat"}'
            raise ConfigError(f"{path}, line {number}: {quote(line)} should be an object like {example}")
        found[name] = text
    return found
