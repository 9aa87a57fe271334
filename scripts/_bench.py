"""Helpers of the measuring scripts: turns, medians, ratios, spreads, tables, and facts about the machine.

The standard library alone: a process that starts others and measures their memory has to stay small (`_processes.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Summary:
    """One candidate's times: their median, the distance between their quartiles, and how many times as fast it is as
    the one that it is held against (the median of the quotients, round by round)."""

    name: str
    seconds: float
    spread: float
    speed: float
    runs: tuple[float, ...]


def in_turn(names: Sequence[str], rounds: int, run: Callable[[str], T]) -> dict[str, list[T]]:
    """Call ``run`` with every name once a round; return the results by name.

    Whatever else the machine does falls on all of them. Each round begins one further, so that none always comes
    behind the same other.
    """
    found: dict[str, list[T]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in (*names[first:], *names[:first]):
            found[name].append(run(name))
    return found


def summarise(times: Mapping[str, Sequence[float]], against: str | None = None) -> list[Summary]:
    """Return a row for each candidate, compared with the one named ``against`` (the first by default)."""
    base = times[next(iter(times)) if against is None else against]
    return [
        Summary(
            name,
            statistics.median(seconds),
            spread(seconds),
            statistics.median(theirs / ours for theirs, ours in zip(base, seconds, strict=True)),
            tuple(seconds),
        )
        for name, seconds in times.items()
    ]


def spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles; of fewer than three values, that between the extremes."""
    if len(values) < 3:
        return max(values) - min(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table: the first column to the left, figures to the right."""
    rows = list(rows)
    width = max(len(row[0]) for row in (header, *rows))
    lines = [f"| {first:{width}} | {' | '.join(rest)} |" for first, *rest in (header, *rows)]
    lines.insert(1, f"|{'-' * (width + 2)}|{'---:|' * (len(header) - 1)}")
    return "\n".join(lines)


def grows(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent p of y ~ x ** p: the slope of the straight line through the logarithms."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def need(package: str, how: str) -> None:
    """End with one line unless ``package`` is installed."""
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{package} is not installed; {how}")


def machine() -> dict[str, Any]:
    """Return the properties of the machine that figures depend on, as far as known without importing torch."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "openvino")},
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Return the release of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def threads() -> int:
    """Return the number of threads that torch uses, here and in child processes."""
    cores = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked), cores) if asked.isdigit() else cores


def hints(huge_pages: Path = HUGE_PAGES) -> list[str]:
    """Return hints about settings of the environment that may be faster. Nothing is set here."""
    cores = os.cpu_count() or 1
    found = []
    if threads() < cores:
        found.append(f"threads: {threads()} of {cores} cores; OMP_NUM_THREADS={cores} takes all")
    if not any(name in os.environ.get("LD_PRELOAD", "") for name in ("malloc", "mimalloc")):
        found.append(
            "allocator: the C library's, which gives large tensors back to the system at once; one that keeps them "
            "(LD_PRELOAD=libtcmalloc.so or libjemalloc.so) saves touching new pages"
        )
    if huge_pages.exists() and "[madvise]" in huge_pages.read_text() and "THP_MEM_ALLOC_ENABLE" not in os.environ:
        found.append("pages: of 4 KiB; THP_MEM_ALLOC_ENABLE=1 lets torch ask for huge ones")
    return found


def show_machine(facts: Mapping[str, Any], advice: Sequence[str]) -> None:
    """Print the machine's properties and the hints, once."""
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    for line in advice:
        print(f"hint: {line}")
    print(flush=True)


def write_json(path: Path | None, args: argparse.Namespace, facts: Mapping[str, Any], **results: Any) -> None:
    """Write all results for another program; do nothing without a ``path``."""
    if path is not None:
        content = {"arguments": vars(args), "machine": facts, **results}
        from minidiff.storage.writing import atomic

        with atomic(path) as file:
            file.write((json.dumps(content, default=_plain, indent=1) + "\n").encode())


def progress(text: str) -> None:
    """Show one line on stderr that the next one replaces."""
    print(f"  {text:100}", end="\r", file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else str(value)
