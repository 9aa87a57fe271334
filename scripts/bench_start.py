"""Measure a start: from the process to the first picture of the bundled model, and where its seconds go.

    python scripts/bench_start.py
    python scripts/bench_start.py --rounds 9 --steps 20 --json start.json

Whole processes are started in turn: `import torch` alone, and `minidiff generate`, with the files in the system's cache
and bytecode written. Then one process prints the time of each stage, and one what its imports took by package
(`-X importtime`, summed).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _bench import in_turn, machine, show_machine, summarise, table, write_json  # noqa: E402

PROMPT = "a red circle"
LISTED = 8  # packages
STAGES = """
import json, sys, time
begun = time.perf_counter()
found = []
def done(stage):
    global begun
    now = time.perf_counter()
    found.append((stage, now - begun))
    begun = now
import torch
done("import torch")
import minidiff
from minidiff import fast
sd = minidiff.bundled(device="cpu")
done("import minidiff, open the model")
fast.optimize(sd)
done("put the switches on")
run = sd.run(minidiff.Request(sys.argv[1], steps=int(sys.argv[2]), seed=0))
done("encode the prompt, plan")
next(run)
done("first step, which packs weights")
run.last()
done("other steps")
pixels = sd.finish(run)
done("decode")
from minidiff.pipeline.png import label, save_png, to_pil
save_png(label(to_pil(pixels)[0], run.recipes[0]), sys.argv[3])
done("write the PNG")
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args()
    facts = machine()
    show_machine(facts, [])
    with tempfile.TemporaryDirectory() as folder:
        picture = os.path.join(folder, "a.png")
        options = ["--steps", str(args.steps), "--seed", "0", "--out", picture, "--force", "--quiet"]
        generate = ["-m", "minidiff", "generate", PROMPT, *options]
        whole = {"import torch": ["-c", "import torch"], "minidiff generate": generate}
        for command in whole.values():
            seconds(command)
        rows = summarise(in_turn(list(whole), args.rounds, lambda name: seconds(whole[name])))
        stages = json.loads(output(["-c", STAGES, PROMPT, str(args.steps), picture]))
        packages = imports(generate)
    print(
        table(("whole process", "seconds", "spread"), [(r.name, f"{r.seconds:.2f}", f"{r.spread:.2f}") for r in rows])
    )
    print(f"\nbeyond torch: {rows[1].seconds - rows[0].seconds:.2f} s\n")
    print(table(("stage", "seconds"), [(name, f"{taken:.3f}") for name, taken in stages]))
    print("\n" + table(("imports of", "seconds"), [(name, f"{taken:.3f}") for name, taken in packages.items()]))
    write_json(args.json, args, facts, rows=rows, stages=stages, imports=packages)
    return 0


def seconds(arguments: list[str]) -> float:
    """Return the wall time of a Python process."""
    begun = time.perf_counter()
    output(arguments)
    return time.perf_counter() - begun


def output(arguments: list[str]) -> str:
    """Run Python in the checkout's root and return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True).stdout


def imports(arguments: list[str]) -> dict[str, float]:
    """Return the seconds that the imports of a process took, by package, the longest first."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", *arguments]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    taken: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", said, re.MULTILINE):
        taken[name.partition(".")[0]] += int(own)
    shown = dict(taken.most_common(LISTED))
    shown["all others"] = sum(taken.values()) - sum(shown.values())
    return {name: microseconds / 1e6 for name, microseconds in shown.items()}


if __name__ == "__main__":
    sys.exit(main())
