"""Trial of what depends on the processor: what is chosen, when it is tried, and how long the choice holds."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minidiff import cli, fast
from minidiff.cli import opening
from minidiff.fast import machine, onednn, probe, trial
from minidiff.fast.switch import OFF, ON
from tests.support.tiny import tiny_sd

DTYPE = torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the results, in a folder that does not exist yet."""
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path / "cache" / "minidiff")
    return tmp_path / "cache" / "minidiff" / "kernels.json"


class Clock:
    """Time that passes only where work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.done: list[str] = []
        monkeypatch.setattr(trial.time, "perf_counter", lambda: self.now)

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Work that takes ``seconds``, one after another, the last again and again."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.done.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def plant(monkeypatch: pytest.MonkeyPatch, clock: Clock, **ways: dict[str, tuple[float, ...]]) -> None:
    """Let the trials of ``ways`` take the seconds given for each, and let there be no others."""
    made = {
        name: lambda _, name=name, ways=ways: {way: clock.work(f"{name} {way}", *took) for way, took in ways.items()}
        for name, ways in ways.items()
    }
    monkeypatch.setattr(trial, "TRIALS", made)


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "way"),
    [(0.5, ON), (1 / 1.06, ON), (1 / 1.04, OFF), (1.0, OFF), (1.5, OFF), (100.0, OFF)],
    ids=["twice as fast", "6 % faster", "4 % faster", "a tie", "slower", "hopeless"],
)
@pytest.mark.parametrize("pays", [True, False])
def test_planted_times(other: float, way: str, pays: bool, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A clearly faster way is taken, a tie keeps the plain way; whatever the rule says."""
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: (0.01 * other,)})
    assert trial.choices(DTYPE, measure=True)["linear"] == way


def test_the_fastest_of_several(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    name = "attention to 4096 keys"
    plant(monkeypatch, clock, **{name: {"torch": (0.04,), "float32": (0.03,), "blocks of 64": (0.02,)}})
    assert trial.choices(DTYPE, measure=True)[name] == "blocks of 64"


@pytest.mark.parametrize("pays", [True, False])
def test_where_two_trials_disagree_the_rule_holds(pays: bool, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    slow_then_fast = (*[0.015] * trial.ROUNDS, 0.001)
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: slow_then_fast})
    assert trial.choices(DTYPE, measure=True)["linear"] == (ON if pays else OFF)


def test_two_ways_that_lead_in_turn_do_not_make_the_plain_one_win(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """One that gains in both trials is taken, and not the one that leads in a single trial but loses in the other. Of
    two that gain alike it is the one that stands first, being nearer to the plain one."""

    def twice(first: float, second: float) -> tuple[float, ...]:
        return (*[first] * trial.ROUNDS, second)

    ways = {"torch": twice(0.04, 0.04), "a": twice(0.030, 0.028), "b": twice(0.029, 0.031), "c": twice(0.01, 0.05)}
    plant(monkeypatch, clock, linear=ways)
    found = trial.tried(DTYPE)["linear"]
    assert found.chosen == "a"
    assert found.seconds["c"] == pytest.approx(0.01), "the fastest in one of them"


def test_the_shortest_time_counts(clock: Clock) -> None:
    ways = {OFF: clock.work(OFF, 9, 2, 7), ON: clock.work(ON, 40, 5, 1)}
    assert trial.seconds(ways) == {OFF: 2, ON: 40}, "hopeless at first: not tried again"
    assert clock.done == [OFF, ON, OFF, OFF]
    assert trial.seconds({OFF: clock.work(OFF, 9, 2, 7), ON: clock.work(ON, 12, 3, 1)}) == {OFF: 2, ON: 1}


def test_trials_end_in_time(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """On a slow machine the rest follows the rule."""
    monkeypatch.setattr(onednn, "pays", lambda *_: True)
    plant(monkeypatch, clock, linear={OFF: (1.0,), ON: (0.9,)}, winograd={OFF: (1.0,), ON: (5.0,)})
    assert trial.choices(DTYPE, measure=True) == {**trial.rule(DTYPE), "linear": ON}
    assert {name.split()[0] for name in clock.done} == {"linear"}


@pytest.mark.parametrize("pays", [True, False])
def test_the_rule(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    for dtype in trial.DTYPES:
        found = trial.rule(dtype)
        assert found["tokens"] == (ON if pays else OFF)
        assert found["linear"] == (ON if pays else OFF)
        assert found["winograd"] == (ON if not pays and dtype == torch.float32 else OFF)
        assert {found[name] for name in found if "attention" in name} == {"torch"}
        assert found.keys() == {*trial.TRIALS, "tokens"}
    assert trial.choices(torch.float16, measure=True) == {}


@pytest.mark.parametrize("pays", [True, False])
def test_a_real_trial(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of every trial runs, and one of them is chosen."""
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(trial, "LONGEST", float("inf"))
    found = trial.tried(torch.float32)
    assert found.keys() == ({*trial.TRIALS} if pays else {"winograd"})
    for result in found.values():
        assert result.chosen in result.seconds
        assert all(0 < seconds < float("inf") for seconds in result.seconds.values())


@pytest.mark.parametrize("pays", [True, False])
@torch.no_grad()
def test_a_trial_draws_no_random_numbers_and_needs_no_default(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both belong to the whole process."""
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        for set_up in trial.TRIALS.values():
            for way in set_up(torch.float32).values():
                assert way() is None or way().dtype == torch.float32  # type: ignore[attr-defined]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# --- how long it holds -----------------------------------------------------------------------------------------------


def test_the_first_result_stands(monkeypatch: pytest.MonkeyPatch, clock: Clock, cache: Path) -> None:
    assert trial.choices(DTYPE) == trial.rule(DTYPE), "nothing is tried unless that is asked for"
    assert not cache.exists()
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: (0.001,)})
    assert trial.choices(DTYPE, measure=True)["linear"] == ON
    before = cache.read_bytes()
    plant(monkeypatch, clock, linear={OFF: (0.001,), ON: (0.01,)})
    assert trial.choices(DTYPE, measure=True)["linear"] == trial.choices(DTYPE)["linear"] == ON
    assert cache.read_bytes() == before
    other = trial.NOTES.keep(trial.key(DTYPE), {"linear": trial.Result(OFF, {OFF: 1.0})})
    assert other is not None
    assert other["linear"].chosen == ON, "who comes second takes what is there"
    assert trial.choices(torch.bfloat16) == trial.rule(torch.bfloat16), "another dtype is another entry"
    renewed = trial.results(DTYPE, measure=True, anew=True)
    assert renewed is not None
    assert renewed["linear"].chosen == trial.choices(DTYPE)["linear"] == OFF


def test_another_process_reads_it(monkeypatch: pytest.MonkeyPatch, clock: Clock, cache: Path) -> None:
    wanted = OFF if onednn.pays() else ON  # not what the rule says
    other = ON if wanted == OFF else OFF
    plant(monkeypatch, clock, linear={other: (0.1,), wanted: (0.001,)})
    trial.choices(DTYPE, measure=True)
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from minidiff.fast import trial; print(trial.choices(torch.float32)['linear'])"
    )
    environment = {"XDG_CACHE_HOME": str(cache.parent.parent), "LOCALAPPDATA": str(cache.parent.parent)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


BROKEN = [
    b"",
    b"{",
    b"[1]",
    b"\xff\xfe",
    b"[" * 100_000,
    *(
        b'{"KEY": %s}' % entry
        for entry in (
            b"3",
            b'"on"',
            b'{"linear": "on"}',
            b'{"linear": ["on", {"off": 1}]}',
            b'{"linear": ["on", {"on": "fast"}]}',
            b'{"linear": ["on", {"on": -1}]}',
            b'{"linear": ["on", 3]}',
            b'{"linear": ["on", {"on": 1%s}]}' % (b"0" * 400),
        )
    ),
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[-24:].decode("latin1"))
def test_a_broken_cache(content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """It counts as none: the rule holds until a trial writes it anew."""
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.replace(b"KEY", trial.key(DTYPE).encode()))
    assert trial.choices(DTYPE) == trial.rule(DTYPE)
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: (0.001,)})
    assert trial.choices(DTYPE, measure=True)["linear"] == ON
    assert json.loads(cache.read_text())[trial.key(DTYPE)]["linear"][0] == ON


def test_what_cannot_be_kept_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Another process might choose otherwise."""
    cache.parent.parent.touch()  # a file in the place of the folder
    monkeypatch.setattr(onednn, "pays", lambda *_: False)
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: (0.001,)})
    assert trial.choices(DTYPE, measure=True)["linear"] == OFF


# --- where it counts -------------------------------------------------------------------------------------------------


def test_optimize_takes_it(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr("minidiff.fast.linear.SMALLEST", 1)
    wanted = not onednn.pays()
    took = {OFF: (0.01,), ON: (0.001 if wanted else 0.1,)}
    plant(monkeypatch, clock, linear=took)
    sd = tiny_sd()
    assert (fast.optimize(sd)["linear"] > 0) == (not wanted), "by rule"
    assert clock.done == []
    assert (fast.optimize(sd, trial=True)["linear"] > 0) == wanted, "tried now, although the switches were on"
    fast.restore(sd)
    assert (fast.optimize(sd)["linear"] > 0) == wanted, "from the cache"


def test_the_command_line_tries_for_large_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sd().save("m.safetensors")
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: (0.001,)})
    argv = ["generate", "a fox", "--model", "m.safetensors", "--steps", "1", "--seed", "3", "--dtype", "float32"]
    assert cli.main(argv) == 0
    assert not cache.exists()
    monkeypatch.setattr(probe, "LARGE", 1)
    assert opening.large("m.safetensors")
    assert cli.main([*argv, "--plain"]) == 0
    assert not cache.exists(), "the plain model has no use for it"
    assert cli.main(argv) == 0
    assert cache.exists()


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gains = iter([2.0, 0.5])
    monkeypatch.setattr(probe, "measured", lambda: next(gains))
    plant(monkeypatch, clock, linear={OFF: (0.01,), ON: (0.004,)})
    assert cli.main(["probe"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "bfloat16: 2.00 times the speed of float32; large models are computed in bfloat16\n" in said.out
    assert said.out.count("linear: on (on 4 ms, off 10 ms)") == 2, "of both dtypes"
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr().out == said.out, "from the cache"

    plant(monkeypatch, clock, linear={OFF: (0.004,), ON: (0.01,)})
    assert cli.main(["probe", "--renew"]) == 0
    said = capsys.readouterr()
    assert "bfloat16: 0.50 times the speed of float32; large models are computed in float32\n" in said.out
    assert said.out.count("linear: off (off 4 ms, on 10 ms)") == 1, "bfloat16 is not computed in at all"

    cache.write_text("{")
    assert cli.main(["probe"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"minidiff: warning: {cache}: not valid JSON")
    assert said.err.count("\n") == 1
    cache.unlink()
    cache.mkdir()
    assert cli.main(["probe"]) == 0
    assert "float32, by rule: the cache folder cannot be written" in capsys.readouterr().out


def test_telling_which_machine_this_is_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args))
    monkeypatch.setattr(platform, "_uname_cache", None, raising=False)  # what platform has asked for before
    assert machine.description()
    assert started == []


# --- other work on the machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "average", "cores", "advice"),
    [
        (3, 2.4, 4, "2 other threads are running on 4 cores, and the 4 of this run"),
        (3, 9.0, 4, "OMP_NUM_THREADS=2,"),
        (30, 29.0, 4, "OMP_NUM_THREADS=1,"),
        (1, 9.0, 4, None),  # it has ended
        (9, 0.2, 4, None),  # it has only begun
        (3, 2.4, 6, None),  # there is room
    ],
)
def test_more_threads_than_cores(
    running: int, average: float, cores: int, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tmp_path / "loadavg"
    load.write_text(f"{average} 1.0 1.0 {running}/700 12345\n")
    monkeypatch.setattr(machine, "LOAD", load)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (average, 1.0, 1.0), raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = machine.crowded()
    assert (found is None) == (advice is None)
    assert advice is None or advice in (found or "")
    load.unlink()
    assert machine.crowded() is None, "not every system tells"


def test_a_crowded_machine_is_mentioned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_sd().save("m.safetensors")
    monkeypatch.setattr(machine, "crowded", lambda: "it is crowded")
    argv = ["generate", "a fox", "--model", "m.safetensors", "--steps", "1"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().err.count("it is crowded\n") == 1
    assert cli.main([*argv, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
