"""The ``minidiff`` command, also as ``python -m minidiff``: Ctrl-C while the command line is still being imported, too,
ends it with one line and status 130."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def command() -> NoReturn:
    """Run the command line, and end the process. Before it is imported nothing has begun: a signal may end at once."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as behind nohup
    if ours:
        signal.signal(signal.SIGINT, _interrupted)
    from minidiff import cli

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.command()


def _interrupted(*of: object) -> NoReturn:
    """End the process. An exception instead would pass through imports, some of which turn it into another one."""
    try:
        os.write(2, b"minidiff: interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    command()
