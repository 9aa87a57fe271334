"""Whole processes, measured from outside: seconds from start to end, and the most memory they ever held.

The system counts to a child's peak what its parent held when it was started, so whoever measures stays small: this
module and its users import nothing but the standard library, and leave all work to their children.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


class Done(NamedTuple):
    """Successful process: its ``peak`` in bytes, and ``facts``, its last line if that is JSON."""

    seconds: float
    peak: int
    facts: dict[str, Any]


def run(command: Sequence[str | Path]) -> Done:
    """Run ``command`` to its end. If it fails, this program ends with the last line of its error output."""
    if not hasattr(os, "wait4"):
        raise SystemExit("memory of processes is measured by wait4, which this system lacks; use Linux or macOS")
    env = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.perf_counter()
        child = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        seconds = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        printed, complaint = out.read().decode().splitlines(), err.read().decode().splitlines()
    if child.returncode != 0:
        shown = " ".join(str(c) for c in command)
        raise SystemExit(f"{shown}\nended with status {child.returncode}: {complaint[-1] if complaint else 'no word'}")
    return Done(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), _facts(printed))


def _facts(printed: list[str]) -> dict[str, Any]:
    return json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
