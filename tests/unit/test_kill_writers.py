"""A short run of scripts/kill_writers.py, and planted errors that it must find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")

# Writers as one might write them: under the final name at once, and final names given by a look before. Either takes
# its time, by far the most of the run, so that kills and other writers meet it there on a busy machine too.
AT_ONCE = """
import os, time
from minidiff.storage import writing
def create(path, folder=False):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    time.sleep(0.3)
    return path, opened
writing._create = create
writing._place = lambda part, path, existing: path
"""
LOOK_FIRST = """
import os, time
from minidiff.storage import writing
def take(part, path):
    if os.path.exists(path):
        return False
    time.sleep(0.2)
    os.replace(part, path)
    return True
writing._take = take
"""


def script(*options: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, 'scripts'); import kill_writers\n{before}\nsys.exit(kill_writers.main())"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def test_nothing_is_lost_or_half_written() -> None:
    done = script("--kills", "3", "--pairs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing wrong") == 10


@pytest.mark.parametrize(("only", "before"), [("convert", AT_ONCE), ("two generate", LOOK_FIRST)])
def test_it_sees_what_is_wrong(only: str, before: str) -> None:
    done = script("--kills", "20", "--pairs", "5", "--only", only, before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{only}: WRONG: " in done.stdout
