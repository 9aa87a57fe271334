"""Measure what minidiff, with all public names, adds to `import torch`: CPU time and peak memory, in fresh processes.

The two are started in turn, so that whatever else the machine does falls on both; medians and the median of the paired
differences are printed. Exits with 1 if a bound is broken: 0.15 s of CPU time, 20 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

SECONDS, MEGABYTES = 0.15, 20.0

# Runs in the child: its CPU time since it started, and the most memory it ever held (Linux counts in KiB and, through
# getrusage, also what the parent held before exec; so its own /proc entry is read; macOS counts in bytes).
REPORT = """
import json, sys, time
cpu = time.process_time()
if sys.platform == "linux":
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
elif sys.platform == "darwin":
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
else:
    peak = float("nan")
print(json.dumps([cpu, peak / 1e6]))
"""


def measure(statement: str) -> tuple[float, float]:
    """Return the CPU seconds and peak megabytes of an interpreter that runs ``statement``."""
    done = subprocess.run([sys.executable, "-c", statement + REPORT], check=True, capture_output=True, text=True)
    cpu, peak = json.loads(done.stdout)
    return cpu, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="interpreters of each kind (default: 11)")
    rounds = parser.parse_args().rounds
    # The star touches every public name, so nothing hides behind being imported late.
    statements = ("import torch", "import torch\nfrom minidiff import *")
    for statement in statements:  # once unmeasured: writes byte code, fills the disk cache
        measure(statement)
    plain, ours = zip(*((measure(statements[0]), measure(statements[1])) for _ in range(rounds)), strict=True)
    failed = False
    for i, (unit, bound) in enumerate((("s of CPU time", SECONDS), ("MB at the peak", MEGABYTES))):
        base, total = (statistics.median(run[i] for run in runs) for runs in (plain, ours))
        added = statistics.median(b[i] - a[i] for a, b in zip(plain, ours, strict=True))
        failed |= added > bound
        print(
            f"import torch {base:.2f}, with minidiff {total:.2f}: {added:+.3f} {unit}"
            f" ({'at most' if added <= bound else 'MORE THAN THE BOUND OF'} {bound:g})"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
