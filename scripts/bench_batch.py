"""Measure what a picture costs when eight are made at once, beside eight that are made one after another.

    python scripts/bench_batch.py                                              # the bundled model
    python scripts/bench_batch.py --model sd15.safetensors --dtype bfloat16 --steps 2 --rounds 1
    python scripts/bench_batch.py --pictures 2 --steps 1 --rounds 1            # to try it out

Both ways run in this process, in turn, after one picture that warms up: all exact switches, guidance, the same prompt
and seeds, from the prompt to decoded pictures. The last column is the time of a picture as a share of that of one made
alone. Exits with 1 if its median is above 0.93.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _bench import hints, in_turn, machine, show_machine, summarise, table, write_json  # noqa: E402
from _works import DTYPES  # noqa: E402

import minidiff  # noqa: E402
from minidiff import fast  # noqa: E402

BOUND = 0.93
PROMPT = "a red circle on a blue background"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="(default: the bundled model)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a picture (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each way is run (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args(argv)
    facts = machine()
    show_machine(facts, hints())
    dtype = DTYPES[args.dtype]
    sd = minidiff.load(args.model, dtype=dtype) if args.model else minidiff.bundled(dtype=dtype)
    fast.optimize(sd)
    ways = {"one by one": 1, f"{args.pictures} at once": args.pictures}

    def once(way: str) -> float:
        begun = time.perf_counter()
        for first in range(0, args.pictures, ways[way]):
            seeds = list(range(first, first + ways[way]))
            sd.generate([PROMPT] * len(seeds), steps=args.steps, seed=seeds, output="tensor", progress=False)
        return time.perf_counter() - begun

    sd.generate(PROMPT, steps=1, seed=0, output="tensor", progress=False)
    alone, together = summarise(in_turn(tuple(ways), args.rounds, once))
    rows = [
        (found.name, f"{found.seconds / args.pictures:.3f}", f"{found.spread / args.pictures:.3f}", f"{share:.3f}")
        for found, share in ((alone, 1.0), (together, 1 / together.speed))
    ]
    print(table(("", "seconds a picture", "spread", "of one alone"), rows))
    write_json(args.json, args, facts, ways=[alone, together])
    return 0 if 1 / together.speed <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
