"""Compare every sampler with every option, whole trajectories, bit for bit with diffusers; print a summary.

    python scripts/parity_grid.py [--only CLASS ...] [--every K] [--jobs N] [--record FILE]

The grid is that of ``tests/support/parity/grid.py``: every scheduler class, the products of its options, 1 to 50 steps
or given timesteps and sigmas, float32, float16 and bfloat16, on a CPU. A combination that shows the user the same bits
as another of its class, length and dtype (timesteps, what the model is shown, x0, samples) is counted as removed. Where
minidiff refuses (a ConfigError), the reference is run alone, to see whether it raises or gives NaN. The status is 1 if
anything differs, or minidiff alone refuses and the grid does not name why. ``--record`` keeps what is done, so that a
run that was stopped goes on there (as long as neither minidiff/samplers nor the grid has changed). Needs the `parity`
extra; about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Done = list[tuple[str, str, str, str]]  # outcomes as tuples: name, status, key, note


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="CLASS", help="scheduler classes of diffusers")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="every K-th config of each class only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument("--record", type=Path, help="a file that keeps what is done; a second run goes on there")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come

    from tests.support.parity import grid

    unknown = [name for name in args.only if name not in grid.GRID]
    if unknown:
        parser.error(f"the grid has no {', '.join(unknown)}; it has {', '.join(grid.GRID)}")
    wanted = [(n, i) for n in args.only or grid.GRID for i in range(0, len(grid.configs(n)), args.every)]
    done: dict[tuple[str, int], Done] = {}
    for key, found in run(wanted, args.jobs, args.record):
        done[key] = found
    return summary([outcome for key in wanted for outcome in done[key]])


# --- running ---------------------------------------------------------------------------------------------------------


def run(wanted: list[tuple[str, int]], jobs: int, record: Path | None) -> Iterator[tuple[tuple[str, int], Done]]:
    """Yield the result of every config in ``wanted`` (class, number): from ``record``, and the rest as it is done."""
    kept = recorded(record) if record is not None else {}
    yield from ((key, kept[key]) for key in wanted if key in kept)
    rest = [key for key in wanted if key not in kept]
    start, tried = time.monotonic(), 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(work, *key): key for key in rest}
        for count, task in enumerate(as_completed(tasks), 1):
            key, found = tasks[task], task.result()
            if record is not None:
                with record.open("a") as file:
                    file.write(json.dumps([*key, found]) + "\n")
            tried += len(found)
            for _, status, _, note in found:
                if status == "different":
                    print(f"\n{key[0]} DIFFERS: {note}", flush=True)
            if count % 20 == 0 or count == len(rest):
                spent = time.monotonic() - start
                print(f"{count} of {len(rest)} configs, {tried} combinations, {spent:.0f} s", flush=True)
            yield key, found


def work(name: str, number: int) -> Done:
    """Compare all combinations of one config, in a process of its own."""
    import warnings

    import diffusers

    from tests.support.parity import grid

    warnings.simplefilter("ignore")  # those of the reference
    diffusers.logging.set_verbosity_error()
    return [astuple(outcome) for outcome in grid.outcomes(grid.configs(name)[number], grid.givens(name))]


def recorded(path: Path) -> dict[tuple[str, int], Done]:
    """Return the contents of the record; start a new one if there is none, or if its sources differ."""
    sources = [*sorted((ROOT / "minidiff").glob("samplers/**/*.py")), ROOT / "minidiff" / "schedule.py"]
    sources += [ROOT / "tests" / "support" / "parity" / f"{name}.py" for name in ("axes", "grid", "sampler_twins")]
    stamp = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines or json.loads(lines[0]) != stamp:
        path.write_text(json.dumps(stamp) + "\n")
        return {}
    rows = [json.loads(line) for line in lines[1:]]
    return {(name, number): found for name, number, found in rows}


# --- what came of it -------------------------------------------------------------------------------------------------


def summary(found: Done) -> int:
    from tests.support.parity import grid

    """Print the table and the reasons; return the exit status."""

    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    seen: set[str] = set()
    reasons: Counter[tuple[str, str, str]] = Counter()
    for name, status, key, note in found:
        row = by_class[name]
        row["tried"] += 1
        row[status] += 1
        if status == grid.EQUAL:
            row["repeated" if key in seen else "distinct"] += 1
            seen.add(key)
        elif status in (grid.BOTH, grid.OURS, grid.DIFFERENT):
            reasons[name, status, note] += 1
    columns = ["tried", grid.EQUAL, "repeated", "distinct", grid.NEAR, grid.OVERFLOW, grid.BOTH, grid.OURS]
    columns.append(grid.DIFFERENT)
    total = sum(by_class.values(), Counter())
    print("\n| scheduler | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name, row in [*by_class.items(), ("all", total)]:
        print(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    for status in (grid.DIFFERENT, grid.OURS, grid.BOTH):
        print(f"\n{status}: {total[status]}")
        for (name, what, note), count in sorted(reasons.items()):
            if what == status:
                print(f"  {count:5} {name}: {note}")
    print("\nrefused by minidiff alone, since the reference")
    for part, what in grid.ALONE.items():
        print(f"  {what} ({part})")
    unknown = sum(n for (_, s, note), n in reasons.items() if s == grid.OURS and not any(w in note for w in grid.ALONE))
    print(f"\n{total['distinct']} distinct combinations are equal bit for bit; {total[grid.DIFFERENT]} differ")
    print(f"{unknown} are refused by minidiff alone for a reason that is not named")
    return 1 if total[grid.DIFFERENT] or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
