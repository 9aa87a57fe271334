"""Settings files: checked types, bounded length, and no blocking on special files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import weights_convert
from minidiff.cli import main
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.samplers import sampler_from_diffusers
from weights_convert.overlay import read_override


@pytest.mark.parametrize("name", [{"a": 1}, [[[]]], 3, True, ["PNDMScheduler"]])
def test_the_name_of_a_scheduler_is_a_name(name: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"scheduler class .* is not supported"):
        sampler_from_diffusers({"_class_name": name})


def test_a_null_character_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["train", "--data", "shapes", "--out", "a\0b", "--resume"],
        ["convert", "a", "b\0c", "--to", "diffusers"],
    ):
        assert main(argv) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "holds a null character" in line


def test_configs_that_are_no_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"unet": ')
    for path, words in (
        (tmp_path / "pipe.json", "named pipe"),
        ("/dev/zero", "device"),
        (tmp_path / "gone.json", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "list.json", "JSON object"),
        (tmp_path / "half.json", "not valid JSON"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_override(path)
        train = ["train", "--data", "shapes", "--out", str(tmp_path / "run"), "--quiet", "--config", str(path)]
        assert main(train) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert words in line
    (tmp_path / "sound.json").write_text(json.dumps({"unet": {"groups": 8}}))
    assert read_override(tmp_path / "sound.json") == {"unet": {"groups": 8}}
    with pytest.raises((ConfigError, CheckpointError)):
        weights_convert.open_source(tmp_path / "gone", config="/dev/zero")
