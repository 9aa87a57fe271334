"""Folder of the user's own pictures, of any size and format, with or without captions.

Every picture is read once at the beginning, so that a broken one is found before the training and not in its third
hour, and the others have numbers that do not change. Scaled down, a set usually fits into memory and is kept there.
Hidden files and folders, and those that programs create for themselves, are ignored; anything else that is left out is
reported.
"""

from __future__ import annotations

import json
import os
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from posixpath import normpath
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check, quote, within
from minidiff.console import warn
from minidiff.console.progress import counted
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.image_files import formats, open_picture, suffixes, to_eight_bits
from minidiff.storage.reading import open_regular, read_text
from minidiff.training.batch import Batch

if TYPE_CHECKING:
    from PIL import Image

MEMORY = 2**31  # bytes of pixels kept in memory; a larger folder is read again, picture by picture
NAMED = 5  # pictures that a message names
CAPTIONS = "metadata.jsonl"
LONGEST_LIST, LONGEST_CAPTION = 1 << 30, 1 << 20  # bytes
# Folders that programs create for themselves, besides hidden ones.
JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# Picture formats that are not read.
UNREAD = {
    *(".heic", ".heif", ".jxl", ".psd", ".svg", ".ico", ".eps", ".ai", ".exr", ".hdr", ".dds", ".xcf", ".kra", ".pcx"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".wmf", ".emf", ".djvu"),
}
# First bytes of picture files, for those whose names do not tell.
BEGINNINGS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"qoif",
    b"\0\0\0\x0cjP  ",
)


class ImageFolder:
    """Set of the pictures in ``path`` and its subfolders, cropped to squares of ``size`` pixels.

    Pictures are recognized by their name (``cat.png``) or their first bytes; of animations the first frame is used.
    Hidden files and folders are ignored. ``captions``: every picture must have one, in a text file beside it
    (``cat.png``, ``cat.txt``) or as a line of ``metadata.jsonl``: ``{"file_name": "cat.png", "text": "a cat"}``.

    Pictures that cannot be read are named in a warning, counted (``broken``) and left out; listed pictures that do not
    exist are counted as ``absent``. ``marks``: by name in the folder, a number that changes with the picture's pixels
    and its caption. Raises :class:`ConfigError` for a folder that does not exist or has no readable picture, and for
    missing captions.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        captions: bool = False,
        progress: bool | None = False,
        memory: int = MEMORY,
    ) -> None:
        within(1, 65536, size=size)
        self.path, self.size = Path(path), size
        check(self.path.is_dir(), f"{path}: there is no such folder of pictures")
        found, unread = self._search()
        check(bool(found), f"{path}: no pictures in this folder ({', '.join(formats())}){_and(unread, self.path)}")
        texts = self._read_captions(found) if captions else {}
        self.files: list[Path] = []
        self.broken: list[Path] = list(unread)
        self.marks: dict[str, int] = {}
        keep = len(found) * 3 * size**2 <= memory
        rows: list[Tensor] = []
        unused: dict[str, list[Path]] = {}
        for file in counted(found, "picture", show=progress, what="reading"):
            parts: list[str] = []
            try:
                row = read_pixels(file, size, parts.append)
            except (CheckpointError, OSError):
                self.broken.append(file)
                continue
            self.files.append(file)
            for part in parts:
                unused.setdefault(part, []).append(file)
            self.marks[_name(file, self.path)] = zlib.crc32(
                row.numpy().tobytes() + texts.get(file, "").encode(errors="surrogatepass")
            )
            if keep:
                rows.append(row)
        self._complain(len(found) + len(unread), unused)
        self.pixels = torch.stack(rows) if keep else None
        self.texts = [texts[file] for file in self.files] if captions else None

    def _search(self) -> tuple[list[Path], list[Path]]:
        """The pictures, in order, and what seems to be pictures of formats that are not read."""
        known, found, unread = suffixes(), list[Path](), list[Path]()
        for place, folders, names in os.walk(self.path, onerror=_refuse):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in JUNK]
            for file in (Path(place, name) for name in names if not name.startswith(".")):
                suffix = file.suffix.lower()
                if suffix in known or (suffix not in (".txt", ".json", ".jsonl", *UNREAD) and _begins_like_one(file)):
                    found.append(file)
                elif suffix in UNREAD:
                    unread.append(file)
        return sorted(found), sorted(unread)

    def _read_captions(self, files: Sequence[Path]) -> dict[Path, str]:
        """Return the caption of each file; a warning names listed pictures that do not exist."""
        listed = read_list(self.path / CAPTIONS) if (self.path / CAPTIONS).is_file() else {}
        self.absent = sorted(listed.keys() - {_name(file, self.path) for file in files})
        if self.absent:
            count = f"{len(self.absent)} of {len(listed)} names belong to no existing picture"
            warn(f"{self.path / CAPTIONS}: {count}: {_first(self.absent)}", stacklevel=3)
        return read_captions(self.path, files, listed)

    def _complain(self, found: int, unused: Mapping[str, Sequence[Path]]) -> None:
        """Warn of pictures that are left out, and of parts of pictures that are not used."""
        names = _first(_name(f, self.path) for f in self.broken)
        count = f"{len(self.broken)} of {found} pictures cannot be read"
        check(bool(self.files), f"{self.path}: {count}: {names}; nothing is left to train on")
        if self.broken:
            warn(f"{self.path}: {count} and are left out: {names}", stacklevel=3)
        for part, files in unused.items():
            names = _first(_name(f, self.path) for f in files)
            warn(f"{self.path}: {part}, in {len(files)} of {found} pictures: {names}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the given pictures. Raises :class:`CheckpointError` for a file damaged since the start of the run."""
        if self.pixels is not None:
            pixels = self.pixels[list(indices)]
        else:
            pixels = torch.stack([self._read_again(self.files[i]) for i in indices])
        texts = None if self.texts is None else [self.texts[i] for i in indices]
        return Batch(pixels.float() / 127.5 - 1, texts)

    def _read_again(self, file: Path) -> Tensor:
        try:
            return read_pixels(file, self.size, lambda part: None)  # told when the run began
        except (CheckpointError, OSError) as e:
            raise CheckpointError(f"{file}: could be read when the run began, and now it cannot ({e})") from None


def _refuse(e: OSError) -> NoReturn:
    """Raise the error of a folder that cannot be opened, which the search would skip."""
    raise e


def _name(file: Path, folder: Path) -> str:
    """Return the name of a file in a set: its path in the folder, with slashes and composed letters."""
    return unicodedata.normalize("NFC", file.relative_to(folder).as_posix())


def _first(names: Iterable[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _and(unread: Sequence[Path], folder: Path) -> str:
    return f", but {len(unread)} of formats that are not read: {_first(_name(f, folder) for f in unread)}" * bool(
        unread
    )


def _begins_like_one(file: Path) -> bool:
    """Return True if the first bytes of a file are those of a picture."""
    if not file.is_file():
        return False
    try:
        with open_regular(file) as opened:
            head = opened.read(16)
    except (OSError, CheckpointError):
        return False
    boxed = head[4:8] == b"ftyp" and head[8:11] in (b"avi", b"mif", b"hei")
    return head.startswith(BEGINNINGS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or boxed


def read_pixels(path: Path, size: int, tell: Callable[[str], object] | None = None) -> Tensor:
    """Read a picture file as uint8 (3, size, size). ``tell`` is that of :func:`open_picture`.

    Raises :class:`CheckpointError` if it is no picture, or damaged.
    """
    return to_pixels(open_picture(path, tell=tell), size)


def to_pixels(image: Image.Image | Tensor | Any, size: int) -> Tensor:
    """Resize a picture of any mode to a short side of ``size`` and crop its centre to uint8 (3, size, size).

    Transparent pixels become white.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        image = Image.fromarray(array if array.ndim == 2 else array.transpose(1, 2, 0))
    image = to_eight_bits(image).convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_captions(folder: Path, files: Sequence[Path], listed: Mapping[str, str]) -> dict[Path, str]:
    """Return the caption of each file, from the list or the file beside it.

    Raises :class:`ConfigError` if captions are missing, saying how many, or if one is unreadable.
    """
    texts: dict[Path, str] = {}
    for file in files:
        beside = file.with_suffix(".txt")
        name = _name(file, folder)
        if name in listed:
            texts[file] = listed[name]
        elif beside.is_file():
            try:
                texts[file] = read_text(beside, LONGEST_CAPTION).strip()
            except CheckpointError:
                raise ConfigError(f"{beside}: a caption must be a short text in UTF-8, and this is not") from None
    missing = [f for f in files if f not in texts]
    if missing:
        where = f"a .txt file beside it or a line of {CAPTIONS}"
        raise ConfigError(
            f"{missing[0]}: has no caption ({where}); so do {len(missing)} of {len(files)} pictures in {folder}"
        )
    return texts


def read_list(path: Path) -> dict[str, str]:
    """Read metadata.jsonl as a dict from file name to text; a warning names duplicates.

    Raises :class:`ConfigError`, naming the line, for an invalid line, and :class:`CheckpointError` if it is not text.
    """
    found: dict[str, str] = {}
    twice: dict[str, None] = {}
    # Only a line feed ends a line: JSON strings may contain U+2028 and other line ends unescaped.
    for number, line in enumerate(read_text(path, LONGEST_LIST).split("\n"), 1):
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
        name = unicodedata.normalize("NFC", normpath(name))
        if found.get(name, text) != text:
            twice[name] = None
        found[name] = text
    if twice:
        warn(f"{path}: {len(twice)} names occur more than once, the last one counts: {_first(twice)}", stacklevel=4)
    return found
