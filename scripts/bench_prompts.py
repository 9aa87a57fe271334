"""Rate of ``minidiff generate --prompts`` beside that of the same pictures in batches from Python.

    python scripts/bench_prompts.py
    python scripts/bench_prompts.py --lines 40 --rounds 1 --json prompts.json

Both ways are whole processes with the bundled model, in turn: start, model, every picture as a PNG file with a recipe.
The one from Python has the same switches, and the group size that the other chose. Prints pictures a second, and
exits with 1 if the median of the quotients is below 0.95.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _bench import hints, in_turn, machine, show_machine, summarise, table, write_json  # noqa: E402
from _processes import run  # noqa: E402

BOUND = 0.95
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
LIBRARY = """
import pathlib, sys
import minidiff
from minidiff import fast
prompts, out, steps, together = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sd = minidiff.bundled()
fast.optimize(sd)
texts = prompts.read_text().splitlines()
for k in range(0, len(texts), together):
    some = texts[k : k + together]
    seeds = list(range(k + 1, k + 1 + len(some)))
    for seed, image in zip(seeds, sd.generate(some, steps=steps, seed=seeds, progress=False)):
        minidiff.save_png(image, out / f"{seed}.png")
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200, metavar="N", help="prompts (default: 200)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of a picture (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that each way is run (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args(argv)
    facts = machine()
    show_machine(facts, hints())
    rng = random.Random(0)
    texts = [f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} on a black background" for _ in range(args.lines)]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        prompts = here / "prompts.txt"
        prompts.write_text("\n".join(texts))
        together = 0

        def once(way: str) -> float:
            with tempfile.TemporaryDirectory(dir=here) as out:
                if way == "from Python":
                    given = ["-c", LIBRARY, prompts, out, args.steps, together]
                else:
                    given = ["-m", "minidiff", "generate", "--prompts", prompts, "--out", out, "--seed", 1]
                    given += ["--steps", args.steps, "--quiet"]
                seconds = run([sys.executable, *map(str, given)]).seconds
                made = len(list(Path(out).glob("*.png")))
                if made != args.lines:
                    raise SystemExit(f"{way}: {made} pictures of {args.lines} lines")
                return seconds

        with tempfile.TemporaryDirectory(dir=here) as out:  # which size of group is chosen
            short = here / "short.txt"
            short.write_text("\n".join(texts[:16]))
            given = ["--prompts", short, "--out", out, "--steps", 1, "--quiet"]
            run([sys.executable, "-m", "minidiff", "generate", *map(str, given)])
            together = json.loads((Path(out) / "job.json").read_text())["together"]
        rows = summarise(in_turn(("from Python", "--prompts"), args.rounds, once))
    print(f"{args.lines} lines, {args.steps} steps, {together} at once")
    rated = ((r.name, f"{args.lines / r.seconds:.2f}", f"{r.speed:.3f}") for r in rows)
    print(table(("way", "pictures a second", "rate"), rated))
    rate = rows[1].speed
    print(f"\nrate: {rate:.3f} of Python's ({'at least' if rate >= BOUND else 'BELOW'} {BOUND})")
    write_json(args.json, args, facts, rows=rows, together=together)
    return 0 if rate >= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
