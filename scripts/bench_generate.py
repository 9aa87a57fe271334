"""Measure whole commands, from the start of the process to its end: time and peak memory.

    python scripts/bench_generate.py --work FOLDER                       # all tables
    python scripts/bench_generate.py --work FOLDER --tables defaults     # minidiff and diffusers as they come, to PNG
    python scripts/bench_generate.py --work FOLDER --tables float32 bfloat16 --rounds 3
    python scripts/bench_generate.py --work FOLDER --tables load first-step --rounds 5 --json load.json
    python scripts/bench_generate.py --tables bundled [--model FILE]     # the small model that ships with minidiff
    python scripts/bench_generate.py --work FOLDER --tiny                # a tiny model: does all of it run?

FOLDER gets a Stable Diffusion 1.5 with random weights (11 GB, made once; needs the `parity` extra), as diffusers
writes it and as minidiff files. Both sides run in turn, after one short run of each that warms up: the disk's cache,
byte code, and what minidiff finds out about the processor once. Medians count; the spread is the distance between the
quartiles, `speed` the median of the quotients, round by round. Memory is the most that a process ever held.

    defaults    `minidiff generate`, 512 x 512, 20 steps, against StableDiffusionPipeline.from_pretrained(...)(prompt)
    float32     both told to compute in float32
    bfloat16    both told to compute in bfloat16
    first-step  until the first call of the UNet begins: imports, loading, the prompt encoded
    load        until the model is loaded; its memory beyond the imports, as a share of the weights
    bundled     pictures a second at batch 16, and the time to the first picture
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from _bench import hints, in_turn, machine, need, progress, show_machine, summarise, table, write_json
from _children import PROMPT, STEPS
from _processes import Done, run

CHILDREN = Path(__file__).resolve().parent / "_children.py"
SHAPE = "a red star on a blue background"
BATCH = 16
Runs = dict[str, list[Done]]


class Case(NamedTuple):
    """Measured command; ``warm`` is a shorter one that reads and finds out the same."""

    name: str
    command: list[str]
    warm: list[str]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    tables = [name for name in TABLES if name in args.tables]
    if any(name != "bundled" for name in tables):
        prepare(args.work, "tiny" if args.tiny else "full size")
    facts = machine()
    show_machine(facts, hints())
    results = {}
    for name in tables:
        cases, show = TABLES[name]
        runs = measured(cases(args), args.rounds)
        print(f"\n{name}\n\n{show(args, runs)}", flush=True)
        results[name] = {case: [done._asdict() for done in found] for case, found in runs.items()}
    write_json(args.json, args, facts, tables=results)
    return 0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="where the model is (default: out/bench)")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a picture (default: {STEPS})")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script out")
    parser.add_argument("--model", type=Path, metavar="FILE", help="of the table bundled, if another than the bundled")
    parser.add_argument("--options", default="", metavar="TEXT", help="further ones of `minidiff generate`, in quotes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here as well")
    return parser.parse_args(argv)


def prepare(work: Path, kind: str) -> None:
    """Make the model, unless it exists."""
    need("diffusers", "pip install '.[parity]', or take --tables bundled alone")
    mark = work / "ready.json"
    if mark.exists():
        there = json.loads(mark.read_text())
        if there != kind:
            raise SystemExit(f"{work} holds a model of {there}, {kind} is asked for; name another folder by --work")
        return
    work.mkdir(parents=True, exist_ok=True)
    print(f"making a model ({kind}) in {work}", file=sys.stderr, flush=True)
    run([sys.executable, CHILDREN, "prepare", work, kind])
    mark.write_text(json.dumps(kind))


def measured(cases: list[Case], rounds: int) -> Runs:
    """Run every case once a round, in turn, after a short run of each."""
    for case in cases:
        progress(f"{case.name}: warming up")
        run(case.warm)
    named = {case.name: case for case in cases}

    def once(name: str) -> Done:
        done = run(named[name].command)
        progress(f"{name}: {done.seconds:.2f} s, {done.peak / 1e9:.2f} GB")
        return done

    return in_turn(list(named), rounds, once)


# --- what is started -------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace, model: Path | None, prompt: str, out: Path, steps: int, *more: str) -> list[str]:
    """Return the command of minidiff."""
    source = ["--model", str(model)] if model is not None else []
    own = [prompt, *source, "--steps", str(steps), "--out", str(out), "--force", *more, *shlex.split(args.options)]
    return [sys.executable, "-m", "minidiff", "generate", *own]


def child(*words: object) -> list[str]:
    return [sys.executable, str(CHILDREN), *map(str, words)]


def commands(dtype: str) -> Callable[[argparse.Namespace], list[Case]]:
    """Return the cases of both sides from prompt to PNG in ``dtype``; "default" sets none."""

    def cases(args: argparse.Namespace) -> list[Case]:
        model, out = args.work / "float32.safetensors", args.work / "ours.png"
        told = [] if dtype == "default" else ["--dtype", dtype]
        ours = [generate(args, model, PROMPT, out, steps, *told) for steps in (args.steps, 1)]
        theirs = [child("picture", args.work / "folder", dtype, n, args.work / "theirs.png") for n in (args.steps, 1)]
        return [Case("minidiff generate", *ours), Case("diffusers", *theirs)]

    return cases


def until(when: str) -> Callable[[argparse.Namespace], list[Case]]:
    """Return the cases of both sides as far as ``when``, and of their imports for the memory."""

    def cases(args: argparse.Namespace) -> list[Case]:
        found = {
            f"minidiff, {dtype} file": child("ours", args.work / f"{dtype}.safetensors", when)
            for dtype in ("float32", "float16")
        }
        found["diffusers, float32 folder"] = child("theirs", args.work / "folder", when)
        if when == "loaded":
            found |= {
                "imports of minidiff": child("imports", "ours"),
                "imports of diffusers": child("imports", "theirs"),
            }
        return [Case(name, command, command) for name, command in found.items()]

    return cases


def bundled(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the bundled model: one picture from the start of the process, and a batch without it."""
    out = Path(args.work, "bundled.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    single = [generate(args, args.model, SHAPE, out, steps) for steps in (args.steps, 1)]
    batch = [child("pictures", args.model or "", BATCH, steps) for steps in (args.steps, 1)]
    return [Case(FIRST, *single), Case(MANY, *batch)]


FIRST, MANY = "the first picture, process start to PNG", f"{BATCH} pictures in one batch, model loaded"


# --- what is shown ---------------------------------------------------------------------------------------------------


def show_commands(args: argparse.Namespace, runs: Runs) -> str:
    """Return the table of time and memory of both, relative to diffusers, and the dtype that minidiff used."""
    said = run(child("recipe", args.work / "ours.png")).facts
    note = f"\n\nminidiff computed in {said['dtype']}, {said['steps']} steps, {said['width']} x {said['height']}"
    return show_times(args, runs) + note


def show_times(args: argparse.Namespace, runs: Runs) -> str:
    """Return the table of time and memory of each, relative to the last."""
    base = list(runs)[-1]
    rows = summarise(seconds(runs), base)
    peaks = {name: peak(runs, name) for name in runs}
    header = ("", "seconds", "spread", "speed", "peak GB", "of diffusers'")
    return table(
        header,
        (
            (
                *(row.name, f"{row.seconds:.2f}", f"{row.spread:.2f}", f"{row.speed:.2f}x"),
                *(f"{peaks[row.name] / 1e9:.2f}", f"{peaks[row.name] / peaks[base]:.2f}"),
            )
            for row in rows
        ),
    )


def show_load(args: argparse.Namespace, runs: Runs) -> str:
    """Return the table of times to load, and memory beyond the imports relative to the size of the weights."""
    loads = {name: found for name, found in runs.items() if not name.startswith("imports")}
    rows = summarise(seconds(loads), list(loads)[-1])
    lines = []
    for row in rows:
        before = peak(runs, f"imports of {row.name.split(',')[0]}")
        most, weights = peak(runs, row.name), runs[row.name][0].facts["weights"]
        figures = (f"{row.seconds:.2f}", f"{row.spread:.2f}", f"{row.speed:.2f}x", f"{most / 1e9:.2f}")
        lines.append((row.name, *figures, f"{weights / 1e9:.2f}", f"{(most - before) / weights:.2f}"))
    return table(("", "seconds", "spread", "speed", "peak GB", "weights GB", "beyond imports / weights"), lines)


def show_bundled(args: argparse.Namespace, runs: Runs) -> str:
    """Return the table of seconds to the first picture, and pictures a second."""
    batch = [done.facts["seconds"] for done in runs[MANY]]
    rows = (*summarise({FIRST: seconds(runs)[FIRST]}), *summarise({MANY: batch}))
    peaks = (peak(runs, FIRST), peak(runs, MANY))
    rates = ("", f"{BATCH / statistics.median(batch):.2f}")
    shown = table(
        ("", "seconds", "spread", "pictures a second", "peak GB"),
        (
            (row.name, f"{row.seconds:.2f}", f"{row.spread:.2f}", rate, f"{most / 1e9:.2f}")
            for row, rate, most in zip(rows, rates, peaks, strict=True)
        ),
    )
    said = runs[MANY][0].facts
    return f"{shown}\n\n{args.steps} steps, guidance 7.5; the batch in {said['dtype']} on {said['device']}"


def seconds(runs: Runs) -> dict[str, list[float]]:
    return {name: [done.seconds for done in found] for name, found in runs.items()}


def peak(runs: Runs, name: str) -> float:
    """Return the median of the peak memory of its processes, in bytes."""
    return statistics.median(done.peak for done in runs[name])


TABLES: dict[str, tuple[Callable[[Any], list[Case]], Callable[[Any, Runs], str]]] = {
    "defaults": (commands("default"), show_commands),
    "float32": (commands("float32"), show_commands),
    "bfloat16": (commands("bfloat16"), show_commands),
    "first-step": (until("begun"), show_times),
    "load": (until("loaded"), show_load),
    "bundled": (bundled, show_bundled),
}

if __name__ == "__main__":
    sys.exit(main())
