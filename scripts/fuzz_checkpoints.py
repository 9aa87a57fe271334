"""Feed minidiff damaged and hostile checkpoints, 20,000 by default, and count how each ended.

    python scripts/fuzz_checkpoints.py                          # about an hour on one core; case K is always the same
    python scripts/fuzz_checkpoints.py --first 5000 --count 7   # just these

Each case is one small checkpoint, damaged (tests/fuzz.py says how) and read or converted in a worker process. It must
be refused with one line, read as the model that it was, or differ in weights alone where only their bytes were hit. A
worker that dies, takes longer than 20 seconds or more memory than twice the file (and 64 MB for the interpreter's own
comings and goings), or that runs what a pickle asks for, has failed; so has a model that is another and was accepted.
Exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 20
ROOM = 64 << 20  # bytes


def peak() -> int:
    """The most memory that this process has had since :func:`forget`, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) << 10


def forget() -> int:
    """Begin to measure anew; what the process has now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak()


def work(first: int, last: int) -> None:
    """A worker: every case on a line of its own before it starts, its end after it."""
    import torch

    from tests import fuzz

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = fuzz.Base(Path(folder))
        for number in range(first, last):
            case = base.damaged(number)  # a bomb is made here, and takes memory that is not the reader's
            print(json.dumps({"case": number, "how": f"{case.how} of {case.source}"}), flush=True)
            before = forget()
            end = base.try_case(number)[1]
            grown = peak() - before
            if grown > 2 * len(case.data) + ROOM:
                end = f"took {grown >> 20} MB for a file of {len(case.data) >> 10} kB"
            fault = end not in fuzz.ALLOWED
            print(json.dumps({"end": end, "fault": fault}), flush=True)


def watch(first: int, last: int, ends: Counter[str], faults: list[str]) -> int:
    """Start a worker at ``first`` and listen; the case to go on with, after the end or a worker's death."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(first), str(last)]
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
                return int(now["case"]) + 1
            said = json.loads(line)
            if "case" in said:
                now, patience = said, SECONDS
                continue
            ends[said["end"] if not said["fault"] else "FAULT"] += 1
            if said["fault"]:
                faults.append(f"case {now['case']}, {now['how']}: {said['end']}")
                print(faults[-1], flush=True)
            if sum(ends.values()) % 500 == 0:
                print(f"{sum(ends.values())} cases: {dict(ends)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="cases (default: 20000)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the number of the first one (default: 0)")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return 0
    start, ends, faults = time.perf_counter(), Counter[str](), list[str]()
    number, last = args.first, args.first + args.count
    while number < last:
        number = watch(number, last, ends, faults)
    print(*faults, sep="\n")
    print(f"{args.count} cases in {time.perf_counter() - start:.0f} s: {dict(ends)}; {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
