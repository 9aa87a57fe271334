"""Ctrl-C and SIGTERM: raised or kept by the command line alone, in the main thread alone, and given back."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from minidiff import console
from minidiff.console.signals import Stop, Terminated, terminable
from minidiff.storage.writing import atomic

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals to itself")


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_command_that_is_terminated_cleans_up(tmp_path: Path, capsys: Any) -> None:
    def work() -> None:
        with atomic(tmp_path / "a") as file:
            file.write(b"half")
            send(signal.SIGTERM)
            pytest.fail("it went on")

    assert console.guard(work) == 143
    assert capsys.readouterr().err == "minidiff: terminated\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_one_does_not_disturb_the_cleaning_up(capsys: Any) -> None:
    cleaned: list[str] = []

    def work() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            cleaned.append("all")

    assert console.guard(work) == 143
    assert cleaned == ["all"]


@pytest.mark.parametrize("error", [ImportError("numpy failed to import"), KeyboardInterrupt(), ValueError("odd")])
def test_one_that_comes_out_as_another_error(error: BaseException, capsys: Any) -> None:
    """As libraries in C do in the middle of an import, and torch in the middle of a read."""

    def work() -> None:
        try:
            send(signal.SIGTERM)
        except Terminated:
            raise error from None

    assert console.guard(work) == 143
    assert capsys.readouterr().err == "minidiff: terminated\n"


def test_work_that_ends_well_ends_well() -> None:
    def work() -> int:
        try:
            send(signal.SIGTERM)
        except Terminated:
            return 7
        return 8

    assert console.guard(work) == 7


def test_what_is_ignored_stays_so(capsys: Any) -> None:
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert console.guard(lambda: send(signal.SIGTERM)) == 0
        with Stop() as stop:
            send(signal.SIGTERM)
            assert not stop()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)


def test_in_another_thread_nothing_is_touched() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with terminable([]), Stop():
            seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=lambda: seen.append(console.guard(work)))
    thread.start()
    thread.join()
    assert seen == [before, 0]


@pytest.mark.parametrize(
    ("numbers", "asked"),
    [
        ([signal.SIGTERM], Terminated),
        ([signal.SIGINT], KeyboardInterrupt),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGTERM], Terminated),
        ([signal.SIGINT, signal.SIGTERM], KeyboardInterrupt),
    ],
)
def test_they_are_kept_until_asked_for(numbers: list[int], asked: type[BaseException]) -> None:
    told: list[int] = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop(lambda: told.append(1)) as stop:
        assert not stop()
        for number in numbers:
            send(number)
        assert stop()
    assert stop.asked is asked
    assert told == [1]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_once_more_does_not_wait(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stop():
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    monkeypatch.setenv("RANK", "0")  # torchrun passes on what the terminal has sent already
    with Stop() as stop:
        send(first)
        send(signal.SIGINT)
    assert stop()
