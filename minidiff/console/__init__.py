"""Console output and exit of a command: a failure is one line on stderr and an exit status, never a traceback.

Exit status 0 is success. 2 is a mistake that the user can correct: a wrong value, a missing or damaged file. 1 is
everything else: a full disk, no memory, an error in minidiff. 130 is Ctrl-C, 143 SIGTERM. A reader that closes the pipe
(``| head``) is no failure. ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from minidiff.console.signals import Terminated, terminable
from minidiff.console.spelling import near
from minidiff.errors import ConfigError, MinidiffError

# Errors of the system about names and permissions, which the user can correct, unlike a full disk or an I/O error.
MISTAKES = {
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "EEXIST", "ENAMETOOLONG", "EINVAL", "ELOOP")
}

LONGEST_LINE = 2000  # characters of one line


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, and whose help shows examples as they are written.

    ``late`` returns the end of the help, which is too expensive to compute before it is needed. ``elsewhere``: options
    of other programs and their equivalents here.
    """

    late: Callable[[], str] | None = None
    elsewhere: Mapping[str, str] = {}

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        """Return the text of ``--help``."""
        return super().format_help() + (self.late() if self.late is not None else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report an unknown option before a missing argument."""
        for word in args or ():
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows is not an option, or belongs to the command
            option = re.sub("^[–—]+", "--", word.partition("=")[0])  # two hyphens as word processors write them
            number = re.fullmatch(r"-\d*\.?\d+", option)
            known = option in self._option_string_actions and word[0] == "-"
            if len(option) < 2 or option[0] != "-" or " " in word or number or known:
                continue
            if word[0] == "-" and word[1] != "-" and word[:2] in self._option_string_actions:
                continue  # -hx
            self.error(f"there is no option {option if word[0] == '-' else word}{self._meant(option)}")
        return super().parse_known_args(args, namespace)

    def _meant(self, option: str) -> str:
        plain = option.lstrip("-").replace("_", "-")
        there = self.elsewhere.get(plain if len(plain) > 1 else option)
        return f"; here it is {there}" if there else near(option, self._option_string_actions)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            guess = near(value, action.choices)
            names = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is none of {names}{guess}")

    def _print_message(self, message: str, file: Any = None) -> None:
        show(message, end="")

    def error(self, message: str) -> NoReturn:
        """Raise :class:`ConfigError` with argparse's message and a hint to ``--help``."""
        raise ConfigError(f"{message}{'' if message.endswith('?') else ';'} `{self.prog} --help` says what there is")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 26, **kwargs})


def open_standard_streams() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise the next file to be opened would become stdout or stderr, and receive what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one


def guard(work: Callable[[], object], *, debug: bool = False) -> int:
    """Run ``work`` and return an exit status; a failure is one line on stderr.

    An integer that ``work`` returns is the status of a success, like that of diff(1). Warnings are one line each as
    well. ``debug`` prints the traceback of a failure before its line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is shown as its number
            with suppress(ValueError):  # closed
                stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _Warnings()
        seen: list[int] = []
        try:
            with terminable(seen):
                status = work()
                _flush()
        except SystemExit as e:  # --help and --version
            with suppress(OSError):
                _flush()
            return e.code if isinstance(e.code, int) else 0
        except BaseException as e:
            with suppress(OSError):
                _flush()
            if debug:
                with suppress(OSError):
                    traceback.print_exc()
            try:
                return _end(Terminated() if seen else e)
            except KeyboardInterrupt:  # again, while the first one was being reported
                return 130
    return status if isinstance(status, int) else 0


def say(message: object, kind: str = "") -> None:
    """Print one line on stderr, "minidiff: message"; ``kind`` may be "error" or "warning"."""
    if sys.stderr is None:  # print would use stdout instead
        return
    with suppress(OSError, ValueError):  # a closed stderr must not hide the exit status
        print(f"minidiff: {kind + ': ' if kind else ''}{one_line(message)}", file=sys.stderr, flush=True)


def warn(message: str | Warning, stacklevel: int = 1) -> None:
    """Call ``warnings.warn``, ignoring its failure if stderr is closed.

    On the command line, a :class:`Warning` with a method ``after`` is shown as what that returns, given those of its
    kind that were shown before in this run; nothing if that is "".
    """
    with suppress(OSError, ValueError):
        warnings.warn(message, stacklevel=stacklevel + 1)


def show(result: object, end: str = "\n", longest: int | None = None) -> None:
    """Print a result on stdout, keeping its lines; control characters are written as escapes.

    ``longest``: maximum number of characters of a line. Does nothing without stdout; raises OSError if it can no longer
    be written to.
    """
    if sys.stdout is None or getattr(sys.stdout, "closed", False):
        return
    lines = [
        line if longest is None or len(line) <= longest else f"{line[:longest]} ..." for line in str(result).split("\n")
    ]
    whole = "\n".join(map(escaped, lines)) + end
    print(whole, end="", flush=True)  # in one piece: other processes may write to the same pipe


def show_json(found: object) -> None:
    """Print a result on stdout as JSON; control characters are written as JSON escapes."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    show("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def escaped(text: str) -> str:
    """Return ``text`` with escapes for everything unprintable: control characters, directions, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: object, longest: int = LONGEST_LINE) -> str:
    """Return ``message`` as one line. Every message that may quote an untrusted file passes through here.

    Control characters and marks of writing direction are written as escapes; beyond ``longest`` characters the middle
    is left out.
    """
    text = " ".join(str(message)[: 8 * longest].split())
    if len(str(message)) > 8 * longest or len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {' '.join(str(message)[-longest // 8 :].split())}"
    return escaped(text)


def _end(e: BaseException) -> int:
    """Report the exception that ended a run, and return the exit status."""
    if isinstance(e, Terminated):
        say("terminated")
        return 143
    if isinstance(e, KeyboardInterrupt):
        say("interrupted")
        return 130
    if isinstance(e, BrokenPipeError):
        return 0
    if isinstance(e, MinidiffError):
        say(e, "error")
        return 2
    if isinstance(e, MemoryError) or _is_out_of_memory(e):
        detail = f" ({one_line(e)[:200]})" if str(e) else ""
        say(f"not enough memory{detail}; try a smaller size, fewer images or --dtype float16 on a GPU", "error")
        return 1
    if isinstance(e, OSError):
        say(": ".join(map(str, filter(None, (e.filename, e.strerror)))) or e, "error")
        return 2 if e.errno in MISTAKES else 1
    say(f"unexpected {type(e).__name__}: {e or '(no message)'}; run again with --debug to see where", "error")
    return 1


def _is_out_of_memory(e: BaseException) -> bool:
    """Return True for torch's out-of-memory errors, by name and message: on the CPU it is a plain RuntimeError."""
    said = str(e).lower()
    named = type(e).__name__ == "OutOfMemoryError"
    return isinstance(e, RuntimeError) and (
        named or "can't allocate memory" in said or "not enough memory" in said or "out of memory" in said
    )


def _flush() -> None:
    """Flush stdout. If that fails, keep the interpreter from trying again at exit."""
    if sys.stdout is None or getattr(sys.stdout, "closed", False):
        return
    try:
        sys.stdout.flush()
    except OSError as e:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if os.name == "nt" and e.errno == errno.EINVAL:  # error of Windows for a closed pipe
            raise BrokenPipeError from None
        raise


class _Warnings:
    """Function that shows the warnings of a run, one line each."""

    def __init__(self) -> None:
        self.before: dict[type[Warning], list[Warning]] = {}

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        before = self.before.setdefault(category, [])
        after = getattr(message, "after", None)
        told = message if after is None else after(before)
        if str(told):
            say(told, "warning")
            if isinstance(message, Warning):
                before.append(message)
