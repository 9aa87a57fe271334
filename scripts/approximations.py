"""Measure gain and cost of each approximation: seconds, distance from the exact picture, prompts that come out.

    python scripts/approximations.py                    # the bundled model, 50 prompts, 3 rounds
    python scripts/approximations.py --model FILE --prompts 200 --json approximations.json

Every row makes the same prompts from the same noise. The rows run in turn, all of them in every round, so that whatever
else the machine does falls on all; medians count. PSNR is that of the mean squared error over all pictures, as they are
saved (levels 0 to 255). Prompts are judged as by scripts/eval_shapes.py, so the model must be one of the shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import _judge  # noqa: E402
import eval_shapes  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import minidiff  # noqa: E402
from minidiff import StableDiffusion, fast  # noqa: E402
from minidiff.errors import ConfigError, MinidiffError  # noqa: E402
from minidiff.storage.writing import atomic  # noqa: E402
from minidiff.training import shapes  # noqa: E402

INTERVALS = ((0.0, 0.8), (0.2, 0.8))
DEEP = (2, 3, 5)
MERGE = (0.5,)
SOLVERS = ("dpmpp_2m", "unipc")


@dataclass
class Row:
    """Way to make the pictures: a model, its switches, and the arguments of ``generate``."""

    name: str
    sd: StableDiffusion
    given: dict[str, Any]
    approximate: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each round
    right: float = math.nan  # the share of prompts


def rows(args: argparse.Namespace) -> list[Row]:
    """Return all rows, the exact model first."""
    sd = opened(args)
    exact: dict[str, Any] = {"steps": args.steps, "guidance_scale": args.scale}
    found = [Row(f"exact, {args.steps} steps", sd, exact)]
    for low, high in INTERVALS:
        found.append(Row(f"guidance from {low:g} to {high:g}", sd, {**exact, "guidance_interval": (low, high)}))
    found += [Row(f"deep features at every {n}. step", sd, exact, {"deep": n}) for n in DEEP]
    found += [Row(f"tokens merged, {ratio:.0%}", sd, exact, {"merge": ratio}) for ratio in MERGE]
    for steps in args.fewer:
        found += [Row(f"{name}, {steps} steps", sd, {**exact, "steps": steps, "sampler": name}) for name in SOLVERS]
    found.append(Row("bfloat16", opened(args, dtype=torch.bfloat16), exact))
    if args.taesd:
        found.append(Row("TAESD decodes", opened(args, vae=args.taesd), exact))
    return found


def opened(args: argparse.Namespace, dtype: torch.dtype | None = None, vae: str | None = None) -> StableDiffusion:
    """Open the model that the command line names, in ``dtype``, or with another VAE."""
    if vae is not None:
        import weights_convert

        return cast(StableDiffusion, weights_convert.load(args.model, dtype=dtype, swap={"vae": vae}))
    sd = minidiff.load(args.model, dtype=dtype) if args.model else minidiff.bundled(dtype=dtype)
    if not isinstance(sd, StableDiffusion):
        raise ConfigError(f"{args.model} takes no prompt; a model of the shapes is wanted")
    return sd


def make(row: Row, captions: Sequence[str], folder: Path, seed: int) -> None:
    """Make one round of ``row`` in ``folder``; return the seconds that it took, and how many pictures are right."""
    seconds = 0.0

    def timed(some: Sequence[str], first: int) -> list[Image.Image]:
        nonlocal seconds
        begun = time.perf_counter()
        images = row.sd.generate(
            list(some),
            seed=[seed + first + k for k in range(len(some))],
            height=_judge.SIDE,
            width=_judge.SIDE,
            progress=False,
            **row.given,
        )
        seconds += time.perf_counter() - begun
        return cast("list[Image.Image]", images)

    folder.mkdir(exist_ok=True)
    if row.approximate:
        fast.approximate(row.sd, **row.approximate)
    try:
        row.right = eval_shapes.evaluate(timed, captions, folder).score("right")
    finally:
        fast.restore(row.sd)
    row.seconds.append(seconds)


def psnr(found: Path, exact: Path) -> float | None:
    """Return the decibels between the pictures of two folders; None if they are equal."""
    errors = []
    for path in sorted(exact.glob("*.png")):
        a, b = (np.asarray(Image.open(p), dtype=np.float64) for p in (path, found / path.name))
        errors.append(float(np.mean((a - b) ** 2)))
    error = statistics.mean(errors)
    return 10 * math.log10(255**2 / error) if error else None


def report(found: Sequence[Row], root: Path, count: int) -> list[dict[str, Any]]:
    """Print the table; return its rows."""
    print(f"| {'':30} | seconds a picture | speed | PSNR | prompts right |")
    print(f"|{'-' * 32}|---:|---:|---:|---:|")
    table = []
    for k, row in enumerate(found):
        ratio = statistics.median(a / b for a, b in zip(found[0].seconds, row.seconds, strict=True))
        decibels = psnr(root / str(k), root / "0")
        figures: dict[str, Any] = {
            "name": row.name,
            "seconds": statistics.median(row.seconds) / count,
            "speed": ratio,
            "psnr": decibels,
            "right": row.right,
        }
        table.append(figures)
        distance = "same" if decibels is None else f"{decibels:.1f} dB"
        print(f"| {row.name:30} | {figures['seconds']:.3f} | {ratio:.2f}x | {distance} | {row.right:.0%} |")
    return table


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a minidiff file; the bundled model if left out")
    parser.add_argument("--taesd", metavar="PATH", help="a small decoder for the latents of --model, as one more row")
    parser.add_argument("--set", choices=eval_shapes.SETS, default="single", help="of prompts (default: single)")
    parser.add_argument("--prompts", type=int, default=50, metavar="N", help="(default: 50)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="of the exact model (default: 25)")
    parser.add_argument("--fewer", type=int, nargs="+", default=[12, 8], metavar="N", help="steps (default: 12 8)")
    parser.add_argument("--scale", type=float, default=5.0, metavar="X", help="guidance scale (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts and the noise (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the pictures there, one folder a row")
    args = parser.parse_args(argv)
    for name in ("prompts", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1 is needed")
    if args.taesd and not args.model:
        parser.error("--taesd needs --model: the bundled model's latents are its own")
    return args


def run(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Make all rounds, with the pictures in folders of ``root``; return the table's rows."""
    root.mkdir(parents=True, exist_ok=True)
    found = rows(args)
    captions = [item.caption for item in shapes.items(args.seed, 0, args.prompts, args.set)]
    for n in range(args.rounds):
        for k, row in enumerate(found):
            make(row, captions, root / str(k), args.seed)
            print(f"  round {n + 1}, {row.name}: {row.seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    return report(found, root, len(captions))


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            table = run(args, Path(args.keep or scratch))
        if args.json:
            with atomic(args.json) as file:
                file.write(json.dumps({"arguments": vars(args), "rows": table}, default=str, indent=1).encode())
    except (MinidiffError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
