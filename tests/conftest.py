"""Set-up for all tests."""

from __future__ import annotations

import gc
import itertools
import signal
from pathlib import Path

import pytest

NUMBERS = itertools.count()

# A shell script that starts the suite in the background has it ignore Ctrl-C, and so would every process that a test
# starts. Some tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what was measured on this machine and its load out of the tests, and what one measures out of the others."""
    folder = Path(tmp_path_factory.getbasetemp()) / f"cache-{next(NUMBERS)}"
    monkeypatch.setattr("minidiff.fast.machine.cache_folder", lambda: folder / "minidiff")
    monkeypatch.setattr("minidiff.fast.machine.LOAD", folder / "no load")


def pytest_collection_finish() -> None:
    """Keep what the imports and the collection left out of garbage collection: a million objects or so, which stay.

    Going through them again and again would take a tenth of the time of the tests.
    """
    gc.collect()
    gc.freeze()
