"""Writing of files: whole or not at all, and never over a file that another program wrote."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage import writing
from minidiff.storage.files import lazy, write_tensors
from minidiff.storage.writing import PART, append, atomic, atomic_folder, check_place, locked, numbered, sweep

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and locks of POSIX")


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def put(path: Path, content: bytes, existing: writing.Existing = "replace") -> Path:
    with atomic(path, existing) as file:
        file.write(content)
    return file.path


def read(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_all_or_nothing(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as file:
        file.write(b"one")
        assert "a" not in left_in(tmp_path)  # not under its name before it is whole
        file.write(b"two")
    assert file.path == tmp_path / "a"
    assert read(tmp_path) == {"a": b"onetwo"}
    with atomic(str(tmp_path / "a")) as file:  # again, over the old one
        file.write(b"three")
    assert read(tmp_path) == {"a": b"three"}


def test_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("a"), b"x")
    assert left_in(tmp_path) == ["a"]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, error: type[BaseException], old: bytes | None) -> None:
    if old is not None:
        (tmp_path / "a").write_bytes(old)

    def fail() -> None:
        with atomic(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert read(tmp_path) == ({} if old is None else {"a": old})


@pytest.mark.parametrize("existing", ["replace", "refuse", "next"])
@pytest.mark.parametrize("step", ["fsync", "the last"])
def test_a_failure_at_the_end_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: Any
) -> None:
    name = "b" if existing == "refuse" else "a"
    (tmp_path / "a").write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    last = "replace" if existing == "replace" else "rename" if writing.WINDOWS else "link"
    monkeypatch.setattr(os, last if step == "the last" else step, fail)
    with pytest.raises(OSError, match="the disk is gone"):
        put(tmp_path / name, b"new", existing)
    assert read(tmp_path) == {"a": b"old"}


@posix
@pytest.mark.parametrize(("number", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fatal: bool
) -> None:
    """Some file systems do not know how to; a disk that fails is another matter, though the file is there by then."""
    real = os.fsync
    calls: list[int] = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(number, "not for folders")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if fatal:
        with pytest.raises(OSError, match="not for folders") as caught:
            put(tmp_path / "a", b"x")
        assert caught.value.filename == str(tmp_path)
    else:
        put(tmp_path / "a", b"x")
    assert len(calls) == 2
    assert read(tmp_path) == {"a": b"x"}


def test_macos_is_asked_to_empty_the_cache_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fcntl(opened: int, what: int) -> None:
        asked.append(what)
        if len(asked) > 1:
            raise OSError(errno.ENOTSUP, "what is that")

    synced: list[int] = []
    monkeypatch.setattr(writing, "fcntl", SimpleNamespace(fcntl=fcntl, F_FULLFSYNC=51))
    monkeypatch.setattr(writing.sys, "platform", "darwin")
    monkeypatch.setattr(os, "fsync", synced.append)
    writing._sync(7)
    assert (asked, synced) == ([51], [])
    writing._sync(7)  # a file system that does not know it
    assert (asked, synced) == ([51, 51], [7])


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, words in (
        ("no/such/file", "does not exist"),
        ("file/inside", "does not exist"),
        ("folder", "is a folder"),
        (".", "is a folder"),
        ("folder/..", "is a folder"),
        ("nul\0", "is not a valid file name"),
    ):
        with pytest.raises(CheckpointError, match=words), atomic(tmp_path / path):
            pytest.fail("the body ran")
    with pytest.raises(OSError, match="too long") as caught, atomic(tmp_path / ("x" * 256)):
        pytest.fail("the body ran")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert left_in(tmp_path) == ["file", "folder"]
    assert left_in(tmp_path / "folder") == []


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        old = os.umask(mask)
        try:
            put(tmp_path / "a", b"")
            with atomic_folder(tmp_path / f"{mask:o}"):
                pass
            with open(tmp_path / "plain", "wb"):
                pass
        finally:
            os.umask(old)
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
        if os.name == "posix":
            assert stat.S_IMODE((tmp_path / f"{mask:o}").stat().st_mode) == 0o777 & ~mask
        (tmp_path / "plain").unlink()


class FullDisk(writing.Part):
    """A file that takes ``room`` bytes and then says what a full disk says."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 8, 400, 4000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(writing, "Part", FullDisk)
    tensors = {f"t{i}": lazy(torch.ones(100)) for i in range(20)}
    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors(tmp_path / "a.safetensors", tensors, {})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.safetensors")  # and not the name that was made up
    assert left_in(tmp_path) == []


@posix
def test_a_quota_that_is_reached_while_the_buffer_is_emptied(tmp_path: Path) -> None:
    """The system's own refusal (a limit on the size of files), which comes with the flush: nothing stays."""
    code = f"""
import resource, signal, sys
from minidiff.storage.writing import atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic({str(tmp_path / "a")!r}) as file:
        file.write(b"x" * 2000)
except OSError as e:
    print(e.errno, e.filename)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EFBIG} {tmp_path / 'a'}\n"
    assert left_in(tmp_path) == []


@posix
def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    for existing in ("replace", "next"):
        folder.mkdir()

        def vanish(existing: Any = existing) -> None:
            with atomic(folder / "a", existing) as file:
                file.write(b"x")
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

        with pytest.raises((OSError, CheckpointError)) as caught:
            vanish()
        assert f"{folder / 'a'}" in str(caught.value)
        assert "part" not in str(caught.value)
        assert left_in(tmp_path) == []


# --- the name meanwhile ----------------------------------------------------------------------------------------------


def test_two_of_one_number_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers on one volume may have the same process number: neither may write into the other's file."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as two:
        one.write(b"one" * 1000)
        two.write(b"two")
        assert len(left_in(tmp_path)) == 2
    assert read(tmp_path) == {"a": b"one" * 1000}


@posix
def test_a_name_that_is_guessed_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "in").mkdir()
    guesses = ["0" * 16, "1" * 16, "2" * 16]
    (tmp_path / "in" / f".a.minidiff-{guesses[0]}.part").symlink_to(tmp_path / "precious")
    (tmp_path / "in" / f".a.minidiff-{guesses[1]}.part").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(writing.secrets, "token_hex", lambda n: guesses.pop(0))
    put(tmp_path / "in" / "a", b"new")
    assert guesses == []
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "in" / "a").read_bytes() == b"new"
    assert not (tmp_path / "in" / "a").is_symlink()
    assert not (tmp_path / "nowhere").exists()


@posix
@pytest.mark.parametrize("existing", ["replace", "refuse", "next"])
@pytest.mark.parametrize("to", ["precious", "nowhere"])
def test_a_link_under_the_final_name_is_never_followed(tmp_path: Path, existing: Any, to: str) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "a").symlink_to(to)
    if existing == "refuse":
        with pytest.raises(ConfigError, match="already exists"):
            put(tmp_path / "a", b"new", existing)
    else:
        assert put(tmp_path / "a", b"new", existing) == tmp_path / ("a" if existing == "replace" else "a-2")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "a").is_symlink() == (existing != "replace")
    assert not (tmp_path / "nowhere").exists()


@posix
def test_a_long_name_has_room_for_the_other_one(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "猫" * 85, "x" * 251 + ".png"):
        put(tmp_path / name, b"1")
        with atomic_folder(tmp_path / name[:-1]):
            pass
        second = put(tmp_path / name, b"2", "next")
        assert second.name.endswith("-2" + Path(name).suffix)
        assert len(os.fsencode(second.name)) <= 255
        assert (tmp_path / name).read_bytes() + second.read_bytes() == b"12"
    assert len(left_in(tmp_path)) == 12


@pytest.mark.parametrize("system", ["this one", "no links", "windows"])
def test_what_got_the_name_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    pretend(system, monkeypatch)
    with atomic(tmp_path / "a.png", "next") as file:
        file.write(b"second")
        (tmp_path / "a.png").write_bytes(b"first")
    assert file.path == tmp_path / "a-2.png"
    taken = re.escape(f"{tmp_path / 'b'}: already exists; name another")
    with pytest.raises(ConfigError, match=taken), atomic(tmp_path / "b", "refuse"):
        (tmp_path / "b").write_bytes(b"first")
    full = "a folder with files in it, which is not replaced"
    with pytest.raises(CheckpointError, match=full), atomic_folder(tmp_path / "c"):
        (tmp_path / "c" / "y").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a file, which is not replaced"), atomic_folder(tmp_path / "e"):
        put(tmp_path / "e", b"first")
    assert put(tmp_path / "a.png", b"third", "next") == tmp_path / "a-3.png"
    assert put(tmp_path / "new", b"new", "refuse") == tmp_path / "new"
    assert left_in(tmp_path / "c") == ["y"]
    assert left_in(tmp_path) == ["a-2.png", "a-3.png", "a.png", "b", "c", "e", "new"]
    assert [(tmp_path / n).read_bytes() for n in ("a.png", "a-2.png", "a-3.png")] == [b"first", b"second", b"third"]
    assert (tmp_path / "b").read_bytes() == b"first"


def pretend(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links; or Windows, as far as names go: rename fails where the name exists."""

    def no_link(*args: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    def rename(src: Path, dst: Path) -> None:
        if os.path.lexists(dst):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(src), None, str(dst))
        real(src, dst)

    real = os.rename
    if system != "this one":
        monkeypatch.setattr(os, "link", no_link)
    if system == "windows":
        monkeypatch.setattr(writing, "WINDOWS", True)
        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("system", ["this one", "no links"])
def test_of_sixty_threads_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    pretend(system, monkeypatch)
    found: list[Path] = []

    def work(i: int) -> None:
        for k in range(3):
            found.append(put(tmp_path / "a.png", f"{i} {k}".encode(), "next"))

    in_threads(60, work)
    assert len(set(found)) == 180
    contents = read(tmp_path)
    assert sorted(contents) == sorted(p.name for p in found)
    assert len(set(contents.values())) == 180


@pytest.mark.parametrize("system", ["this one", "no links"])
def test_of_many_that_may_not_replace_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    pretend(system, monkeypatch)
    for round in range(20):
        won: list[int] = []

        def work(i: int, round: int = round, won: list[int] = won) -> None:
            try:
                put(tmp_path / f"{round}", f"{i}".encode(), "refuse")
                won.append(i)
            except ConfigError:
                pass

        in_threads(8, work)
        assert len(won) == 1
        assert (tmp_path / f"{round}").read_bytes() == str(won[0]).encode()
    assert len(left_in(tmp_path)) == 20


def test_of_many_folders_one_wins(tmp_path: Path) -> None:
    for round in range(20):
        won: list[int] = []

        def work(i: int, round: int = round, won: list[int] = won) -> None:
            try:
                with atomic_folder(tmp_path / f"{round}") as folder:
                    (folder / f"{i}").mkdir()
                won.append(i)
            except CheckpointError:
                pass

        in_threads(8, work)
        assert left_in(tmp_path / f"{round}") == [str(i) for i in won]
    assert len(left_in(tmp_path)) == 20


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failed: list[BaseException] = []
    begin = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            begin.wait()
            work(i)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@posix
def test_neither_links_nor_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no operation is sure to spare what another writes: said, and nothing is written."""
    pretend("no links", monkeypatch)
    no_locks(monkeypatch)
    assert put(tmp_path / "a", b"1") == tmp_path / "a"  # replacing needs neither
    with pytest.raises(OSError, match="neither links nor locks") as caught:
        put(tmp_path / "b", b"1", "next")
    assert caught.value.filename == str(tmp_path / "b")
    assert left_in(tmp_path) == ["a"]


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(writing.fcntl, "flock", flock)


# --- what is never replaced ------------------------------------------------------------------------------------------


@posix
def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "to the pipe").symlink_to("pipe")
    (tmp_path / "to the folder").symlink_to("folder")
    before = {name: os.lstat(tmp_path / name).st_ino for name in left_in(tmp_path)}
    for name, what in (
        ("pipe", "a named pipe"),
        ("socket", "a socket"),
        ("folder", "a folder"),
        ("to the pipe", "a named pipe"),
        ("to the folder", "a folder"),
    ):
        with pytest.raises(CheckpointError, match=f"is {what}"):
            put(tmp_path / name, b"x")
        with pytest.raises(CheckpointError, match=f"is {what}"):
            append(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a device, and only regular files are replaced"):
        check_place("/dev/null")
    assert {name: os.lstat(tmp_path / name).st_ino for name in left_in(tmp_path)} == before


@posix
def test_a_pipe_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a named pipe"), atomic(tmp_path / "a"):
        os.mkfifo(tmp_path / "a")
    assert stat.S_ISFIFO(os.lstat(tmp_path / "a").st_mode)
    assert left_in(tmp_path) == ["a"]


def test_a_folder_needs_a_new_or_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "empty")
    for path, what in (
        (tmp_path / "full", "a folder with files in it"),
        (tmp_path / "file", "a file"),
        (tmp_path / "link", "a link"),
        (Path("."), "not a folder name"),
        (tmp_path / "full" / "..", "not a folder name"),
        (tmp_path / "no" / "such", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=what), atomic_folder(path):
            pytest.fail("the body ran")
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "x").touch()
    assert left_in(tmp_path / "empty") == ["x"]


def test_appending(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with append(tmp_path / "log") as file:
            file.write(text)
    assert (tmp_path / "log").read_bytes() == b"onetwo"


@posix
def test_appending_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "log").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"):
        append(tmp_path / "log")
    assert (tmp_path / "precious").read_bytes() == b"precious"


# --- leftovers -------------------------------------------------------------------------------------------------------

LEFT = ".other.safetensors.minidiff-0123456789abcdef.part"


@posix
def test_what_nobody_holds_is_swept(tmp_path: Path) -> None:
    (tmp_path / LEFT).write_bytes(b"half")
    (tmp_path / ".a.123.part").write_bytes(b"half, as it was called before")
    (tmp_path / f".b{LEFT}").mkdir()
    (tmp_path / f".b{LEFT}" / "inner").write_bytes(b"half")
    others = [".b.123.part", ".a.part", ".a.x.part", "a.123.part", ".a.minidiff-0123.part", f"x{LEFT}", ".a.12.part.gz"]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody else's")
    put(tmp_path / "a", b"x")
    assert left_in(tmp_path) == sorted(["a", *others])


@posix
def test_what_somebody_holds_is_not(tmp_path: Path) -> None:
    with atomic(tmp_path / "a") as file, atomic_folder(tmp_path / "b") as folder:
        file.write(b"x")
        (folder / "x").touch()
        parts = left_in(tmp_path)
        assert len(parts) == 2
        sweep(tmp_path, "a")
        put(tmp_path / "a", b"y")
        assert [n for n in left_in(tmp_path) if n != "a"] == parts
    assert (tmp_path / "a").read_bytes() == b"x"
    assert left_in(tmp_path / "b") == ["x"]


@posix
def test_leftovers_that_are_none_are_neither_opened_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_bytes(b"x")
    os.mkfifo(tmp_path / LEFT)
    (tmp_path / f".link{LEFT}").symlink_to("precious")
    (tmp_path / f".file{LEFT}").symlink_to("precious/x")
    os.mkfifo(tmp_path / ".a.123.part")
    before = left_in(tmp_path)
    opened: list[str] = []
    real = os.open

    def watched(path: Any, *args: Any, **options: Any) -> int:
        opened.append(os.path.basename(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", watched)
    put(tmp_path / "a", b"x")
    assert not set(opened) & set(before)
    assert left_in(tmp_path) == sorted(["a", *before])
    assert left_in(tmp_path / "precious") == ["x"]


@posix
@pytest.mark.parametrize("folder", [False, True])
def test_a_sweeper_between_the_making_and_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """It sees what nobody holds yet, and removes it; or it holds it just when the maker wants to."""
    real, seen = writing._lock, []

    def late(opened: int, wait: bool = False) -> bool | None:
        if len(seen) > 1:
            return real(opened, wait)
        seen.append(left_in(tmp_path))
        if len(seen) == 1:  # all of it happens before the lock
            monkeypatch.setattr(writing, "_lock", real)
            sweep(tmp_path)
            monkeypatch.setattr(writing, "_lock", late)
            return real(opened, wait)
        other = os.open(tmp_path / seen[1][0], os.O_RDONLY)
        try:
            assert real(other)
            return real(opened, wait)
        finally:
            (os.rmdir if folder else os.unlink)(tmp_path / seen[1][0])
            os.close(other)

    monkeypatch.setattr(writing, "_lock", late)
    if folder:
        with atomic_folder(tmp_path / "a") as made:
            (made / "x").touch()
        assert left_in(tmp_path / "a") == ["x"]
    else:
        put(tmp_path / "a", b"whole")
        assert (tmp_path / "a").read_bytes() == b"whole"
    assert [len(names) for names in seen] == [1, 1]
    assert left_in(tmp_path) == ["a"]


@posix
def test_sweepers_and_writers_at_once(tmp_path: Path) -> None:
    """Every write is preceded by a sweep: none may take another's file away."""

    def work(i: int) -> None:
        for k in range(40):
            put(tmp_path / f"{i % 4}", f"{i} {k}".encode())

    in_threads(16, work)
    assert left_in(tmp_path) == ["0", "1", "2", "3"]


@posix
def test_without_locks_only_what_is_old_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for system in ("no locks", "windows"):
        young, old = tmp_path / LEFT, tmp_path / f".old{LEFT}"
        for path in (young, old):
            path.write_bytes(b"half")
        os.utime(old, (0, 0))
        with monkeypatch.context() as patched:
            if system == "windows":
                patched.setattr(writing, "WINDOWS", True)
            else:
                no_locks(patched)
            put(tmp_path / "a", b"x")
        assert left_in(tmp_path) == [LEFT, "a"]


# --- locks -----------------------------------------------------------------------------------------------------------


@posix
def test_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "taken by another") as sure:
        assert sure
        assert left_in(tmp_path) == [".run.minidiff.lock"]
        with pytest.raises(ConfigError, match="taken by another"), locked(tmp_path / "run", "taken by another"):
            pytest.fail("the body ran")
        put(tmp_path / "a", b"x")  # sweeps no locks
        assert left_in(tmp_path) == [".run.minidiff.lock", "a"]
    with locked(tmp_path / "run", "taken by another"):
        pass
    assert left_in(tmp_path) == ["a"]


@posix
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = f"""
import os
from minidiff.storage.writing import locked
with locked({str(tmp_path / "run")!r}, "taken"):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert left_in(tmp_path) == [".run.minidiff.lock"]
    with locked(tmp_path / "run", "taken"):
        pass
    assert left_in(tmp_path) == []


@posix
def test_a_lock_of_many_threads_is_held_by_one(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            with locked(tmp_path / "turn", "", wait=True):
                inside.append(i)
                assert len(inside) == 1
                inside.pop()

    in_threads(8, work)
    assert left_in(tmp_path) == []


@posix
def test_a_lock_that_was_just_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had it removes its file while another has opened that: a lock on it would be one that nobody else sees."""
    real, opened = writing._lock, []

    def late(lock: int, wait: bool = False) -> bool | None:
        if not opened:
            (tmp_path / ".run.minidiff.lock").unlink()
        opened.append(lock)
        return real(lock, wait)

    monkeypatch.setattr(writing, "_lock", late)
    with locked(tmp_path / "run", "taken"):
        assert left_in(tmp_path) == [".run.minidiff.lock"]
    assert len(opened) == 2


@posix
def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    with locked(tmp_path / "run", "taken") as sure:
        assert not sure
    put(tmp_path / "a", b"x")
    assert left_in(tmp_path) == ["a"]


def test_names(tmp_path: Path) -> None:
    assert [numbered(tmp_path / "a.b.png", n).name for n in (1, 2, 30)] == ["a.b.png", "a.b-2.png", "a.b-30.png"]
    assert PART.fullmatch(writing._hidden(tmp_path / "a\nb", ".minidiff-0123456789abcdef.part"))
