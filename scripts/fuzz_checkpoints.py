"""Feed minidiff damaged and hostile checkpoints, 20,000 by default, and count how each ended.

    python scripts/fuzz_checkpoints.py                          # about an hour on one core; case K is always the same
    python scripts/fuzz_checkpoints.py --first 5000 --count 7   # just these

Each case is one small checkpoint, damaged (tests/support/fuzz.py says how) and read or converted in a worker process.
It must be refused with one line, read as the model that it was, or differ in weights alone where only their bytes were
hit. A worker that dies, takes longer than 20 seconds or more memory than twice the file (and 64 MB for the
interpreter's own comings and goings), or that runs what a pickle asks for, has failed; so has a model that is another
and was accepted. Exit status 1 if there was one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _fuzzing import ROOM, command, forget, peak  # noqa: E402


def work(first: int, last: int) -> None:
    """Run as a worker: print a line before each case, and its end after it."""
    import torch

    from tests.support import fuzz

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


if __name__ == "__main__":
    sys.exit(command(__file__, __doc__, 20_000, work))
