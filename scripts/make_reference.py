"""Write a reference of the public names as one HTML page, from their docstrings.

    python scripts/make_reference.py reference.html

The names are those of ``tests/fixtures/api.txt``: whatever stands in ``__all__`` of the public modules, with
signatures, and the public methods and properties of classes. The page needs no network, and is light or dark as the
system is.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minidiff.page.html import Child, Html, document, flat, tag
from minidiff.version import VERSION

MODULES = (
    "minidiff",
    "minidiff.samplers",
    "minidiff.fast",
    "minidiff.parity",
    "minidiff.adapters.lora",
    "weights_convert",
)
STYLE = """
.entry { margin: 1.6em 0; } .entry .entry { margin: 1em 0 1em 1.5em; }
.signature { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
dl.names { columns: 16em; } pre { overflow-x: auto; }
"""


def prose(text: str) -> Html:
    """Turn a docstring into paragraphs, lists and, where it is indented, code."""
    found: list[Child] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            found.append(tag("pre", inspect.cleandoc(block)))
        elif all(line.startswith(("* ", "  ")) for line in lines):
            items = re.split(r"\n\* ", "\n" + block)[1:]
            found.append(tag("ul", *(tag("li", inline(item)) for item in items)))
        else:
            found.append(tag("p", inline(block)))
    return flat(found)


def inline(text: str) -> list[Child]:
    """Mark the names in a paragraph as code."""
    parts = re.split(r"``(.+?)``|:\w+:`~?(.+?)`", text)
    found: list[Child] = []
    for k in range(0, len(parts), 3):
        found.append(parts[k])
        name = next((part for part in parts[k + 1 : k + 3] if part), None)
        found.append(None if name is None else tag("code", name))
    return found


def signature(thing: Any, name: str) -> str:
    """Return a name with its arguments, without addresses of objects."""
    try:
        return name + re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        return name


def members(thing: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties of a class that have a text of their own, by name."""
    found = {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}
    described = {name: value for name, value in found.items() if callable(value) or isinstance(value, property)}
    return [(name, value) for name, value in described.items() if inspect.getdoc(value) and not _foreign(value)]


def _foreign(value: Any) -> bool:
    """Return True for what comes from a base class outside both packages."""
    home = getattr(getattr(value, "fget", value), "__module__", None) or ""
    return not home.startswith(("minidiff", "weights_convert"))


def entry(thing: Any, name: str, path: str, level: int) -> Html:
    """Return a name with its signature, its text and its members."""
    said = signature(thing, name) if callable(thing) else name
    text = inspect.getdoc(thing) if callable(thing) or isinstance(thing, property) else None
    below = members(thing) if isinstance(thing, type) and level == 3 else []
    return tag(
        "section",
        tag(f"h{level}", name, id=path),
        tag("p", said, cls="signature"),
        prose(text) if text else None,
        *(entry(member, own, f"{path}.{own}", level + 1) for own, member in below),
        cls="entry",
    )


def page() -> str:
    """Return the reference."""
    body: list[Child] = [tag("h1", f"minidiff {VERSION}: reference"), prose(str(import_module("minidiff").__doc__))]
    for home in MODULES:
        module = import_module(home)
        names = sorted(name for name in getattr(module, "__all__", []) if not name.startswith("__"))
        names = names or sorted(name for name, value in vars(module).items() if _own(value, home) and name[0] != "_")
        links = [tag("dt", tag("a", name, href=f"#{home}.{name}")) for name in names]
        body += [tag("h2", home, id=home), tag("dl", *links, cls="names")]
        if home != "minidiff":
            body.append(prose(module.__doc__ or ""))
        body += [entry(getattr(module, name), name, f"{home}.{name}", 3) for name in names]
    return document(f"minidiff {VERSION}: reference", tag("main", *body), styles=[STYLE])


def _own(value: Any, home: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == home


def main() -> int:
    """Write the page."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    from minidiff.storage.writing import atomic

    with atomic(Path(sys.argv[1])) as file:
        file.write(page().encode("utf-8"))
    print(sys.argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
