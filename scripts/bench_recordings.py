"""Measure what comparing two recordings costs: speed, and peak memory, in fresh processes without torch.

    python scripts/bench_recordings.py                  # recordings of 2 GB in a temporary folder, which needs 10 GB
    python scripts/bench_recordings.py --gigabytes 0.2 --folder /tmp
    python scripts/bench_recordings.py --record CHECKPOINT --size 512x512 --steps 2   # what recording adds to a run

Speeds are bytes of one recording per second of CPU time, with both in the cache of the file system (reading reads
both). Exits with 1 if a bound is broken: 300 MB; equal recordings at half the speed of reading; differing ones at
0.15 GB/s; 0.1 s for the import; recording in 1.3 times the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from _processes import run

MEMORY, READING, DIFFERING, IMPORT, RECORDING = 300e6, 0.5, 0.15e9, 0.1, 1.3
STAGE = 128 << 20  # bytes of the largest stage: a layer of the decoder at 512 x 512

WRITE = """
import sys, numpy as np
from minidiff.parity import Writer
folder, size, stage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
block = rng.standard_normal((1, 128, 256, stage // (128 * 256 * 4)), dtype=np.float32)
kinds = {"a": {}, "b": {}, "c": {}, "d": {"layout": "NHWC"}}
for name, options in kinds.items():
    with Writer(f"{folder}/{name}.safetensors", name, **options) as recording:
        for k in range(max(1, size // stage)):
            x = block + np.float32(k)
            x = x * np.float32(1 + 1e-6) if name == "c" else x
            recording.add(f"step.{k}/x", x.transpose(0, 2, 3, 1) if name == "d" else x)
"""
READ = """
import sys, time, json
begun = time.process_time()
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
print(json.dumps({"seconds": time.process_time() - begun}))
"""
COMPARE = """
import sys, time, json
from minidiff.parity.comparing import compare
from minidiff.parity.values import open_recording
begun = time.process_time()
with open_recording(sys.argv[1]) as a, open_recording(sys.argv[2]) as b:
    report = compare(a, b)
print(json.dumps({"seconds": time.process_time() - begun, "equal": report.equal, "torch": "torch" in sys.modules}))
"""
IMPORTED = """
import json, time
begun = time.perf_counter()
import minidiff.parity
print(json.dumps({"seconds": time.perf_counter() - begun}))
"""
RECORDED = """
import sys, time, json, torch
import weights_convert
from minidiff.parity import recording
from minidiff.parity.ours import Ours, asked
checkpoint, width, height, steps, path = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
pipe = weights_convert.load(checkpoint, device="cpu")
request = asked("a red fox", steps=steps, width=width, height=height)
pipe.generate(request, steps=1)  # weights are in memory, and code is loaded
begun = time.perf_counter()
pipe.generate(request)
plain = time.perf_counter() - begun
begun = time.perf_counter()
stages = recording.record_to(path, Ours(pipe, request), {})
print(json.dumps({"plain": plain, "recorded": time.perf_counter() - begun, "stages": stages}))
"""


def held(what: str, value: float, bound: float, unit: str, *, least: bool = False) -> bool:
    """Print a figure with its bound; return True if it is kept."""
    kept = value >= bound if least else value <= bound
    words = ("at least" if kept else "LESS THAN THE") if least else ("at most" if kept else "MORE THAN THE")
    print(f"{what:<42} {value:8.3f} {unit:<5} ({words} {bound:g})")
    return kept


def comparisons(folder: Path, size: int) -> bool:
    """Measure comparisons of recordings of ``size`` bytes; return True if all bounds are kept."""
    python = sys.executable
    run([python, "-c", WRITE, folder, str(size), str(min(STAGE, size))])
    a, b, c, d = (folder / f"{name}.safetensors" for name in "abcd")
    size = a.stat().st_size
    read = size / min(run([python, "-c", READ, a, b]).facts["seconds"] for _ in range(3))
    print(f"recordings of {size / 1e9:.2f} GB each; reading both: {read / 1e9:.2f} GB/s of one")
    kept = True
    for what, other, equal, bound in (
        ("equal", b, True, READING * read),
        ("differing in every value", c, False, DIFFERING),
        ("equal, one with the channels last", d, True, 0.0),
    ):
        done = run([python, "-c", COMPARE, a, other])
        assert done.facts["equal"] == equal, what
        assert not done.facts["torch"], what
        speed = size / done.facts["seconds"]
        kept &= held(f"{what}, speed", speed / 1e9, bound / 1e9, "GB/s", least=True)
        kept &= held(f"{what}, peak memory", done.peak / 1e6, MEMORY / 1e6, "MB")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each recording (default: 2)")
    parser.add_argument("--folder", help="where they are written (default: the system's temporary folder)")
    parser.add_argument("--record", metavar="CHECKPOINT", help="measure recording a run of this model instead")
    parser.add_argument("--size", default="512x512", metavar="WxH", help="of the picture (default: 512x512)")
    parser.add_argument("--steps", type=int, default=2, help="of the run (default: 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.record:
            size = args.size.split("x")
            target = Path(folder) / "r.safetensors"
            facts = run([sys.executable, "-c", RECORDED, args.record, *size, str(args.steps), target]).facts
            print(json.dumps({**facts, "bytes": target.stat().st_size}))
            return int(not held("recording, of the run", facts["recorded"] / facts["plain"], RECORDING, "times"))
        kept = held(
            "import minidiff.parity",
            min(run([sys.executable, "-c", IMPORTED]).facts["seconds"] for _ in range(3)),
            IMPORT,
            "s",
        )
        return int(not (kept & comparisons(Path(folder), int(args.gigabytes * 1e9))))


if __name__ == "__main__":
    sys.exit(main())
