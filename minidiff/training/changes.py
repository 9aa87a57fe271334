"""Check that a resumed run sees the pictures that it began with.

The examples of a step follow from its number and the number of pictures, so a run that is resumed with other pictures
ends elsewhere. That may be intended, but must not happen unnoticed. A folder of pictures has a mark for each, a number
that changes with its pixels and its caption (``ImageFolder.marks``), and the run's state keeps these marks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED = 3  # pictures that a message names


def marks_of(data: Any) -> dict[str, int]:
    """Return the marks of a stream's pictures by name; empty for a stream without names."""
    return dict(getattr(data, "marks", {}))


def said(then: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """Describe, with counts, how the pictures of a run differ from those it began with; None if they do not differ."""
    kinds = {
        "added": sorted(now.keys() - then.keys()),
        "gone": sorted(then.keys() - now.keys()),
        "changed": sorted(name for name in then.keys() & now.keys() if then[name] != now[name]),
    }
    told = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]
    return f"{', '.join(told)}; {len(then)} then, {len(now)} now" if told else None


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
