"""Check the promises to a program that embeds minidiff, at length; `tests/unit/test_embedding.py` has the short form.

    python scripts/check_embedding.py                          # 200 runs and 200 loads, 500 interruptions
    python scripts/check_embedding.py --runs 20 --interruptions 60 --seed 1

Prints what the process holds before and after (threads, file descriptors, kilobytes), and how many interruptions came
in time; a promise that is broken ends it with an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.unit import test_embedding as promises  # noqa: E402

GROWTH = 32 * 1024  # kilobytes over all runs: what an allocator keeps in pieces


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="loads, each with two runs (default: 200)")
    parser.add_argument("--interruptions", type=int, default=500, help="over all operations (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the places of interruption")
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        before, after = promises.what_is_left(Path(folder), args.runs)
    print(f"{args.runs} loads and {2 * args.runs} runs: {before} before, {after} after")
    assert after[:2] == before[:2], "threads or file descriptors were left behind"
    assert after[2] - before[2] < GROWTH, "memory grows"
    each = -(-args.interruptions // (2 * len(promises.OPERATIONS)))  # on the way there, and on the way back
    for name in promises.OPERATIONS:
        came = promises.check_interruptions(name, each, args.seed)
        print(f"{name}: {came} of {2 * each} interruptions came in time, and left the model whole", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
