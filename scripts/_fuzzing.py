"""Helpers of the fuzzing scripts: workers that report their current case, and a watchdog for their time.

A worker prints a line of JSON before every case, {"case": number, "how": text}, and one after it, {"end": text,
"fault": bool}. One that dies or takes too long has met a fault, and another goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

SECONDS = 20  # for a case, on a machine that has nothing else to do
ROOM = 64 << 20  # bytes


def peak() -> int:
    """Return the peak memory of this process since :func:`forget`, in bytes; 0 if the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def forget() -> int:
    """Reset the peak; return the memory that the process has now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak()


def watch(script: str, first: int, last: int, ends: Counter[str], faults: list[str], seconds: int = SECONDS) -> int:
    """Start a worker of ``script`` at ``first`` and watch it; return the case to continue with after it has ended."""
    command = [sys.executable, str(Path(script).resolve()), "--worker", str(first), str(last)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        source = process.stdout
        threading.Thread(target=lambda: [lines.put(line) for line in chain(source, [""])], daemon=True).start()
        now, patience = {"case": first, "how": "the start"}, 300
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                process.kill()
                line, why = "", f"was not done after {patience} s"
            else:
                why = f"killed the worker (status {process.wait() if not line else 0})"
            if not line:
                if process.returncode == 0:
                    return last
                faults.append(f"case {now['case']}, {now['how']}: {why}")
                print(faults[-1], flush=True)
                return int(now["case"]) + 1
            said = json.loads(line)
            if "case" in said:
                now, patience = said, seconds
                continue
            ends[said["end"] if not said["fault"] else "FAULT"] += 1
            if said["fault"]:
                faults.append(f"case {now['case']}, {now['how']}: {said['end']}")
                print(faults[-1], flush=True)
            if sum(ends.values()) % 500 == 0:
                print(f"{sum(ends.values())} cases: {dict(ends)}", flush=True)


def run(script: str, first: int, count: int, seconds: int = SECONDS) -> int:
    """Watch workers of ``script`` until ``count`` cases are done; print faults and return their number."""
    start, ends, faults = time.perf_counter(), Counter[str](), list[str]()
    number, last = first, first + count
    while number < last:
        number = watch(script, number, last, ends, faults, seconds)
    print(*faults, sep="\n")
    print(f"{count} cases in {time.perf_counter() - start:.0f} s: {dict(ends)}; {len(faults)} faults")
    return len(faults)


def command(script: str, about: str | None, count: int, work: Callable[[int, int], None]) -> int:
    """Run the command line of ``script``: ``count`` cases by default, each tried by ``work`` in a worker.

    ``about``: its help. Return 1 if there was a fault, else 0.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, metavar="N", help=f"cases (default: {count})")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the number of the first one (default: 0)")
    parser.add_argument("--seconds", type=int, default=SECONDS, metavar="N", help=f"for a case (default: {SECONDS})")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return 0
    return 1 if run(script, args.first, args.count, args.seconds) else 0
