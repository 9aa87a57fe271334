"""Reading of untrusted files: regular files only, texts of bounded length, formats told by the first bytes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minidiff.console import LONGEST_LINE, one_line
from minidiff.errors import CheckpointError
from minidiff.storage.reading import content, mistaken, open_regular, read_bytes, read_json, read_object, read_text

posix = pytest.mark.skipif(os.name != "posix", reason="named pipes and /dev are POSIX's")


@posix
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: is a named pipe"):
        read_text(tmp_path / "pipe")


@posix
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_a_device_is_refused(device: str) -> None:
    if not os.path.exists(device):
        pytest.fail(f"{device} is on every POSIX system")
    with pytest.raises(CheckpointError, match="is a device"):
        open_regular(device)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        open_regular(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_regular(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="no such file"):
        open_regular(f"{tmp_path}/a\0b")


@posix
def test_links_are_followed_to_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "bad").symlink_to("/dev/zero")
    assert read_text(tmp_path / "link") == "here"
    with pytest.raises(CheckpointError, match="is a device"):
        read_text(tmp_path / "bad")


def test_the_bound_is_on_the_bytes_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "long", 11) == b"x" * 11
    with pytest.raises(CheckpointError, match="longer than 10 bytes"):
        read_bytes(tmp_path / "long", 10)


@posix
def test_a_file_without_a_size_is_bounded_too() -> None:
    # Files of /proc are regular and report a size of 0.
    assert os.stat("/proc/self/status").st_size == 0
    assert read_bytes("/proc/self/status")
    with pytest.raises(CheckpointError, match="longer than 5 bytes"):
        read_bytes("/proc/self/status", 5)


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\xe2\x80\xa8")
    assert read_text(tmp_path / "a") == "one\ntwo\nthree\u2028"
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_text(tmp_path / "b")


def test_json(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000, "1" * 5000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CheckpointError, match="not valid JSON"):
            read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == [1]
    with pytest.raises(CheckpointError, match="holds a list"):
        read_object(tmp_path / "a.json")


def test_content_is_told_by_content(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "st.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    (tmp_path / "page").write_text("\n <!DOCTYPE html><title>x</title>")
    (tmp_path / "text").write_text("ä" * 300)
    (tmp_path / "cut").write_bytes(b"x" + "ä".encode() * 300)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"p{protocol}").write_bytes(pickle.dumps({}, protocol))
        assert content(tmp_path / f"p{protocol}") == "pickle"
    assert content(tmp_path / "st.ckpt") == "safetensors"
    assert content(tmp_path / "zip.safetensors") == "torch zip"
    assert content(tmp_path / "old.safetensors") == "pickle"
    told = {name: content(tmp_path / name) for name in ("lfs", "page", "text", "cut", "empty", "noise")}
    assert told == {
        "lfs": "lfs pointer",
        "page": "web page",
        "text": "text",
        "cut": "text",
        "empty": "empty",
        "noise": "?",
    }
    assert "git lfs pull" in (mistaken(tmp_path / "lfs") or "")
    assert mistaken(tmp_path / "st.ckpt") is None


def test_one_line_is_harmless_and_short() -> None:
    shown = one_line("a\x1b[2Jb\x9b1mc\u202ed\ne\x07")
    assert shown == "a\\x1b[2Jb\\x9b1mc\\u202ed e\\x07"
    long = one_line("begin " + "x" * 300_000 + " end")
    assert len(long) <= LONGEST_LINE
    assert long.startswith("begin x")
    assert long.endswith("x end")
    assert one_line("y" * LONGEST_LINE) == "y" * LONGEST_LINE
