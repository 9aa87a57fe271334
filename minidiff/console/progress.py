"""Progress display: a bar where it can be redrawn, occasional lines where it cannot, or nothing.

A bar is for a terminal or a notebook. In a log each redraw would be a separate line, and a program without a console
has no stderr at all. Everything goes to stderr, and nothing here fails if that cannot be written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from minidiff.config import check
from minidiff.console import say

T = TypeVar("T")

BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
SOONEST, LATEST = 5.0, 60.0  # limits of the seconds between lines, a quarter of the elapsed time


def redraws() -> bool:
    """Return True if stderr is a terminal or the output of a notebook cell."""
    stream = sys.stderr
    try:
        return stream is not None and (stream.isatty() or type(stream).__module__.startswith("ipykernel"))
    except ValueError:  # closed
        return False


def check_progress(progress: Any) -> None:
    """Raise :class:`ConfigError` unless ``progress`` is True, False, None or callable."""
    fits = progress is None or isinstance(progress, bool) or callable(progress)
    check(fits, f"progress={progress!r} must be True, False, None (a bar on a terminal only) or a function")


class Counter:
    """Context that counts up to ``total`` ``unit``s.

    ``show``: None for a bar where it can be redrawn and nothing elsewhere, True for lines there.
    """

    def __init__(self, total: int, unit: str, *, show: bool | None, done: int = 0, what: str = "") -> None:
        self.total, self.unit, self.done, self.what = total, unit, done, what
        self.first, self.began = done, time.monotonic()
        self.next = self.began
        self.bar: Any = None
        self.lines = bool(show) and not redraws()
        if show is not False and redraws():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=what or None, unit=unit, bar_format=BAR, leave=not what)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def count(self, note: str = "", items: int = 1) -> None:
        """Count more ``items``; ``note``: text that is shown beside the count."""
        self.done += items
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(items)
        if not self.lines:
            return
        now = time.monotonic()
        if now >= self.next or self.done == self.total:
            say(self.line(now - self.began, note))
            self.next = now + min(LATEST, max(SOONEST, (now - self.began) / 4))

    def line(self, seconds: float, note: str) -> str:
        """Return the current count, the time per item, and the time left."""
        each = seconds / max(1, self.done - self.first)
        left = each * (self.total - self.done)
        shown = f"{self.unit} {self.done:,} of {self.total:,}, {each:.3g} s each, {left:.0f} s left"
        return ", ".join(filter(None, [self.what, shown, note]))


def counted(items: Sequence[T], unit: str, *, show: bool | None, what: str = "") -> Iterator[T]:
    """Yield ``items``, counting each when the next one is requested."""
    with Counter(len(items), unit, show=show, what=what) as counter:
        for item in items:
            yield item
            counter.count()
