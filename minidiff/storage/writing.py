"""Atomic writing: files appear whole or not at all, and never replace a file that should be kept.

A file is first written beside its destination, under an unpredictable name that must not exist, and is locked while it
is written. A lock ends with its process, so an unlocked leftover belongs to a process that was killed, and is removed.
When all data is on disk, a single system call gives the file its final name; unless the caller wants to replace, that
call fails if the name is taken. Links are not followed, and only regular files and links are replaced.

Systems differ. POSIX adds a second name by ``link``, which fails if the name exists, and renames a folder only over an
empty one. On file systems without hard links (FAT, some network shares) a lock file beside the name is used instead. On
Windows ``rename`` itself fails if the name exists, but a file that is open or memory-mapped can be neither renamed nor
replaced: it is closed first, and leftovers are considered dead only after a day. macOS treats names that differ in case
or in the encoding of accents as equal, and so does ``link``; its ``fsync`` stops at the cache of the disk, so
``F_FULLFSYNC`` is used.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage.reading import KINDS

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Existing = Literal["replace", "refuse", "next"]

WINDOWS = os.name == "nt"
PART = re.compile(r"\..*\.minidiff-[0-9a-f]{16}\.part", re.DOTALL)  # name of a file that is being written
OLD_PART = re.compile(r"\.\d+\.part")  # ending in older versions, with the process id
LONGEST_NAME = 255  # bytes, if the file system does not say
LONG_AGO = 24 * 3600  # seconds after which a leftover counts as dead where locks cannot tell
TRIES = 100
NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR
# Do not follow links, do not wait for the other end of a pipe, use binary mode.
PLAIN = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
# Errors of file systems that lack an operation: making a hard link or another one, syncing a folder.
UNABLE = {
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EBADF,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Part(io.BufferedRandom):
    """A file that is being written. ``path``: its final name, once it has it."""

    path: Path


@contextmanager
def atomic(path: str | os.PathLike[str], existing: Existing = "replace") -> Iterator[Part]:
    """Open a binary file that appears under ``path`` whole or not at all.

    ``existing``: treatment of a file with the same name, even if it appears during writing. "replace" replaces it (for
    a link, the link and never its target); "refuse" raises :class:`ConfigError`; "next" takes the next free name,
    ``star-2.png`` after ``star.png``, which is the ``path`` of the yielded file.

    Raises :class:`CheckpointError` before anything is written if the folder does not exist, or if ``path`` is a folder,
    a device or the like. A full disk and other errors of the system are raised as OSError, after the partial file is
    removed. The mode is that of any new file (umask).
    """
    path = Path(path)
    check_place(path, existing)
    sweep(path.parent, path.name)
    part, opened = _create(path)
    try:
        with Part(io.FileIO(opened, "r+")) as file:
            yield file
            file.flush()
            _sync(opened)
            if WINDOWS:  # cannot rename what is open
                file.close()
            file.path = _place(part, path, existing)
    except BaseException as e:
        with suppress(OSError):
            part.unlink()
        _name_the_file(e, part, path)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a folder that appears under ``path`` whole or not at all; it never replaces one with files in it.

    Raises :class:`CheckpointError` before anything is written if the parent folder does not exist, or if ``path``
    exists and is not an empty folder, and at the end if that has changed. Errors while it is filled are raised after
    the partial folder is removed.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if path.name in ("", "..") or (os.path.lexists(path) and not empty):
        raise CheckpointError(_no_new_folder(path))
    sweep(path.parent, path.name)
    part, opened = _create(path, folder=True)
    try:
        yield part
        for folder in (part, *(p for p in part.rglob("*") if p.is_dir())):
            _sync_folder(folder)
        if WINDOWS:  # which cannot rename to an existing name, not even over an empty folder
            with suppress(OSError):
                path.rmdir()
        try:
            part.rename(path)
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) or (WINDOWS and path.exists()):
                raise CheckpointError(_no_new_folder(path)) from None
            raise
    except BaseException as e:
        shutil.rmtree(part, ignore_errors=True)
        _name_the_file(e, part, path)
        raise
    finally:
        os.close(opened)
    _sync_folder(path.parent)


def check_place(path: str | os.PathLike[str], existing: Existing = "replace") -> None:
    """Raise the errors that :func:`atomic` would raise before writing. Call it before a long computation."""
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except ValueError as e:  # characters that names cannot have
        raise CheckpointError(f"{os.fspath(path)!r}: is not a valid file name ({e})") from None
    if existing == "next" and (stat.S_ISREG(found) or stat.S_ISLNK(found)):
        return
    with suppress(FileNotFoundError):  # a link that leads nowhere is a link
        found = os.stat(path).st_mode
    if stat.S_ISDIR(found):
        raise CheckpointError(f"{path}: is a folder; name a file")
    if not stat.S_ISREG(found) and not stat.S_ISLNK(found):
        what = KINDS.get(stat.S_IFMT(found), "not a regular file")
        raise CheckpointError(f"{path}: is {what}, and only regular files are replaced; name another one")
    if existing == "refuse":
        raise ConfigError(_taken(path))


def append(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for appending; create it if it does not exist. Links are not followed.

    Raises :class:`CheckpointError` for anything but a regular file, and OSError for errors of the system.
    """
    check_place(path)
    file = io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | PLAIN, 0o666), "a")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a regular file; name another one")
    return file


@contextmanager
def locked(path: str | os.PathLike[str], taken: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock for ``path``, by a file beside it that is removed afterwards; it ends with the process.

    Raises :class:`ConfigError` with ``taken`` if another process has it (``wait``: wait for it instead). Yields False
    if there is no lock, as on some network file systems.
    """
    path = Path(path)
    lock = path.with_name(_hidden(path, ".minidiff.lock"))
    for _ in range(TRIES):
        opened = os.open(lock, os.O_CREAT | os.O_RDWR | PLAIN, 0o666)
        try:
            had = _lock(opened, wait=wait)
            if had is False:
                raise ConfigError(taken)
            if not _leads_to(lock, opened):  # its previous holder has removed it
                continue
            try:
                yield had is True
            finally:
                if not WINDOWS:  # while it is locked, or it might be another's
                    lock.unlink(missing_ok=True)
            break
        finally:
            os.close(opened)
    else:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(lock))
    if WINDOWS:
        with suppress(OSError):
            lock.unlink()


def sweep(folder: Path, name: str = "") -> None:
    """Remove leftovers of killed runs from ``folder``: unlocked partial files.

    ``name``: name of a file whose partial files may have the ending of older versions. Anything but regular files and
    folders was not left by minidiff, and is neither opened nor removed.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            before = name and entry.name.startswith(f".{name}.") and OLD_PART.fullmatch(entry.name[len(name) + 1 :])
            if before or PART.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path))


def numbered(path: Path, n: int) -> Path:
    """Return the ``n``-th name like ``path``: itself, then ``star-2.png``, shortened if it would be too long."""
    ending = f"-{n}{path.suffix}"
    return path if n == 1 else path.with_name(_cut(path.stem, _longest(path.parent), ending) + ending)


def _create(path: Path, folder: bool = False) -> tuple[Path, int]:
    """Create the empty file or folder that will become ``path``; return its name, and it opened, which holds its lock.

    Nothing is written before it is locked. A concurrent :func:`sweep` may see it earlier, lock it and remove it; then
    the name no longer leads to it, and another one is created.
    """
    for _ in range(TRIES):
        part = path.with_name(_hidden(path, f".minidiff-{secrets.token_hex(8)}.part"))
        try:
            if folder:
                part.mkdir()
                if WINDOWS:  # which opens no folders
                    return part, os.open(os.devnull, os.O_RDONLY)
                opened = os.open(part, os.O_RDONLY | PLAIN)
            else:
                opened = os.open(part, NEW | PLAIN, 0o666)
            if _lock(opened) is not False and _leads_to(part, opened):
                return part, opened
            os.close(opened)
        except FileExistsError:
            continue
        except BaseException as e:
            if folder and isinstance(e, FileNotFoundError) and path.parent.is_dir():
                continue  # removed between its creation and its opening
            with suppress(OSError):
                part.rmdir() if folder else part.unlink()
            _name_the_file(e, part, path)
            raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))


def _place(part: Path, path: Path, existing: Existing) -> Path:
    """Give the written file its final name, as ``existing`` allows, and return that name."""
    if existing == "replace":
        check_place(path)
        os.replace(part, path)
        return path
    n = 1
    while not _take(part, found := numbered(path, n)):
        if existing == "refuse":
            raise ConfigError(_taken(path))
        n += 1
    return found


def _take(part: Path, path: Path) -> bool:
    """Give ``part`` the name ``path``, in one operation that fails if the name exists. Return True on success."""
    try:
        (os.rename if WINDOWS else os.link)(part, path)
    except FileExistsError:
        return False
    except OSError as e:
        if WINDOWS or e.errno not in UNABLE:
            raise
        with locked(path, "", wait=True) as sure:
            if not sure:
                why = "this file system has neither links nor locks, so another's file might be lost; use another one"
                raise OSError(e.errno, why, str(path)) from None
            if os.path.lexists(path):
                return False
            os.rename(part, path)
        return True
    if not WINDOWS:
        with suppress(OSError):
            part.unlink()
    return True


def _remove_if_dead(part: Path) -> None:
    found = os.lstat(part)
    folder = stat.S_ISDIR(found.st_mode)
    if not (folder or stat.S_ISREG(found.st_mode)):
        return
    old = time.time() - found.st_mtime > LONG_AGO
    if WINDOWS:  # between closing and renaming, a file in use looks dead
        if old and not folder:
            part.unlink()  # which fails while it is open
        return
    opened = os.open(part, (os.O_RDONLY if folder else os.O_RDWR) | PLAIN)
    try:
        had = _lock(opened)
        if (had or (had is None and old)) and _leads_to(part, opened):
            shutil.rmtree(part) if folder else part.unlink()
    finally:
        os.close(opened)


def _lock(opened: int, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed. Return False if it is locked already, None if there are no locks."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(opened, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        return False if e.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True


def _leads_to(path: Path, opened: int) -> bool:
    """Return True if the name still belongs to the open file or folder itself, not to a link to it."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(opened))
    except FileNotFoundError:
        return False


def _sync(opened: int) -> None:
    """Flush a file's bytes to the disk. Raises OSError if that fails."""
    if sys.platform == "darwin":
        with suppress(OSError):  # not supported by this file system
            fcntl.fcntl(opened, fcntl.F_FULLFSYNC)
            return
    os.fsync(opened)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can do that."""
    if WINDOWS:
        return
    try:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as e:
        if e.errno not in UNABLE:
            e.filename = str(folder)
            raise


def _taken(path: Path) -> str:
    return f"{path}: already exists; name another one, or replace it with --force"


def _no_new_folder(path: Path) -> str:
    what = "a folder with files in it" if path.is_dir() else "a file"
    what = "a link" if path.is_symlink() else what
    what = "not a folder name" if path.name in ("", "..") else what
    return f"{path}: is {what}, which is not replaced; name a folder that is new or empty"


def _name_the_file(e: BaseException, part: Path, path: Path) -> None:
    """Put the requested file name into an error of the system, in place of the temporary one."""
    if isinstance(e, OSError) and (e.filename in (part, str(part)) or (e.filename is None and e.errno in FULL)):
        e.filename, e.filename2 = str(path), None


def _hidden(path: Path, ending: str) -> str:
    """Return a name beside ``path`` that starts like it, as far as there is room."""
    return "." + _cut(path.name, _longest(path.parent) - 1, ending) + ending


def _cut(text: str, room: int, ending: str) -> str:
    """Return as many whole characters of ``text`` as leave room for ``ending``, counted in bytes."""
    room -= len(os.fsencode(ending))
    while len(os.fsencode(text)) > room:
        text = text[:-1]
    return text


def _longest(folder: Path) -> int:
    with suppress(OSError, ValueError, AttributeError):  # Windows does not say
        return min(LONGEST_NAME, os.pathconf(folder, "PC_NAME_MAX"))
    return LONGEST_NAME
