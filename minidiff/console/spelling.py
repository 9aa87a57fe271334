"""Suggestions for misspelt names.

Every refusal of an unknown name (an option, a sampler, a field of a config) ends in :func:`near`, so that all of them
guess alike. A guess is only said, never taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 100  # characters of a name that is looked at: comparing takes time by the square


def near(name: object, known: Iterable[object]) -> str:
    """``"; did you mean X?"`` with the one of ``known`` that is nearest to ``name``, or "" if none is near.

    Capitals, hyphens, underscores, dots and spaces do not count.
    """
    if not isinstance(name, str):
        return ""
    names = {_plain(str(k)): str(k) for k in known}
    plain = _plain(name)
    parts = [k for k in names if len(plain) > 2 and plain in k]
    found = [k for k in parts if k.startswith(plain)] or parts or difflib.get_close_matches(plain, names, 1)
    return f"; did you mean {names[found[0]]}?" if found else ""


def _plain(name: str) -> str:
    return "".join(c for c in name[:LONGEST].casefold() if c not in "-_–—. ")
