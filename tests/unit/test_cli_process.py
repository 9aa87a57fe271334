"""The ``minidiff`` command in a process of its own: signals, pipes that close, full disks, encodings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minidiff
from tests.support.command import ROOT, process


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c(models: Path, tmp_path: Path, number: int, status: int, word: str) -> None:
    model = str(models / "text.safetensors")
    with process("generate", "a fox", "--model", model, "--steps", "999", "--sampler", "ddim", cwd=tmp_path) as p:
        assert p.stderr is not None
        seen = b""
        deadline = time.monotonic() + 60
        while b"step" not in seen and time.monotonic() < deadline:  # the bar counts: it is at work
            seen += os.read(p.stderr.fileno(), 4096)
        p.send_signal(number)
        out, err = p.communicate(timeout=60)
    assert p.returncode == status, seen + err
    assert out == b""
    assert err.decode().splitlines()[-1] == f"minidiff: {word}"
    assert "Traceback" not in (seen + err).decode()
    assert list(tmp_path.iterdir()) == []


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupt:  # Ctrl-C, just as {module} is imported
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = ["minidiff", "generate", "a star"]
runpy.run_module("minidiff", run_name="__main__")
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("module", ["minidiff.cli", "minidiff.cli.generate", "minidiff.errors", "torch", "torch.nn"])
def test_ctrl_c_during_imports(tmp_path: Path, module: str) -> None:
    script = INTERRUPTED_IMPORT.format(module=module)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"minidiff: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="pipes and /dev/full")
def test_stdout_that_closes_or_is_full(models: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    model = str(models / "text.safetensors")
    env = {"PYTHONUNBUFFERED": ""}  # what a buffer still holds must not fail again when the interpreter ends
    with process("info", model, cwd=tmp_path, stdout=write, env=env) as p:
        os.close(write)
        _, err = p.communicate(timeout=60)
    assert (p.returncode, err) == (0, b"")
    if not os.path.exists("/dev/full"):
        return
    with open("/dev/full", "wb") as full, process("info", model, cwd=tmp_path, stdout=full, env=env) as p:
        _, err = p.communicate(timeout=60)
    assert (p.returncode, err.decode()) == (1, "minidiff: error: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="sets the locale by environment")
def test_terminal_that_knows_only_ascii(models: Path, tmp_path: Path) -> None:
    env = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"}
    model = str(models / "text.safetensors")
    argv = ("generate", "füchse" + " 猫" * 100, "--model", model, "--steps", "1", "--seed", "1", "--quiet")
    with process(*argv, cwd=tmp_path, env=env) as p:
        out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    assert err.decode("ascii").startswith("minidiff: warning: ")
    assert len(err.decode("ascii").splitlines()) == 1
    (picture,) = tmp_path.iterdir()
    assert out.decode("ascii").startswith("f\\xfcchse-\\u732b-")
    assert minidiff.read_recipe(picture)["prompt"] == argv[1]


def test_a_profiler_gets_its_end() -> None:
    """The command ends its process at once, unless something waits for the end of the interpreter."""
    said = subprocess.run(
        [sys.executable, "-m", "cProfile", "-m", "minidiff", "--version"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert "minidiff 0" in said.stdout
    assert "cumtime" in said.stdout
