"""Print how much room minidiff and all that it needs take in the environment that runs this.

    python scripts/measure_install.py

Counted are the files of each installed distribution: minidiff, its six dependencies, and what those need in turn.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

NEEDED = ("torch", "torchvision", "einops", "numpy", "tqdm", "safetensors")
SHOWN = 8  # distributions with a line of their own


def needs(found: metadata.Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Return what a distribution with these extras needs: names, each with its own extras."""
    for line in found.requires or ():
        wanted, _, condition = line.partition(";")
        of = re.findall(r"extra == ['\"]([^'\"]+)", condition)
        told = re.match(r"([\w.-]+)\s*(?:\[([^\]]*)\])?", wanted.strip())
        if told and (not of or extras & set(of)):
            yield told[1], frozenset(name.strip() for name in (told[2] or "").split(",") if name.strip())


def installed() -> dict[str, metadata.Distribution]:
    """Return minidiff and what it needs, as far as that is installed, by name."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    wanted = [(name, frozenset[str]()) for name in ("minidiff", *NEEDED)]
    while wanted:
        name, extras = wanted.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system or version of Python
            continue
        wanted += needs(found[name], extras)
    return found


def size(found: metadata.Distribution) -> int:
    """Return the bytes of the files of a distribution."""
    paths = {found.locate_file(file).resolve() for file in found.files or ()}  # type: ignore[attr-defined]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> int:
    """Measure and print."""
    found = installed()
    taken = sorted(((size(one), f"{name} {one.version}") for name, one in found.items()), reverse=True)
    rest = taken[SHOWN:]
    others = [(sum(n for n, _ in rest), f"{len(rest)} others")] if rest else []
    for count, name in (*taken[:SHOWN], *others, (sum(n for n, _ in taken), "together")):
        print(f"{count / 1e6:9,.1f} MB  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
