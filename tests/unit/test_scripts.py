"""The scripts demo.py and test.py: what they install, when they install again, and the arguments they pass on.

The installations here are real (an environment, pip), of a package that needs no download: a copy of scripts/_setup.py
in a checkout of its own, whose build backend lies beside it.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiff import read_recipe
from tests.support.scripts import script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("demo.py", "test.py", "_setup.py")

BACKEND = """
import pathlib, time, zipfile

METADATA = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: test\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    here = pathlib.Path.cwd()
    if (here / "slow").exists():
        (here / "building").touch()
        time.sleep(60)
    if (here / "broken").exists():
        raise SystemExit("this package does not build")
    name = "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        wheel.writestr("tiny.pth", str(here / "package"))
        wheel.writestr("tiny-1.dist-info/METADATA", METADATA)
        wheel.writestr("tiny-1.dist-info/WHEEL", WHEEL)
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    return name
"""
PROJECT = """
[project]
name = "tiny"
version = "1"

[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
PROBE = """
import sys
import _setup

_setup.enter(sys.argv[1])
import tiny

print("RAN", sys.prefix, sys.argv[2:])
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts find each other, as when they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that installs in no time: scripts/_setup.py, a script that uses it, and a package ``tiny``."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "package" / "tiny").mkdir(parents=True)
    (root / "package" / "tiny" / "__init__.py").touch()
    shutil.copy(ROOT / "scripts" / "_setup.py", root / "scripts")
    (root / "scripts" / "probe.py").write_text(PROBE)
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PROJECT)
    return root


def probe(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts" / "probe.py"), *args]
    return subprocess.run(command, cwd=root.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_first_start_second_start_and_changes(checkout: Path) -> None:
    first = probe(checkout, "", "an argument", "--option")
    assert first.returncode == 7, first.stderr + first.stdout
    assert "pip install" in first.stdout
    assert f"RAN {checkout / '.venv'} ['an argument', '--option']" in first.stdout

    start = time.perf_counter()
    second = probe(checkout, "")
    assert time.perf_counter() - start < 2, "the second start should only look at the stamp"
    assert second.stdout.splitlines() == [f"RAN {checkout / '.venv'} []"]
    assert second.returncode == 7

    assert "pip install" in probe(checkout, "test").stdout, "an extra is installed when it is first asked for"
    assert "pip install" not in probe(checkout, "").stdout, "the test extra has all that the plain package needs"

    (checkout / "pyproject.toml").write_text(PROJECT + "# changed\n")
    (checkout / "broken").touch()
    failed = probe(checkout, "")
    assert failed.returncode == 1
    assert "pip could not install" in failed.stderr.splitlines()[-1]
    (checkout / "broken").unlink()
    repaired = probe(checkout, "")
    assert "pip install" in repaired.stdout, "a failed installation is tried again"
    assert "removing" not in repaired.stdout, "after pip has cleaned up by itself the environment is kept"
    assert repaired.returncode == 7


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_two_first_starts_at_once(checkout: Path) -> None:
    command = [sys.executable, str(checkout / "scripts" / "probe.py"), ""]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in both]
    assert [status for _, _, status in ended] == [7, 7], ended
    assert sum("waiting for another start" in out for out, _, _ in ended) == 1
    assert sum("pip install" in out for out, _, _ in ended) == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process group")
def test_ctrl_c_during_set_up_is_repaired(checkout: Path) -> None:
    (checkout / "slow").touch()
    command = [sys.executable, str(checkout / "scripts" / "probe.py"), ""]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (checkout / "building").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted: the next start sets up again"
    assert "Traceback" not in errors
    (checkout / "slow").unlink()
    again = probe(checkout, "")
    assert again.returncode == 7, again.stderr + again.stdout
    assert "removing" in again.stdout


def test_environment_whose_python_is_gone_is_made_again(checkout: Path) -> None:
    python = checkout / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir(parents=True)
    python.write_text("no program")
    done = probe(checkout, "")
    assert done.returncode == 7, done.stderr + done.stdout
    assert "removing" in done.stdout


def test_demo_writes_a_picture_with_its_recipe_and_a_strip_of_its_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = script("demo")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    out = tmp_path / "new folder" / "picture.png"
    assert demo.picture("a red star on a blue background", 10, 5, str(out)) == 0
    recipe = read_recipe(out)
    assert (recipe["prompt"], recipe["steps"], recipe["seed"]) == ("a red star on a blue background", 10, 5)
    with Image.open(out) as image, Image.open(out.with_name("picture-steps.png")) as strip:
        assert image.size == (64, 64)
        assert strip.size == (8 * 128, 128)
        last = strip.crop((7 * 128, 0, 8 * 128, 128)).resize((64, 64), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(last, float) - np.asarray(image, float)).mean() < 8, "the strip ends at the picture"
    ended = capsys.readouterr()
    assert str(out) in ended.out
    assert str(out.with_name("picture-steps.png")) in ended.out
    assert ended.err == ""
    assert demo.picture("a cat", 2, 5, str(out)) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "'cat'" in line
    assert demo.picture("a red star on a blue background", 0, 5, str(out)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_older_python_gets_one_clear_line(name: str) -> None:
    source = (ROOT / "scripts" / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 1); sys.path.insert(0, 'scripts');"
        f" sys.argv = ['scripts/{name}']; runpy.run_path('scripts/{name}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["minidiff needs Python 3.10 or newer, this is 3.9: use a newer one"]


def test_python_without_ensurepip_is_told_what_to_install(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = script("_setup")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    home = checkout / ".venv"
    with pytest.raises(SystemExit, match=r"ensurepip is missing .*sudo apt install python"):
        setup.create(home, home / "stamp")
    assert not home.exists()


def test_all_checks_run_and_one_failure_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = script("test")
    assert runner.check([["platform"], ["json.tool", "no-such-file"], ["platform"]]) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert "json.tool no-such-file: FAILED (status" in last
    assert last.count("platform: passed") == 2
    assert runner.check([["platform"]]) == 0


def test_checks_run_with_one_thread_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = script("test")
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(runner._setup, "run", lambda command, env: seen.append(env) or 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runner.check([["pytest"]])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runner.check([["pytest"]])
    assert [env["OMP_NUM_THREADS"] for env in seen] == ["1", "3"]


def test_oldest_pins_every_dependency_to_its_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader to compare with")
    runner = script("test")
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"torch", "torchvision", "einops", "numpy", "tqdm", "safetensors"}
    pins = runner.oldest()
    assert {pin.split("==")[0] for pin in pins if "==" in pin} == names
    assert {pin.replace("==", ">=") for pin in pins if "==" in pin} == set(project["dependencies"])
    assert {"pytest", "pytest-xdist", "hypothesis"} <= {pin.split(">=")[0] for pin in pins}
    assert runner._setup.requirements("test") == project["optional-dependencies"]["test"]


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_ci_runs_the_tests_and_fails_when_they_do(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\necho "$PWD" "$@"\nexit 3\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run")], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.split() == [str(ROOT), "scripts/test.py"]
