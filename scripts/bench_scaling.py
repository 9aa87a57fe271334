"""Measure how time and memory grow with the work: Stable Diffusion 1.5's UNet at batch 1-8 and size 256-1024.

    python scripts/bench_scaling.py
    python scripts/bench_scaling.py --batches 1 2 --sizes 256 512 --rounds 3 --json scaling.json
    python scripts/bench_scaling.py --family tiny --batches 1 2 --size 64 --sizes 64 128      # to try it out

Every point is a process of its own, whose memory is the most that it held beyond the weights and the imports. Time is
the best of the rounds. Batches run at one size, sizes at one batch. Below the table stand the exponents p of
time ~ FLOPs ** p and memory ~ FLOPs ** p: 1 is growth in step with the work. Self-attention's work grows with the
square of the area; its memory does not, so along sizes memory has to stay below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from _bench import grows, hints, machine, progress, show_machine, table, write_json
from _processes import ROOT, run

HEADER = ("size, batch", "TFLOP", "seconds", "GFLOP/s", "GB", "work", "time", "memory")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.point:
        print(json.dumps(point(args, *args.point)))
        return 0
    facts = machine()
    show_machine(facts, hints() if args.device == "cpu" else [])
    along = {
        "batches": [(args.size, batch) for batch in args.batches],
        "sizes": [(size, args.batch) for size in args.sizes],
    }
    found = {}
    for size, batch in dict.fromkeys(along["batches"] + along["sizes"]):
        found[size, batch] = measured(args, size, batch)
        progress(f"{size} x {size}, batch {batch}: {found[size, batch]['seconds']:.2f} s")
    for name, places in along.items():
        points = [{"size": size, "batch": batch, **found[size, batch]} for size, batch in places]
        print(f"\n{name}\n\n{show(points)}", flush=True)
    points = [{"size": size, "batch": batch, **values} for (size, batch), values in found.items()]
    write_json(args.json, args, facts, points=points)
    return 0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    parser.add_argument("--size", type=int, default=512, help="that batches run at (default: 512)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768, 1024], help="(default: 256 ... 1024)")
    parser.add_argument("--batch", type=int, default=1, help="that sizes run at (default: 1)")
    parser.add_argument("--family", choices=("sd15", "sdxl", "tiny"), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--point", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measured(args: argparse.Namespace, size: int, batch: int) -> dict[str, Any]:
    """Measure one point in a process of its own."""
    options = ["--family", args.family, "--dtype", args.dtype, "--device", args.device, "--rounds", str(args.rounds)]
    return run([sys.executable, __file__, "--point", str(size), str(batch), *options]).facts


def point(args: argparse.Namespace, size: int, batch: int) -> dict[str, Any]:
    """Measure in that process: FLOPs, the best time, and bytes beyond those before the first call."""
    sys.path.insert(0, str(ROOT))
    import torch
    from _works import DTYPES, FAMILIES, counted, timed, unet_call

    torch.set_grad_enabled(False)
    device = torch.device(args.device)
    work = unet_call(FAMILIES[args.family], size, batch, device, DTYPES[args.dtype])
    card = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if card else resident()
    _, flops = counted(work)
    best = min(timed(lambda: work.ours(*work.inputs), device) for _ in range(args.rounds))
    most = torch.cuda.max_memory_allocated(device) if card else highest()
    return {"flops": flops, "seconds": best, "memory": most - before}


def resident() -> int:
    """Return the bytes that this process holds now; if the system does not say, the most that it ever held."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return highest()
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def highest() -> int:
    """Return the most bytes that this process ever held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(points: list[dict[str, Any]]) -> str:
    """Return the table of points along one axis, each relative to the first, and how they grow."""
    first = points[0]
    lines = []
    for p in points:
        work, time, memory = (p[name] / first[name] for name in ("flops", "seconds", "memory"))
        figures = (f"{p['flops'] / 1e12:.3f}", f"{p['seconds']:.2f}", f"{p['flops'] / p['seconds'] / 1e9:.0f}")
        ratios = (f"{p['memory'] / 1e9:.2f}", f"{work:.2f}x", f"{time:.2f}x", f"{memory:.2f}x")
        lines.append((f"{p['size']} x {p['size']}, {p['batch']}", *figures, *ratios))
    shown = table(HEADER, lines)
    if len(points) < 2:
        return shown
    flops = [p["flops"] for p in points]
    exponents = (f"{name} ~ FLOPs ** {grows(flops, [p[key] for p in points]):.2f}" for name, key in GROWING)
    return f"{shown}\n\n{', '.join(exponents)}"


GROWING = (("time", "seconds"), ("memory", "memory"))

if __name__ == "__main__":
    sys.exit(main())
