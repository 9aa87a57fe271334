"""Damage the goldens in tests/fixtures, recordings and models, and count what minidiff says of them.

    python scripts/fuzz_goldens.py                          # 2,000 cases, ten minutes; case K is always the same
    python scripts/fuzz_goldens.py --first 300 --count 7    # just these

tests/support/fuzz_goldens.py makes the cases. Each must be refused in one line, or get the verdict that its values
have by safetensors' own reader. A worker that dies or takes longer than 20 seconds has failed, and so has any other
error. Exit status 1 if there was one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _fuzzing import command  # noqa: E402


def work(first: int, last: int) -> None:
    """Run as a worker: print a line before each case, and its end after it."""
    import torch

    from tests.support import fuzz_goldens

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = fuzz_goldens.Base(Path(folder))
        for number in range(first, last):
            print(json.dumps({"case": number, "how": "not made yet"}), flush=True)
            how, end = base.try_case(number)
            fault = end not in fuzz_goldens.ALLOWED
            print(json.dumps({"end": f"{how}: {end}" if fault else end, "fault": fault}), flush=True)


if __name__ == "__main__":
    sys.exit(command(__file__, __doc__, 2_000, work))
