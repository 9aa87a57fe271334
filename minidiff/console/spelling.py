"""Suggestions for misspelt names.

Every error about an unknown name (an option, a sampler, a field of a config) ends with :func:`near`, so that all
suggestions work alike. A suggestion is shown, never applied.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 100  # characters of a name that are compared, which takes quadratic time


def near(name: object, known: Iterable[object]) -> str:
    """Return ``"; did you mean X?"`` with the name in ``known`` nearest to ``name``, or "" if none is near.

    Capitals, hyphens, underscores, dots and spaces are ignored.
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
