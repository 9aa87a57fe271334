"""``minidiff parity compare``: from options to a report, without torch.

The options are defined in cli/parity.py.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from minidiff import console
from minidiff.config import check
from minidiff.console import say
from minidiff.parity import automap
from minidiff.parity.comparing import compare
from minidiff.parity.formats import formatted
from minidiff.parity.importers import open_source, read_names
from minidiff.parity.report import Report
from minidiff.parity.values import Source
from minidiff.storage.writing import Existing, atomic, check_place

EQUAL, PARTED = 0, 1  # exit statuses


def run(args: Namespace) -> int:
    """Compare two recordings; print the report, return the exit status."""
    check(len(args.judge) <= 2, f"--judge is given {len(args.judge)} times; at most one for each side")
    check(
        args.write_names is None or args.names is not None, "--write-names keeps what --names gives: add --names auto"
    )
    html, kept = writable(args.html, args), writable(args.write_names, args)
    with ExitStack() as stack:
        a, b = (stack.enter_context(open_source(path)) for path in (args.a, args.b))
        judges = [stack.enter_context(open_source(path)) for path in args.judge]
        local = None if args.local is None else stack.enter_context(open_source(args.local))
        names = _names(args, a, b)
        report = compare(a, b, args.tolerance or 0.0, judges, local, names)
    if kept is not None:
        with atomic(kept, existing(args)) as file:
            file.write(json.dumps(dict(names), indent=1).encode())
    about = {"A's file": str(args.a), "B's file": str(args.b), **report.about}
    return show(replace(report, about=about), args, html)


def _names(args: Namespace, a: Source, b: Source) -> Mapping[str, str]:
    """Return the map of names that is asked for; say what was proposed."""
    if args.names is None:
        return {}
    if args.names != "auto":
        return read_names(args.names)
    pairs = automap.propose(a, b)
    if not args.quiet:
        for line in automap.table(pairs).split("\n"):
            say(line)
    return automap.as_names(pairs)


def show(report: Report, args: Namespace, html: Path | None) -> int:
    """Print the report, write it as a page if requested, and return the exit status."""
    longest = console.LONGEST_LINE if args.format == "text" else None
    console.show(formatted(report, args.format, every=args.all), longest=longest)
    if html is not None:
        with atomic(html, existing(args)) as file:
            file.write(formatted(report, "html").encode())
        if not args.quiet:
            say(f"the report as a page: {html}")
    return EQUAL if report.equal else PARTED


def existing(args: Namespace) -> Existing:
    """Return what happens to an existing file."""
    return "replace" if args.force else "refuse"


def writable(path: str | None, args: Namespace) -> Path | None:
    """Return ``path`` after checking it before the work begins. Raises for an existing file or a missing folder."""
    if path is not None:
        check_place(path, existing(args))
    return None if path is None else Path(path)
