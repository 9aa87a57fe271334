"""Measure the speed of a UNet step, or of a decoding, in every way available on this machine.

    python scripts/bench.py                               # Stable Diffusion 1.5 at 512 x 512 with guidance, float32
    python scripts/bench.py --against diffusers           # diffusers beside it (the `parity` extra)
    python scripts/bench.py --against diffusers --compiled --switches all   # both compiled with freezing, too
    python scripts/bench.py --openvino                    # OpenVINO beside it (pip install openvino)
    python scripts/bench.py --part vae --batch 1          # the decoder instead
    python scripts/bench.py --family sdxl --rounds 1      # SDXL at 1024 x 1024
    python scripts/bench.py --device cuda --dtype float16
    python scripts/bench.py --size 256 --dtype bfloat16 --rounds 5 --json bench.json

Random weights; time does not depend on them, and diffusers' model holds the very same ones. All ways are tried once,
and their results held against the plain model's; then they run in turn, in every round once, so that whatever else
the machine does falls on all of them. Medians count, and the spread is the distance between the quartiles. The ceiling
is what a 3 x 3 convolution, the kernel that comes nearest to a processor's limit, reaches in this process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from _bench import Summary, hints, machine, need, show_machine, summarise, table, write_json  # noqa: E402
from _ways import Found, Way, eager, frozen, measured, openvino, ours, switched, taken, tried  # noqa: E402
from _works import DTYPES, FAMILIES, PARTS, Work, ceiling, counted  # noqa: E402

from minidiff import fast  # noqa: E402

COMPILERS = ("c++", "g++", "clang++", "cl")
HEADER = ("", "seconds", "spread", "GFLOP/s", "of the ceiling", "speed", "difference")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    check(args)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    device, dtype, family = torch.device(args.device), DTYPES[args.dtype], FAMILIES[args.family]
    size = args.size or family.side
    facts = machine() | surroundings(device)
    show_machine(facts, hints() if device.type == "cpu" else [])

    work = PARTS[args.part](family, size, args.batch, device, dtype)
    ways = chosen(args, work, dtype, size)
    plain, flops = counted(work)
    found = tried(ways, plain, device)
    top = ceiling(family, size, args.batch, device, dtype)
    times = measured(ways, args.rounds, device)

    against = "diffusers, eager" if args.against else ways[0].name
    rows = summarise(times, against)
    print(f"\n{args.family}, {args.part}, {size} x {size}, batch {args.batch}, {args.dtype}, {args.rounds} rounds")
    print(f"{flops / 1e12:.3f} TFLOP a call; a 3 x 3 convolution reaches {top / 1e9:.0f} GFLOP/s")
    print(f"speed: against {against}; difference: from the plain model's result")
    kernels = taken(work)
    if args.switches != "none" and kernels:
        print(f"tried on this processor (`minidiff probe`): {', '.join(f'{n}: {way}' for n, way in kernels.items())}")
    print()
    other = next((way.name for way in ways if way.name.startswith("OpenVINO")), None)
    beside = {} if other is None else {row.name: f"{row.speed:.2f}x" for row in summarise(times, other)}
    header = (*HEADER, *(["of OpenVINO's speed"] if beside else []))
    print(
        table(
            header,
            ((*figures(row, found[row.name], flops, top), *filter(None, [beside.get(row.name)])) for row in rows),
        )
    )
    for way in ways:
        if "compiled" in way.name:
            print(f"\n{way.name}: its first call took {found[way.name].first:.0f} s")
    write_json(
        args.json, args, facts, kernels=kernels, flops=flops, ceiling=top, against=against, rows=rows, first=found
    )
    return 0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="unet")
    parser.add_argument("--family", choices=FAMILIES, default="sd15", help="tiny is for trying this script out")
    parser.add_argument("--size", type=int, help="of the picture's side (default: what the family was trained on)")
    parser.add_argument("--batch", type=int, default=2, help="2 is one picture with guidance (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--switches",
        choices=("each", "all", "none"),
        default="each",
        help="ours: plain, each by itself and all together (default); plain and all together; or plain alone",
    )
    parser.add_argument("--against", choices=("diffusers",))
    parser.add_argument("--compiled", action="store_true", help="ours, and theirs with --against, compiled too")
    parser.add_argument("--openvino", action="store_true", help="the same network in OpenVINO")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """End with one line if something that was asked for is not available here."""
    if args.against:
        need("diffusers", "pip install '.[parity]', or leave out --against")
    if args.compiled and not any(map(shutil.which, COMPILERS)):
        raise SystemExit("torch.compile needs a C++ compiler, and none is found; install g++, or leave out --compiled")
    if args.openvino:
        need("openvino", "pip install openvino, or leave out --openvino")
    if args.openvino and args.device != "cpu":
        raise SystemExit(f"--openvino runs on the CPU, and --device is {args.device}; leave one of them out")


def chosen(args: argparse.Namespace, work: Work, dtype: torch.dtype, size: int) -> list[Way]:
    """Return the ways that were asked for, minidiff's plain one first."""
    kept = {"each": None, "all": ((), tuple(fast.SWITCHES)), "none": ((),)}[args.switches]
    ways = list(ours(work)) if kept is None else [switched(work, names) for names in kept]
    theirs = work.theirs() if args.against else None
    if theirs is not None:
        ways.append(eager(work, theirs))
    if args.compiled:
        ways.append(frozen("minidiff", work.twin(), work))
    if args.compiled and theirs is not None:
        ways.append(frozen("diffusers", theirs, work))
    if args.openvino:
        ways.append(openvino(work, dtype))
    return ways


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return the parts of torch's state that the figures depend on."""
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        facts["card"] = torch.cuda.get_device_name(device)
        facts["matmul"] = torch.get_float32_matmul_precision()  # "highest" is without TF32
        facts["TF32 in convolutions"] = torch.backends.cudnn.allow_tf32
    return facts


def figures(row: Summary, found: Found, flops: int, top: float) -> tuple[str, ...]:
    """Return a row of the table."""
    rate = flops / row.seconds
    difference = "0" if found.difference == 0 else f"{found.difference:.1e}"
    shown = (f"{row.seconds:.3f}", f"{row.spread:.3f}", f"{rate / 1e9:.0f}", f"{rate / top:.0%}", f"{row.speed:.2f}x")
    return (row.name, *shown, difference)


if __name__ == "__main__":
    sys.exit(main())
