"""From lines to pictures, and from pictures to groups, each of which is one batch.

The bits of a picture depend on how many are computed together. Groups therefore follow from the lines and one number
alone, however often a run is interrupted, and whichever process makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minidiff.cli.many.lines import Line
from minidiff.cli.output import filled
from minidiff.config import check

PATTERN = "{k:05}-{prompt}-{seed}.png"
TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")  # one for each picture of a batch
EACH = (*TEXTS, "seed", "num_images")


class Picture(NamedTuple):
    """One picture: its line, the request for it alone, the name of its file."""

    line: int
    asked: Mapping[str, Any]
    name: str


Group = list[Picture]


def pictures(lines: Iterable[Line], seeds: Sequence[int], pattern: str) -> list[Picture]:
    """Return the pictures of all lines.

    ``seeds``: for lines that name none. With one, s, line k begins at s + k - 1; of several, each makes a picture.
    Raises :class:`ConfigError` if two pictures would have one name.
    """
    found: list[Picture] = []
    named: dict[str, int] = {}
    for line in lines:
        shared = {name: value for name, value in line.asked.items() if name not in ("seed", "num_images")}
        for seed in seeds_of(line, seeds):
            name = filled(pattern, str(shared.get("prompt") or "picture"), seed, line.number)
            before = named.setdefault(name.casefold(), line.number)  # some file systems ignore capitals
            once = len(named) > len(found)
            check(once, f"lines {before} and {line.number} both make {name}; --out takes {{k}} and {{seed}} in names")
            found.append(Picture(line.number, {**shared, "seed": seed}, name))
    return found


def seeds_of(line: Line, seeds: Sequence[int]) -> Sequence[int]:
    """Return the seed of each picture of a line."""
    if "seed" not in line.asked and len(seeds) > 1:
        return seeds
    first = line.asked.get("seed", seeds[0] + line.number - 1)
    return range(first, first + line.asked.get("num_images", 1))


def groups(found: Iterable[Picture], together: int) -> list[Group]:
    """Return groups of at most ``together`` consecutive pictures that fit into one request."""
    made: list[Group] = []
    for picture in found:
        if made and len(made[-1]) < together and shared(made[-1][0]) == shared(picture):
            made[-1].append(picture)
        else:
            made.append([picture])
    return made


def shared(picture: Picture) -> dict[str, Any]:
    """Return what the pictures of a group have in common: all options but texts and seed, and which texts there are."""
    own = {name: value for name, value in picture.asked.items() if name not in EACH}
    return {**own, "texts": [name for name in TEXTS if name in picture.asked]}


def batch(group: Group) -> dict[str, Any]:
    """Return the fields of the one request that makes a group."""
    fields = dict(group[0].asked)
    for name in TEXTS:
        if name in fields:
            fields[name] = [picture.asked[name] for picture in group]
    fields["seed"] = [picture.asked["seed"] for picture in group]
    return fields if "prompt" in fields else {**fields, "num_images": len(group)}


def finished(group: Group, there: Callable[[str], bool]) -> bool:
    """Return True if the files of all pictures are there."""
    return all(there(picture.name) for picture in group)
