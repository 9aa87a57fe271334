"""Console output and exit of a command: a failure is one line on stderr and an exit status, never a traceback.

0 is success. 2 is a mistake that the user can put right: a wrong value, a file that is missing or damaged. 1 is
everything else: a full disk, no memory, a fault of ours. 130 is Ctrl-C, 143 SIGTERM. A reader that closes the pipe
(``| head``) has seen enough, which is no failure. ``--debug`` shows the traceback as well.
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

# What the system says about names and permissions: the user's to mend. The rest (disk full, I/O error) is not.
MISTAKES = {
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "EEXIST", "ENAMETOOLONG", "EINVAL", "ELOOP")
}

LONGEST_LINE = 2000  # characters of one line


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line like all others, and that shows examples as they are written.

    ``late`` gives the end of its help: what is too expensive to know before someone asks. ``elsewhere``: options of
    other programs, and what is typed here instead.
    """

    late: Callable[[], str] | None = None
    elsewhere: Mapping[str, str] = {}

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        """The text of ``--help``."""
        return super().format_help() + (self.late() if self.late is not None else "")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an unknown option is named before a missing argument is."""
        for word in args or ():
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows is no option, or the command's own
            option = re.sub("^[–—]+", "--", word.partition("=")[0])  # as word processors write two hyphens
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
        """Raise :class:`ConfigError` with argparse's message and where to look further."""
        raise ConfigError(f"{message}{'' if message.endswith('?') else ';'} `{self.prog} --help` says what there is")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 26, **kwargs})


def open_standard_streams() -> None:
    """Lead those of the process's first three files that are closed nowhere: else the next file to be opened takes the
    place of stdout or stderr, and what libraries print goes into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def guard(work: Callable[[], object], *, debug: bool = False) -> int:
    """Run ``work`` and turn every way in which it can end into an exit status and, on failure, one line on stderr.

    A whole number that ``work`` gives back is the status of a success, like that of diff(1). Warnings raised meanwhile
    are one line each too. ``debug`` prints the traceback of a failure before its line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows its number instead
            with suppress(ValueError):  # closed
                stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
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
            except KeyboardInterrupt:  # once more, while the first one was being told
                return 130
    return status if isinstance(status, int) else 0


def say(message: object, kind: str = "") -> None:
    """Print one line on stderr, "minidiff: message"; ``kind`` may be "error" or "warning"."""
    if sys.stderr is None:  # print would take stdout instead
        return
    with suppress(OSError, ValueError):  # a closed stderr must not hide the exit status
        print(f"minidiff: {kind + ': ' if kind else ''}{one_line(message)}", file=sys.stderr, flush=True)


def warn(message: str, stacklevel: int = 1) -> None:
    """``warnings.warn``, which fails where stderr is closed: a warning that nobody can read ends no run."""
    with suppress(OSError, ValueError):
        warnings.warn(message, stacklevel=stacklevel + 1)


def show(result: object, end: str = "\n", longest: int | None = None) -> None:
    """Print a result on stdout, line by line as it is laid out; what steers a terminal is written out as escapes.

    ``longest``: characters of a line, the rest is left out. Without a stdout nobody wants it; OSError if it cannot be
    written to any longer.
    """
    if sys.stdout is None or getattr(sys.stdout, "closed", False):
        return
    lines = [
        line if longest is None or len(line) <= longest else f"{line[:longest]} ..." for line in str(result).split("\n")
    ]
    print("\n".join(map(escaped, lines)), end=end, flush=True)


def show_json(found: object) -> None:
    """Print a result on stdout as JSON; what steers a terminal is written in JSON's own escapes."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    show("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def escaped(text: str) -> str:
    """``text`` with all that is not printable written out: control characters, directions, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: object, longest: int = LONGEST_LINE) -> str:
    """``message`` on one line: everything that is printed and may quote a file that nobody has checked passes here.

    Characters that steer a terminal or turn the direction of writing are written out as escapes; beyond ``longest``
    characters the middle is left out.
    """
    text = " ".join(str(message)[: 8 * longest].split())
    if len(str(message)) > 8 * longest or len(text) > longest:
        text = f"{text[: longest * 3 // 4]} ... {' '.join(str(message)[-longest // 8 :].split())}"
    return escaped(text)


def _end(e: BaseException) -> int:
    """The exit status for what ended a run, after saying so."""
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
    """Torch's out-of-memory errors, told by name and words: on the CPU it is a bare RuntimeError."""
    said = str(e).lower()
    named = type(e).__name__ == "OutOfMemoryError"
    return isinstance(e, RuntimeError) and (
        named or "can't allocate memory" in said or "not enough memory" in said or "out of memory" in said
    )


def _flush() -> None:
    """Write out what stdout still holds. If that fails, the interpreter must not try again at its end."""
    if sys.stdout is None or getattr(sys.stdout, "closed", False):
        return
    try:
        sys.stdout.flush()
    except OSError as e:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if os.name == "nt" and e.errno == errno.EINVAL:  # what Windows says of a closed pipe
            raise BrokenPipeError from None
        raise


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(message, "warning")
