"""Being asked to end: Ctrl-C (SIGINT), and SIGTERM, which clusters and containers send some seconds before they kill.

Only the command line takes signals over, in the main thread, and gives them back. Elsewhere in the package they are
what Python makes of them.
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
    """SIGTERM, raised as Ctrl-C is: whatever cleans up after one does so after the other."""


@contextmanager
def terminable(seen: list[int]) -> Iterator[None]:
    """Raise :class:`Terminated` at the first SIGTERM; a later one changes nothing, as the cleaning up is under way.

    The signal is put into ``seen`` as well: what is raised in the middle of an import may come out as another error.
    """

    def end(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1:
            raise Terminated

    with _handled({signal.SIGTERM: end}):
        yield


class Stop:
    """Signals kept until a good moment: inside ``with``, calling this says whether the program has been asked to end.

    A second Ctrl-C does not wait, and is raised at once; a second SIGTERM does, since who sends it kills when it is
    time. Started by torchrun, a process gets one signal from the terminal and one from torchrun, and waits.
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
    """These handlers instead of Python's, where signals reach Python at all; one that is ignored stays so."""
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
