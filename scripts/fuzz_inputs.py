"""Feed minidiff what users, programs and attackers may hand it beside checkpoints, 5,000 inputs by default.

    python scripts/fuzz_inputs.py                          # most of an hour on one core; case K is always the same
    python scripts/fuzz_inputs.py --first 300 --count 7    # just these

Pictures of every mode and format, recipes, folders to train on, configs in folders, adapters and learned words, and
what is no file in every place where a path is taken (fuzz_inputs.py and fuzz_adapters.py of tests/support make them).
Each must be taken, or refused in one line, in a worker process. A worker that dies, takes longer than 20 seconds or
more memory than half a gigabyte, or that starts a program or opens a connection, has failed, and so has any other
error. Exit status 1 if there was one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _fuzzing import command, forget, peak  # noqa: E402

ROOM = 512 << 20  # bytes: for a picture of some ten million pixels, in a few copies
LIMIT = 8 << 30  # of addresses beyond those of the start: a machine is not to be brought down


def work(first: int, last: int) -> None:
    """Run as a worker: print a line before each case, and its end after it."""
    import resource

    import torch

    from tests.support import fuzz_inputs

    torch.set_num_threads(1)
    out = sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        base = fuzz_inputs.Base(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
        for number in range(first, last):
            print(json.dumps({"case": number, "how": base.kind(number)}), file=out, flush=True)
            before = forget()
            how, end = base.try_case(number)
            grown = peak() - before
            if grown > ROOM:
                end = f"took {grown >> 20} MB"
            fault = end not in fuzz_inputs.ALLOWED
            print(json.dumps({"end": f"{how}: {end}" if fault else end, "fault": fault}), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(command(__file__, __doc__, 5_000, work))
