"""Reading of files that come from outside.

Only regular files are opened: reading a FIFO may wait forever, and a device may never end. Texts are read up to a
maximum number of bytes, since the size that a file system reports need not be true. The kind of a file is determined by
its first bytes, never by its name: people rename files, and clones without Git LFS contain text files instead.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import Any, BinaryIO, Literal

from minidiff.errors import CheckpointError

Content = Literal["safetensors", "torch zip", "pickle", "lfs pointer", "web page", "gguf", "png", "text", "empty", "?"]

LONGEST_TEXT = 64 << 20  # bytes; the largest JSON file in practice, a tokenizer.json, has a few million
HEAD = 512  # bytes that tell what a file holds
PICKLES: tuple[Content, ...] = ("torch zip", "pickle")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# Files that are not models, and what to do about it.
MISTAKEN: dict[Content, str] = {
    "lfs pointer": "a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned",
    "web page": "a web page, not a model; the download failed (perhaps it needs a login)",
    "gguf": "a GGUF file, which minidiff does not read; get the .safetensors of the same model",
    "png": "a picture",
    "text": "a text",
    "empty": "empty",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes; links are followed.

    Raises :class:`CheckpointError` for a path that is missing, and for a folder, a named pipe, a device or a socket,
    without waiting for any of them; OSError for what the system refuses.
    """
    require_regular(path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    opened = os.open(path, flags)
    try:
        _require_mode(path, os.fstat(opened).st_mode)  # the path may lead elsewhere by now
        return os.fdopen(opened, "rb")
    except BaseException:
        os.close(opened)
        raise


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise :class:`CheckpointError` unless ``path`` is a regular file or a link to one.

    For libraries that open files themselves.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise CheckpointError(missing(path)) from None
        raise
    except ValueError as e:  # a null character in the name
        raise CheckpointError(f"{os.fspath(path)!r}: no such file ({e})") from None
    _require_mode(path, mode)


def missing(path: str | os.PathLike[str], what: str = "file") -> str:
    """Return one line about a path that does not exist, with advice for an address or a name on a model hub."""
    name = os.fspath(path)
    hint = ""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):
        hint = "; it is an address, and minidiff fetches nothing: download it, and name the file"
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not os.path.exists(name.partition("/")[0]):
        hint = "; if it is a name on a model hub: minidiff fetches nothing, download it first"
    return f"{name}: no such {what}{hint}"


def _require_mode(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise CheckpointError(f"{os.fspath(path)}: is {what}; name a regular file")


def read_bytes(path: str | os.PathLike[str], most: int = LONGEST_TEXT) -> bytes:
    """Read a regular file whole. Raises :class:`CheckpointError` as :func:`open_regular`, and beyond ``most`` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CheckpointError(f"{os.fspath(path)}: is longer than {most:,} bytes, the limit for such a file")
    return data


def read_text(path: str | os.PathLike[str], most: int = LONGEST_TEXT) -> str:
    """Read a regular file as UTF-8, with or without a byte order mark; line ends become "\\n".

    Raises :class:`CheckpointError` for anything else, and beyond ``most`` bytes.
    """
    data = read_bytes(path, most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError(f"{os.fspath(path)}: must be text in UTF-8, and is not") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], most: int = LONGEST_TEXT) -> Any:
    """Read a JSON file. Raises :class:`CheckpointError`, with the reason, for anything else."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{os.fspath(path)}: not valid JSON ({e or type(e).__name__})") from None


def read_object(path: str | os.PathLike[str], most: int = LONGEST_TEXT) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises :class:`CheckpointError` for anything else."""
    found = read_json(path, most)
    if not isinstance(found, dict):
        raise CheckpointError(f"{os.fspath(path)}: holds a {type(found).__name__}; it must hold a JSON object")
    return found


def content(path: str | os.PathLike[str]) -> Content:
    """Return the kind of a file by its first bytes; "?" if it is unknown."""
    with open_regular(path) as file:
        return content_of(file.read(HEAD))


def content_of(head: bytes) -> Content:
    """Return the kind of the file that begins with ``head``, its first 512 bytes."""
    start = head.lstrip().lower()
    if not head:
        return "empty"
    if head[8:9] == b"{" and head[7:8] == b"\0":  # eight bytes of length, little-endian, then JSON
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        return "lfs pointer"
    if start.startswith((b"<!doctype html", b"<html")):
        return "web page"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    printable = all(c >= 0x20 or c in b"\t\n\r\f" for c in head)
    return "text" if printable and _is_utf8(head) else "?"


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.reason == "unexpected end of data"  # a character that is cut off by the end of the head
    return True


def mistaken(path: str | os.PathLike[str]) -> str | None:
    """Describe a file that cannot be a model, to follow "PATH: is ..."; None if it may be one."""
    with open_regular(path) as file:
        head = file.read(HEAD)
        size = os.fstat(file.fileno()).st_size
    what = MISTAKEN.get(content_of(head))
    return None if what is None else f"{what} ({size:,} bytes)" if head else what
