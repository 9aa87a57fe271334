"""Helpers to call the ``minidiff`` command and to check its output: two small models, results, errors and pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import minidiff
from minidiff.config import (
    CLIPTextConfig,
    Level,
    ModelConfig,
    ScheduleConfig,
    TokenizerConfig,
    UNetConfig,
    VAEConfig,
    text,
)

ROOT = Path(__file__).resolve().parents[2]

TEXT = ModelConfig(
    family="sd1",
    unet=UNetConfig(
        levels=(text(32, 4), Level(channels=32)), mid=text(32, 4), context_dim=32, layers=1, groups=8, sample_size=4
    ),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=8, sample_size=32),
    text_encoder=CLIPTextConfig(width=32, layers=1, heads=2, mlp=32),
    tokenizer=TokenizerConfig(),
    schedule=ScheduleConfig(),
    sampler={"name": "pndm"},
)

# a model that the original layout can hold too, whose numbers of heads and groups are fixed
ORIGINAL = replace(
    TEXT,
    unet=UNetConfig(levels=(text(32, 8), Level(channels=32)), mid=text(32, 8), context_dim=32, layers=1, sample_size=4),
    vae=VAEConfig(channels=(32, 32, 32, 32), layers=1, sample_size=32),
    text_encoder=CLIPTextConfig(width=32, layers=1, heads=1, mlp=32),
)

PLAIN = ModelConfig(
    family="ddpm",
    unet=UNetConfig(
        levels=(Level(channels=32), Level(channels=32, attention="self", heads=1)),
        mid=Level(channels=32, attention="self", heads=1),
        in_channels=3,
        out_channels=3,
        layers=1,
        groups=8,
        sample_size=8,
    ),
    schedule=ScheduleConfig(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    sampler={"name": "ddpm"},
)


class Ended(NamedTuple):
    """The result of a call: its status and the lines that it wrote."""

    status: int
    out: list[str]
    err: list[str]


Run = Callable[..., Ended]


def process(*argv: str, cwd: Path, **options: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
    command = [sys.executable, "-m", "minidiff", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, **{"stdout": pipe, "stderr": pipe, **options})  # type: ignore[call-overload,no-any-return]


def one_error(ended: Ended, *words: str, status: int = 2) -> None:
    """The call failed with ``status`` and one line that has all of ``words``, and printed no result."""
    assert ended.status == status, ended
    errors = [line for line in ended.err if line.startswith("minidiff: error: ")]
    assert errors == ended.err, ended.err
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert ended.out == []


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def altered(path: Path, to: Path, **changes: object) -> None:
    """A picture once more, with another recipe; a field that becomes None is left out."""
    with Image.open(path) as image:
        told = {**minidiff.read_recipe(image), **changes}
        image.info["minidiff"] = json.dumps({name: value for name, value in told.items() if value is not None})
        minidiff.save_png(image, to)
