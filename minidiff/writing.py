"""Files that appear whole or not at all, and never in the place of another file that somebody wanted to keep.

What is written begins beside its place, under a name that cannot be guessed and that must not exist, and is locked
while it is written: a lock ends with its process, so whatever is unlocked was left by one that was killed, and is
removed. When all of it is on the disk, one operation of the system gives it its final name: one that fails where the
name is taken, unless the caller wants to replace. No link is followed; nothing but regular files and links is replaced.

Systems differ. POSIX gives a second name by ``link``, which fails where the name exists, and renames a folder over an
empty one only. File systems without hard links (FAT, some network shares) get a lock file beside the name instead. On
Windows ``rename`` itself fails where the name exists, but a file that is open, or mapped into memory, can be neither
renamed nor replaced: it is closed first, and leftovers are taken for dead only after a day. macOS takes names that
differ in case, or in how an accent is written, as one, which ``link`` knows; and its ``fsync`` stops at the cache of
the disk, so ``F_FULLFSYNC`` is asked for.
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
from minidiff.reading import KINDS

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Existing = Literal["replace", "refuse", "next"]

WINDOWS = os.name == "nt"
PART = re.compile(r"\..*\.minidiff-[0-9a-f]{16}\.part", re.DOTALL)  # the name of what is being written
OLD_PART = re.compile(r"\.\d+\.part")  # how it ended before, with the number of the process
LONGEST_NAME = 255  # bytes, where the file system does not say
LONG_AGO = 24 * 3600  # seconds; who still writes after that, where no lock can tell
TRIES = 100
NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR
# Never through a link, never waiting for the other end of a pipe, in bytes.
PLAIN = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
# What file systems say that cannot do it: make a hard link, sync a folder, take more.
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
    """A binary file that appears under ``path`` whole or not at all.

    ``existing``: what becomes of a file that has the name already, also of one that gets it meanwhile. "replace" takes
    its place (of a link it is the link that is replaced, never what it leads to); "refuse" raises :class:`ConfigError`;
    "next" takes the next free name, ``star-2.png`` after ``star.png``, which is then the ``path`` of what is yielded.

    Raises :class:`CheckpointError` before anything is written if the folder does not exist, or if ``path`` is a folder,
    a device or the like; a full disk and what else the system says come through as OSError, with what was written so
    far removed. The mode is that of any new file (umask).
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
    """A folder to fill, which appears under ``path`` whole or not at all; it never replaces one with files in it.

    Raises :class:`CheckpointError` before anything is written if the folder around it does not exist, or if ``path``
    does and is no empty folder; and at the end, if it is none any more. Whatever goes wrong while it is filled comes
    through, with all of it removed.
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
        if WINDOWS:  # which renames over nothing, not even over an empty folder
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
    """Raise what :func:`atomic` would raise at once: for who works long before there is something to write."""
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except ValueError as e:  # characters that no name can have
        raise CheckpointError(f"{os.fspath(path)!r}: is no name for a file ({e})") from None
    if existing == "next":
        return
    with suppress(FileNotFoundError):  # a link that leads nowhere is a link
        found = os.stat(path).st_mode
    if stat.S_ISDIR(found):
        raise CheckpointError(f"{path}: is a folder, and a file should be written there; name a file")
    if not stat.S_ISREG(found) and not stat.S_ISLNK(found):
        what = KINDS.get(stat.S_IFMT(found), "not a regular file")
        raise CheckpointError(f"{path}: is {what}, and only regular files are replaced; name another one")
    if existing == "refuse":
        raise ConfigError(_taken(path))


def append(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file to add to its end, made if it is not there; a link is not followed.

    Raises :class:`CheckpointError` for anything but a regular file, OSError for what the system refuses.
    """
    check_place(path)
    file = io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | PLAIN, 0o666), "a")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a regular file; name another one")
    return file


@contextmanager
def locked(path: str | os.PathLike[str], taken: str, *, wait: bool = False) -> Iterator[bool]:
    """A lock in the name of ``path``, by a file beside it that is gone afterwards; it ends with the process.

    Raises :class:`ConfigError` with ``taken`` if another has it (``wait``: comes when that is done). Yields whether
    there is a lock: some network file systems have none.
    """
    path = Path(path)
    lock = path.with_name(_hidden(path, ".minidiff.lock"))
    for _ in range(TRIES):
        opened = os.open(lock, os.O_CREAT | os.O_RDWR | PLAIN, 0o666)
        try:
            had = _lock(opened, wait=wait)
            if had is False:
                raise ConfigError(taken)
            if not _leads_to(lock, opened):  # who had it before has removed it
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
    """Remove what runs that were killed left in ``folder``: parts that nobody holds any more.

    ``name``: of a file whose parts may be called as they were before. What is no regular file or folder was not
    left by minidiff; it is neither opened nor removed.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            before = name and entry.name.startswith(f".{name}.") and OLD_PART.fullmatch(entry.name[len(name) + 1 :])
            if before or PART.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path))


def numbered(path: Path, n: int) -> Path:
    """The ``n``-th name like ``path``: itself, then ``star-2.png``, cut where that would be too long."""
    ending = f"-{n}{path.suffix}"
    return path if n == 1 else path.with_name(_cut(path.stem, _longest(path.parent), ending) + ending)


# --- the steps -------------------------------------------------------------------------------------------------------


def _create(path: Path, folder: bool = False) -> tuple[Path, int]:
    """Create the empty file or folder that will become ``path``; return its name, and it opened, which holds its lock.

    Nothing is written before it is locked. Someone who sweeps may see it before that, lock it first and remove it:
    then the name does not lead to it any more, and another one is made.
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
                continue  # removed between its making and its opening
            with suppress(OSError):
                part.rmdir() if folder else part.unlink()
            _name_the_file(e, part, path)
            raise
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))


def _place(part: Path, path: Path, existing: Existing) -> Path:
    """Give what is written its final name, in the one way that ``existing`` allows; the name that it got."""
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
    """Give ``part`` the name ``path``, in one operation that fails if the name exists; whether that was done."""
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
    if WINDOWS:  # between its closing and its renaming, a file that is alive looks dead
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
    """Lock what is open, until it is closed; False if another has it, None where the file system has no locks."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(opened, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        return False if e.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True


def _leads_to(path: Path, opened: int) -> bool:
    """Return True if the name still is that of the file or folder which is open, and of no link to it."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(opened))
    except FileNotFoundError:
        return False


def _sync(opened: int) -> None:
    """Bring a file's bytes to the disk. Raises OSError if that fails: then they are not there."""
    if sys.platform == "darwin":
        with suppress(OSError):  # a file system that does not know it
            fcntl.fcntl(opened, fcntl.F_FULLFSYNC)
            return
    os.fsync(opened)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can do that."""
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
    return f"{path}: exists already; name another one, or replace it with --force"


def _no_new_folder(path: Path) -> str:
    what = "a folder with files in it" if path.is_dir() else "a file"
    what = "a link" if path.is_symlink() else what
    what = "no name of a folder" if path.name in ("", "..") else what
    return f"{path}: is {what}, which is not replaced; name a folder that is new or empty"


def _name_the_file(e: BaseException, part: Path, path: Path) -> None:
    """Let an error of the system speak of the file that was asked for, and not of the name that was made up."""
    if isinstance(e, OSError) and (e.filename in (part, str(part)) or (e.filename is None and e.errno in FULL)):
        e.filename, e.filename2 = str(path), None


def _hidden(path: Path, ending: str) -> str:
    """A name beside ``path`` that begins as it does, as far as there is room."""
    return "." + _cut(path.name, _longest(path.parent) - 1, ending) + ending


def _cut(text: str, room: int, ending: str) -> str:
    """As many whole characters of ``text`` as leave room for ``ending``, counted in bytes."""
    room -= len(os.fsencode(ending))
    while len(os.fsencode(text)) > room:
        text = text[:-1]
    return text


def _longest(folder: Path) -> int:
    with suppress(OSError, ValueError, AttributeError):  # Windows does not say
        return min(LONGEST_NAME, os.pathconf(folder, "PC_NAME_MAX"))
    return LONGEST_NAME
