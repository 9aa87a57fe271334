"""Signals that ask a program to end: Ctrl-C (SIGINT), and SIGTERM, which clusters and containers send before they kill.

Only the command line handles signals itself, in the main thread, and restores Python's handlers afterwards. Elsewhere
in the package they have Python's meaning.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, like KeyboardInterrupt, so that the same clean-up applies to both."""


@contextmanager
def terminable(seen: list[int]) -> Iterator[None]:
    """Raise :class:`Terminated` at the first SIGTERM; later ones are ignored, since the clean-up is under way.

    The signal is also added to ``seen``: an exception during an import may turn into another one.
    """

    def end(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1:
            raise Terminated

    with _handled({signal.SIGTERM: end}):
        yield


class Stop:
    """Context that defers signals: inside ``with``, calling it returns True if the program has been asked to end.

    A second Ctrl-C is raised at once; a second SIGTERM is deferred as well, since its sender kills when time is up.
    Under torchrun a process gets one signal from the terminal and one from torchrun, so it defers both.
    """

    def __init__(self, tell: Callable[[], object] = lambda: None) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self.tell = tell
        self._handled = _handled({signal.SIGINT: self._interrupt, signal.SIGTERM: self._terminate})

    def __call__(self) -> bool:
        return self.asked is not None

    def __enter__(self) -> Stop:
        self._handled.__enter__()
        return self

    def __exit__(self, *of: Any) -> None:
        self._handled.__exit__(*of)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self._ask(KeyboardInterrupt)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._ask(Terminated)

    def _ask(self, how: type[KeyboardInterrupt]) -> None:
        if self.asked is None:
            self.asked = how
            with suppress(RuntimeError):  # the stream was just being written to
                self.tell()


@contextmanager
def _handled(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Install these handlers instead of Python's, if possible; ignored signals stay ignored."""
    before: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
