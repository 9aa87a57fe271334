"""The texts of a PNG file, without its pixels: the chunks tEXt, zTXt and iTXt (PNG 3rd edition, section 11.3.3).

A recipe is wanted and not the picture, which may be large, damaged or made to be large; so nothing is decoded.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator

from minidiff.errors import CheckpointError
from minidiff.storage.reading import open_regular

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MOST_CHUNKS = 1 << 20  # of a file; the pixels of a picture of a gigabyte are in some 100,000


def text(path: str | os.PathLike[str], key: str, most: int) -> str | None:
    """The first text in a PNG file under ``key``, None where there is none.

    Raises :class:`CheckpointError` for what is no PNG file, for a text that is damaged or longer than ``most`` bytes.
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
    """(type, content) of every chunk of text."""
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
