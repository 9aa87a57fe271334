"""The ``minidiff`` command line: one module a command, each with its grammar and what it runs.

The only package that knows every other one; heavy imports stand inside the functions that need them. stdout carries
results alone (paths, reports), stderr everything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn

from minidiff.cli import convert, explain, export, generate, info, parity, plan, probe, replay, tokens, train
from minidiff.config import quote
from minidiff.console import Parser, guard, open_standard_streams
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.version import VERSION

COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "generate": generate.run,
    "replay": replay.run,
    "info": info.run,
    "convert": convert.run,
    "export": export.run,
    "plan": plan.run,
    "train": train.run,
    "probe": probe.run,
    "tokens": tokens.run,
    "explain": explain.run,
    **dict.fromkeys(("parity", "parity record", "parity compare", "parity goldens"), parity.run),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name; by default the process's own); return the exit status.

    0 is success, 2 a mistake in what was asked for, 1 another failure (or, of ``parity``, a difference), 130 Ctrl-C,
    143 SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    return guard(lambda: _run(argv), debug="--debug" in argv)


def command() -> NoReturn:
    """Entry point of the ``minidiff`` command: call :func:`main`, then end the process at once.

    Taking the interpreter apart takes a quarter of a second once torch is loaded, and may fail: torch's caches of a
    sliced model keep gloo's threads alive beyond the process group, and one that lets go of its last tensor when there
    is no interpreter any more aborts the process (https://github.com/pytorch/pytorch/pull/179291), after a finished
    training. All files are closed by then, and :func:`guard` has flushed what was printed. A profiler or a debugger,
    which reports at the end, gets its end.
    """
    open_standard_streams()
    status = main()
    if sys.gettrace() is None and sys.getprofile() is None:
        os._exit(status)
    sys.exit(status)


def _run(argv: list[str]) -> int | None:
    args = parser().parse_args(arranged(argv))
    if any("\0" in (getattr(args, name, None) or "") for name in ("out", "dst")):
        raise ConfigError("the name of what is to be written holds a null character, which no system takes")
    if args.command is None:
        raise ConfigError(f"no command given; it is one of {', '.join(COMMANDS)} (`minidiff --help` says more)")
    return COMMANDS[args.command](args)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = Parser(prog="minidiff", description="Stable Diffusion in pure PyTorch: pictures from text, on your machine.")
    top.add_argument("--version", action="version", version=f"minidiff {VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    top.epilog = "`minidiff COMMAND --help` explains a command."
    added = (generate, explain, replay, info, convert, export, plan, train, parity, probe, tokens)
    for add in (command.add for command in added):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def arranged(argv: list[str]) -> list[str]:
    """Return ``argv`` as the parser takes it: ``parity record`` and ``parity compare`` as one word, "help" behind its
    command.

    Raises :class:`ConfigError` for a misspelt second word of ``parity``.
    """
    if argv[:1] and argv[0] in ("help", "--help", "-h"):
        return [*_joined(argv[1:])[:1], "--help"]
    if argv[:1] and " " in argv[0] and argv[0][0] != "-":
        raise ConfigError(f"{quote(argv[0])} is no command; for a picture of it: minidiff generate {quote(argv[0])}")
    return _joined(argv)


def _joined(argv: list[str]) -> list[str]:
    if argv[:1] != ["parity"] or not argv[1:]:
        return argv
    if argv[1] in parity.COMMANDS:
        return [" ".join(argv[:2]), *argv[2:]]
    guess = near(argv[1], parity.COMMANDS)
    if guess and not os.path.lexists(argv[1]):
        raise ConfigError(f"parity {argv[1]}: there is no such command, and no such checkpoint{guess}")
    return argv
