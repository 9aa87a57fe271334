"""The machine that a measurement holds for, and the user's cache, in which its result is kept.

A measurement is made once: the first process that writes a result decides, and every later one reads it. So the same
machine computes the same bits, although two measurements may disagree.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from minidiff.errors import MinidiffError
from minidiff.storage.reading import read_object
from minidiff.storage.writing import atomic, locked

T = TypeVar("T")

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LOAD = Path("/proc/loadavg")
PRIVATE = 2**20  # bytes of a core's own cache where the system does not tell
UNITS = {"K": 2**10, "M": 2**20}


def description() -> str:
    """Return a description of everything that a measurement depends on: processor, instructions, threads, torch."""
    # Windows sets the variable; platform.processor() would start a program, uname, on other systems
    name = os.environ.get("PROCESSOR_IDENTIFIER") or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def private_cache() -> int:
    """Return the bytes of the second-level cache, which a core has for itself."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        for cache in CACHES.glob("index*"):
            if (cache / "level").read_text().strip() == "2":
                size = (cache / "size").read_text().strip()
                return int(size[:-1]) * UNITS[size[-1]]
    return PRIVATE


def crowded() -> str | None:
    """Return one line of advice if more threads want to run than there are cores; None otherwise, or if unknown.

    Where that is so, each of torch's threads waits actively for one that is not running, and a run can take ten times
    as long. Both the threads that run now and the load of the last minute must say so.
    """
    with suppress(AttributeError, OSError, ValueError, IndexError):
        now = int(LOAD.read_text().split()[3].partition("/")[0]) - 1  # without this one
        others = min(now, round(os.getloadavg()[0]))
        own, cores = torch.get_num_threads(), os.cpu_count() or 1
        if others > 0 and 1 < own > cores - others:
            some = "thread is" if others == 1 else "threads are"
            return (
                f"{others} other {some} running on {cores} cores, and the {own} of this run would wait for each "
                f"other; it is faster with OMP_NUM_THREADS={max(1, cores - others)}, or when they have ended"
            )
    return None


def cache_folder() -> Path:
    """Return the folder for minidiff's files in the user's cache. Raises RuntimeError for a user without a home."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
            "Library/Caches" if sys.platform == "darwin" else ".cache"
        )
    return Path(base) / "minidiff"


class Notes(Generic[T]):
    """Results of one kind by machine, in a JSON file of the user's cache.

    ``read`` turns a parsed entry into a result. It raises ValueError or TypeError for what is none, and that entry
    counts as missing.
    """

    def __init__(self, name: str, read: Callable[[Any], T]) -> None:
        self.name, self.read = name, read

    def path(self) -> Path:
        """Return the path of the file. Raises RuntimeError for a user without a home."""
        return cache_folder() / self.name

    def all(self) -> dict[str, T]:
        """Return the valid entries; none if the file is missing or damaged."""
        found: dict[str, T] = {}
        with suppress(OSError, RuntimeError, MinidiffError):
            for key, value in read_object(self.path()).items():
                with suppress(ValueError, TypeError, OverflowError):  # the last: a whole number beyond float
                    found[key] = self.read(value)
        return found

    def damaged(self) -> str | None:
        """Return what is wrong with the file, in one line; None if it is missing or can be read."""
        try:
            if self.path().exists():
                read_object(self.path())
        except (OSError, RuntimeError, MinidiffError) as e:
            return str(e)
        return None

    def keep(self, key: str, value: T, anew: bool = False) -> T | None:
        """Write ``value`` unless there is an entry (``anew``: even then), and return the entry that stands; None if it
        cannot be written."""
        with suppress(OSError, RuntimeError, MinidiffError):  # no home folder, a full disk
            path = self.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path, "", wait=True):
                known = self.all()
                if anew or key not in known:
                    known[key] = value
                    with atomic(path) as file:
                        file.write(json.dumps(known, indent=1).encode())
                return known[key]
        return None
