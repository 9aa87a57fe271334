"""Compare random configurations with diffusers: UNets, autoencoders, text encoders, tokenizers, whole pipelines.

    python scripts/parity_configs.py                                     # 400 of each kind; case K is always the same
    python scripts/parity_configs.py --kind unet --first 0 --count 2000  # just these

Each case (tests/support/parity/configs.py draws it) is a small folder that the reference wrote, with odd values of its
settings, read by both. It ends as "equal" (the same bits), "refused" (by one of minidiff's errors), "both refuse" or
"the reference refuses"; anything else is a fault: another output, an error that is none of minidiff's, a worker that
dies or hangs. The cases are dealt to worker processes. Exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = ("unet", "vae", "text", "tokenizer", "pipeline")
AT_ONCE = 20  # cases of one worker
SECONDS = 60  # for each of them, the imports included; far more than any needs


def work(kind: str, first: int, last: int) -> None:
    """Run as a worker: print a line of JSON for every case."""
    import torch

    from tests.support.parity import configs

    torch.set_num_threads(1)
    configs.quiet()
    for number in range(first, last):
        end = configs.try_case(kind, number)
        print(json.dumps({"number": number, "end": end, "fault": end.startswith(configs.FAULTS)}), flush=True)


def hand_out(kind: str, first: int, last: int) -> list[tuple[str, str | None]]:
    """Yield how each case of one worker ended, with a description if that is a fault."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", kind, str(first), str(last)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    why = ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=SECONDS * (last - first), check=False
        )
        out, why = done.stdout, f"killed the worker (status {done.returncode}) {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as e:
        out, why = (e.stdout or b"").decode() if isinstance(e.stdout, bytes) else e.stdout or "", "was not done in time"
    said = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    ends = [(s["end"], f"{kind} {s['number']}: {s['end']}" if s["fault"] else None) for s in said]
    if len(said) < last - first:
        lost = first + len(said)
        ends.append(("lost", f"{kind} {lost}: {why}"))
        ends += hand_out(kind, lost + 1, last) if lost + 1 < last else []
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS, help="of which kinds (default: all)")
    parser.add_argument("--count", type=int, default=400, metavar="N", help="cases of each kind (default: 400)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the number of the first one (default: 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], int(args.worker[1]), int(args.worker[2]))
        return 0
    begun, last = time.perf_counter(), args.first + args.count
    starts = range(args.first, last, AT_ONCE)
    jobs = [(kind, first, min(first + AT_ONCE, last)) for first in starts for kind in args.kind]
    ends: dict[str, Counter[str]] = {kind: Counter() for kind in args.kind}
    faults: list[str] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for (kind, _, _), found in zip(jobs, pool.map(lambda job: hand_out(*job), jobs), strict=True):
            ends[kind].update("FAULT" if fault else end for end, fault in found)
            for fault in [fault for _, fault in found if fault]:
                faults.append(fault)
                print(fault, flush=True)
            done = sum(map(Counter.total, ends.values()))
            print(f"{done} of {len(args.kind) * args.count} cases, {len(faults)} faults", flush=True)
    names = ("equal", "refused", "both refuse", "the reference refuses", "FAULT")
    print("", " " * 10 + "".join(name.rjust(len(name) + 3) for name in names), sep="\n")
    for kind in args.kind:
        print(kind.ljust(10) + "".join(str(ends[kind][name]).rjust(len(name) + 3) for name in names))
    print(f"{time.perf_counter() - begun:.0f} s; {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
