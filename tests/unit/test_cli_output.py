"""Output of the command: names of pictures, folders, links and pipes, and files that are never replaced."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

import minidiff
from minidiff.cli import output as destination
from tests.support.command import Run, one_error, pixels


def test_names_of_pictures(run: Run, tmp_path: Path) -> None:
    common = ("--model", "text", "--steps", 1, "--seed", 3, "--quiet")
    (tmp_path / "there").mkdir()
    both = run("generate", "Eine Füchsin", "猫", *common, "--out", "there")
    assert both.out == [os.path.join("there", "eine-füchsin-3.png"), os.path.join("there", "猫-4.png")]
    assert run("generate", "", *common).out == ["sd1-3.png"]
    assert run("generate", "../../etc/passwd", *common).out == ["etc-passwd-3.png"]
    assert run("generate", "x" * 300, *common).out == ["x" * 40 + "-3.png"]
    assert run("generate", "fox", *common, "--num-images", 3, "--out", "a.png").out == ["a.png", "a-2.png", "a-3.png"]
    assert run("generate", "fox", *common, "--out", "a").out == ["a-4.png"]
    (tmp_path / "a.png").write_bytes(b"old")
    assert run("generate", "fox", *common, "--num-images", 2, "--out", "a.png", "--force").out == ["a.png", "a-2.png"]
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)


def test_name_where_the_file_system_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii"))
    assert destination.slug("Eine Füchsin") == "eine-f-chsin"
    assert destination.slug("猫") == "picture"
    assert destination.slug("\udc80 \U0001f98a") == "picture"


def test_pictures_of_one_name_all_stay(run: Run, tmp_path: Path) -> None:
    """Also where two of this run would have it, and one only differs in what the file system ignores."""
    (tmp_path / "a.png").write_bytes(b"old")
    made = ("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 7, "--quiet", "--num-images", 2)
    assert run(*made, "--out", "a.png").out == ["a-2.png", "a-3.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert run(*made, "--out", "a.png", "--force").out == ["a.png", "a-2.png"]
    seeds = [minidiff.read_recipe(tmp_path / name)["seed"] for name in ("a.png", "a-2.png", "a-3.png")]
    assert seeds == [7, 8, 8]


def test_folder_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one_error(run("generate", "a fox", "--model", "text", "--quiet", "--out", "file/a.png"), "file", "no folder")

    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some random name")

    monkeypatch.setattr(destination.tempfile, "TemporaryFile", refuse)  # root may write anywhere, and tests run as root
    ended = run("generate", "a fox", "--model", "text", "--quiet", "--out", tmp_path / "a.png")
    one_error(ended, f"{tmp_path}: Permission denied")


def test_a_folder_that_is_new_ends_with_a_slash(run: Run, tmp_path: Path) -> None:
    """It is made with the first picture, and not before there is one."""
    given = ("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 7, "--quiet", "--out")
    one_error(run(*given, "new/pictures/", "--sampler", "magic"), "'magic'")
    assert list(tmp_path.iterdir()) == []
    assert run(*given, "new/pictures/").out == ["new/pictures/a-fox-7.png"]
    assert run(*given, "new/pictures/").out == ["new/pictures/a-fox-7-2.png"]
    (tmp_path / "file").touch()
    one_error(run(*given, "file/"), "--out file/: there is no folder file")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_force_replaces_regular_files_alone(run: Run, models: Path, tmp_path: Path) -> None:
    """Of a link it replaces the link; a picture that has no name of its own takes the next one instead."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link.png").symlink_to("precious")
    (tmp_path / "to the pipe").symlink_to("pipe.png")
    made = ("generate", "a fox", "--model", "text", "--steps", 1, "--seed", 7, "--quiet", "--force", "--out")
    one_error(run(*made, "pipe.png"), "pipe.png: is a named pipe, and only regular files are replaced")
    assert run(*made, "link.png").out == ["link.png"]
    assert not (tmp_path / "link.png").is_symlink()
    os.mkfifo(tmp_path / "a-fox-7.png")
    assert run(*made, ".").out == ["a-fox-7-2.png"]
    assert run(*made, ".", "--num-images", 2).out == ["a-fox-7-2.png", "a-fox-8.png"]
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/null")
    (tmp_path / "to the pipe.safetensors").symlink_to("pipe.safetensors")
    for command in (("convert", "text"), ("parity", "record", "text")):
        for name in ("pipe.safetensors", "to the pipe.safetensors"):
            one_error(run(*command, name, "--force"), f"{name}: is a named pipe, and only regular files are replaced")
        one_error(run(*command, "device.safetensors", "--force"), "device.safetensors: is a device")
    (tmp_path / "link.safetensors").symlink_to("precious")
    assert run("convert", "text", "link.safetensors", "--force").status == 0
    assert not (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe.png").st_mode)
