"""Refusal, in advance, of runs that need more memory than there is (``memory_limit.py``)."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import StableDiffusion, Unconditional, fast
from minidiff.config import SD15, ModelConfig, ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.pipeline import memory_limit
from minidiff.pipeline.estimate import Extent, least

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"height": 800_000, "width": 800_000}, "a picture of 800000 x 800000 needs "),
        ({"height": 800_000, "width": 800_000, "image": Image.new("RGB", (32, 32))}, "a picture of 800000 x 800000"),
        ({"num_images": 10**8}, "100,000,000 pictures of 64 x 64 need "),
        ({"num_images": 10**8, "image": Image.new("RGB", (32, 32))}, "100,000,000 pictures of 32 x 32 need "),
        ({"num_images": 10**8, "guidance_scale": 1}, "100,000,000 pictures"),
        ({"num_images": 10**12}, "num_images must be below 1,000,000,000"),
        ({"num_images": 10**5000}, "num_images must be below 1,000,000,000"),
        ({"num_images": True}, "num_images=True must be a whole number"),
        ({"height": 8 * 10**5000}, "height must be below 1,000,000,000 pixels"),
        ({"height": True}, "height=True must be a whole number of pixels"),
        ({"height": -(10**5000)}, r"height=-10\*\*60 or more"),
        ({"prompt": ["a"] * 1000, "num_images": 10**6}, "1,000,000,000 pictures of 64 x 64 need"),
    ],
)
def test_what_cannot_fit(sd: StableDiffusion, given: dict[str, Any], words: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words) as e:
        sd.generate(**{"prompt": "a", "steps": 3, **given})
    assert len(str(e.value)) < 300
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("need", "words"), [(10**18 - 10**9, "999,999,999 GB"), (10**18, "more than 1,000,000,000 GB")]
)
def test_the_figure_has_a_readable_length(need: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "least", lambda *_: need)
    config = ModelConfig(family="sd1", unet=SD15, schedule=ScheduleConfig())
    with pytest.raises(ConfigError, match=f"a picture of 8 x 8 needs about {words} of memory"):
        memory_limit.check_fits(config, Extent(count=1, height=8, width=8), CPU)


def test_models_without_text(ddpm: Unconditional) -> None:
    with pytest.raises(ConfigError, match=r"100,000,000 pictures of 8 x 8 need .* GB of memory beside the weights"):
        ddpm.generate(10**8, steps=1)


def test_what_fits_is_let_through(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, against the memory that there is; slices and tiles need less of it."""
    need = least(sd.config, Extent(count=6, height=40, width=32, rows=2, tokens=77, decoded=6))
    given: dict[str, Any] = {"steps": 1, "seed": 0, "height": 40, "width": 32, "num_images": 6, "output": "tensor"}
    monkeypatch.setattr(memory_limit, "MARGIN", 1)
    monkeypatch.setattr(memory_limit, "physical", lambda device: need)
    plain = sd.generate("a", **given)
    monkeypatch.setattr(memory_limit, "physical", lambda device: need - 1)
    with pytest.raises(ConfigError, match="6 pictures of 32 x 40 need"):
        sd.generate("a", **given)
    fast.optimize(sd, ("vae_slices",))
    sliced = sd.generate("a", **given)
    fast.restore(sd)
    assert np.allclose(plain, sliced, atol=1e-4)
    extent = Extent(count=1, height=8, width=16, rows=2, tokens=77, encoded=1)
    small = Image.new("RGB", (16, 8))  # a picture smaller than the model's own size
    monkeypatch.setattr(memory_limit, "physical", lambda device: least(sd.config, extent))
    assert sd.generate("a", image=small, steps=2, seed=0, output="tensor").shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/\n", {"memory.max": "3000\n"}, [3000]),
        ("0::/\n", {"memory.max": "max\n"}, []),
        ("0::/\n", {}, []),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "2000\n", "memory.max": "5000\n"}, [2000, 5000]),
        (
            "5:cpu:/a\n4:pids,memory:/docker/1f\n0::/\n",  # version 1, and the path is the one outside
            {"memory/memory.limit_in_bytes": "4000\n", "memory.limit_in_bytes": "1\n", "cpu/memory.max": "1\n"},
            [4000],
        ),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "700\n", "memory.max": "1\n"}, [700]),
    ],
)
def test_the_limit_of_a_container(
    groups: str, files: dict[str, str], wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control groups of Linux, version 1 and 2, and what is above them: the narrowest counts."""
    (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(memory_limit, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "fs")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert memory_limit.limits() == wanted
    if wanted:
        assert memory_limit.physical(CPU) == min(wanted)
    else:
        assert memory_limit.physical(CPU) > 2**28


def test_a_run_that_does_not_fit_into_its_container(
    sd: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    monkeypatch.setattr(memory_limit, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path)
    with pytest.raises(ConfigError, match=r"a picture of 256 x 256 needs .* GB of memory beside the weights"):
        sd.generate("a", steps=1, width=256, height=256)


def test_the_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "CGROUP", tmp_path / "none")
    assert memory_limit.limits() == []
    assert memory_limit.physical(CPU) > 2**28
    if hasattr(os, "sysconf"):
        with open("/proc/meminfo") as file:
            kib = int(file.readline().split()[1])
        assert abs(memory_limit.physical(CPU) - kib * 1024) < 2**20
        monkeypatch.delattr(os, "sysconf")
    assert memory_limit.physical(CPU) == memory_limit.UNKNOWN
