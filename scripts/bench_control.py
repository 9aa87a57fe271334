"""Measure a run under a ControlNet, whole processes of minidiff and of diffusers in turn: time and peak memory.

    python scripts/bench_control.py --work FOLDER                   # Stable Diffusion 1.5, 512 x 512, two steps
    python scripts/bench_control.py --work FOLDER --rounds 3 --dtypes bfloat16
    python scripts/bench_control.py --work FOLDER --tiny            # a tiny model: does all of it run?

FOLDER gets a model with random weights, as for bench_generate.py, which may share it, and a ControlNet for it (another
3 GB; both need the `parity` extra). Each process opens model and ControlNet, makes a picture and ends: minidiff as
`minidiff generate` does, its parts and the ControlNet taking turns in memory, diffusers as its documentation has it.
`run` is the time from the loaded models to the pixels. Medians count; the spread is the distance between the quartiles,
`speed` the median of the quotients, round by round. Memory is the most that a process ever held.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from _bench import hints, in_turn, machine, progress, show_machine, summarise, table, write_json
from _processes import Done, run
from bench_generate import child, prepare

OURS, THEIRS = "minidiff", "diffusers"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where the model is (default: out/bench)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here as well")
    args = parser.parse_args(argv)
    prepare(args.work, "tiny" if args.tiny else "full size")
    if not (args.work / "edges.png").exists():
        progress("making a ControlNet")
        run(child("prepare_control", args.work, "tiny" if args.tiny else "full size"))
    facts = machine()
    show_machine(facts, hints())
    results = {}
    for dtype in args.dtypes:
        runs = in_turn([OURS, THEIRS], args.rounds, lambda name, dtype=dtype: once(args, name, dtype))  # type: ignore[misc]
        print(f"\n{dtype}, {args.steps} steps\n\n{shown(runs)}", flush=True)
        results[dtype] = {name: [done._asdict() for done in found] for name, found in runs.items()}
    write_json(args.json, args, facts, tables=results)
    return 0


def once(args: argparse.Namespace, name: str, dtype: str) -> Done:
    """Run one side once."""
    kind = "controlled" if name == OURS else "controlled_theirs"
    done = run(child(kind, args.work, dtype, args.steps))
    progress(f"{name}, {dtype}: {done.seconds:.2f} s, {done.peak / 1e9:.2f} GB")
    return done


def shown(runs: dict[str, list[Done]]) -> str:
    """Return the table of both sides."""
    peaks = {name: statistics.median(done.peak for done in found) for name, found in runs.items()}
    inside = {name: statistics.median(done.facts["seconds"] for done in found) for name, found in runs.items()}
    rows = summarise({name: [done.seconds for done in found] for name, found in runs.items()}, THEIRS)
    header = ("", "seconds", "spread", "speed", "run", "peak GB", "of diffusers'")
    return table(
        header,
        (
            (
                *(row.name, f"{row.seconds:.2f}", f"{row.spread:.2f}", f"{row.speed:.2f}x", f"{inside[row.name]:.2f}"),
                *(f"{peaks[row.name] / 1e9:.2f}", f"{peaks[row.name] / peaks[THEIRS]:.2f}"),
            )
            for row in rows
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
