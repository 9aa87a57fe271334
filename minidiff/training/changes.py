"""Check that a resumed run is shown the pictures that it began with.

Which example a step reads follows from its number and from how many pictures there are, so with others a run doesn't
end where it would have ended. That may be meant; it isn't to happen unseen. A set of the user's own pictures has a mark
for each, a number that changes with its pixels and its caption (``ImageFolder.marks``), and the run's state keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED = 3  # how many pictures a message names


def marks_of(data: Any) -> dict[str, int]:
    """The marks of a stream's pictures by name; none of a stream that has no names."""
    return dict(getattr(data, "marks", {}))


def said(then: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """Describe, with counts, how the pictures of a run differ from those it began with; None if they do not."""
    kinds = {
        "added": sorted(now.keys() - then.keys()),
        "gone": sorted(then.keys() - now.keys()),
        "changed": sorted(name for name in then.keys() & now.keys() if then[name] != now[name]),
    }
    told = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]
    return f"{', '.join(told)}; {len(then)} then, {len(now)} now" if told else None


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
