"""The measuring scripts: their arithmetic on made times, their tables and JSON, and each of them once in small.

No time is held against a bound here. What needs diffusers stands in tests/parity/test_bench.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import minidiff
from minidiff.config import SD15
from minidiff.errors import ConfigError
from minidiff.models.attention import Attention
from tests.support.tiny import tiny_sd

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # at the end: test.py there shares its name with a package of Python's own

import _bench  # noqa: E402
import _children  # noqa: E402
import _processes  # noqa: E402
import _ways  # noqa: E402
import _works  # noqa: E402
import bench  # noqa: E402
import bench_batch  # noqa: E402
import bench_dtype  # noqa: E402
import bench_generate  # noqa: E402
import bench_overhead  # noqa: E402
import bench_prompts  # noqa: E402
import bench_scaling  # noqa: E402
import bench_start  # noqa: E402

from minidiff import fast  # noqa: E402


@pytest.fixture(autouse=True)
def _gradients_stay_as_they_are() -> Any:
    on = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(on)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if ``package`` were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(_bench.importlib.util, "find_spec", lambda name: None if name == package else found(name))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_medians_spreads_and_speeds() -> None:
    # The third round was slow for both: the median of the quotients knows, a quotient of medians would not.
    times = {"a": [1.0, 2.0, 30.0, 4.0, 5.0], "b": [2.0, 2.0, 10.0, 3.0, 10.0]}
    a, b = _bench.summarise(times)
    assert (a.name, a.seconds, a.spread, a.speed) == ("a", 4.0, 3.0, 1.0)
    assert (b.seconds, b.spread) == (3.0, 8.0)
    assert b.speed == 1.0  # of 0.5, 1, 3, 4/3, 0.5; the medians' quotient is 4/3
    assert b.runs == (2.0, 2.0, 10.0, 3.0, 10.0)
    a, b = _bench.summarise(times, "b")
    assert (a.speed, b.speed) == (1.0, 1.0)
    assert [row.speed for row in _bench.summarise({"fast": [1.0], "slow": [4.0]}, "slow")] == [4.0, 1.0]


def test_spread_of_few_runs_is_all_of_it() -> None:
    assert _bench.spread([3.0]) == 0.0
    assert _bench.spread([3.0, 5.0]) == 2.0
    assert _bench.spread([1.0, 2.0, 3.0]) == 1.0


def test_every_candidate_runs_once_a_round_and_none_always_behind_the_same() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    assert _bench.in_turn(["a", "b", "c"], 3, run) == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert "".join(order) == "abcbcacab"


def test_growth_is_an_exponent() -> None:
    assert _bench.grows([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert _bench.grows([1, 4, 16], [5, 10, 20]) == pytest.approx(0.5)


def test_table_is_markdown() -> None:
    lines = _bench.table(("", "seconds", "speed"), [("a long name", "1.0", "2x"), ("b", "3.0", "1x")]).splitlines()
    assert lines[0] == "|             | seconds | speed |"
    assert lines[1] == "|-------------|---:|---:|"
    assert lines[2:] == ["| a long name | 1.0 | 2x |", "| b           | 3.0 | 1x |"]


def test_json_holds_arguments_machine_and_rows(tmp_path: Path) -> None:
    args = bench.arguments(["--json", str(tmp_path / "a.json")])
    _bench.write_json(args.json, args, {"cores": 2}, rows=_bench.summarise({"a": [1.0, 3.0]}))
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["arguments"]["part"] == "unet"
    assert found["machine"] == {"cores": 2}
    assert found["rows"] == [{"name": "a", "seconds": 2.0, "spread": 2.0, "speed": 1.0, "runs": [1.0, 3.0]}]


# --- the machine -----------------------------------------------------------------------------------------------------


def test_processor_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: A Processor 9000: fast\nflags: x\n")
    assert _bench.processor(file) == "A Processor 9000: fast"
    assert _bench.processor(tmp_path / "none") != ""
    assert {"processor", "cores", "torch"} <= _bench.machine().keys()
    assert _bench.version("no-such-package") is None


def test_hints_name_what_could_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setattr(_bench.os, "cpu_count", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads, allocator, huge = _bench.hints(pages)
    assert "OMP_NUM_THREADS=4" in threads
    assert "LD_PRELOAD" in allocator
    assert "THP_MEM_ALLOC_ENABLE" in huge
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4")
    pages.write_text("[always] madvise never\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert _bench.threads() == 4
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _bench.threads() == 4
    assert _bench.hints(pages) == []


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(_processes.os, "wait4"), reason="measures with wait4")
def test_processes_are_measured() -> None:
    code = "print('a word'); x = bytearray(90_000_000); print('{\"a\": 1}')"
    done = _processes.run([sys.executable, "-c", code])
    assert done.seconds > 0
    assert done.peak > 90_000_000
    assert done.facts == {"a": 1}
    assert _processes.run([sys.executable, "-c", "print('no JSON')"]).facts == {}
    with pytest.raises(SystemExit, match=r"ended with status 3: the last word$"):
        _processes.run([sys.executable, "-c", "import sys; print('a\\nthe last word', file=sys.stderr); sys.exit(3)"])


class EndedError(Exception):
    """A child has come as far as it was to go."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The facts that a child leaves behind, which does not take this process with it."""
    left: dict[str, Any] = {}

    def end(**facts: Any) -> NoReturn:
        left.update(facts)
        raise EndedError

    monkeypatch.setattr(_children, "end", end)
    return left


def test_children_go_as_far_as_they_should(
    tmp_path: Path, ended: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.safetensors"
    sd = tiny_sd()
    sd.save(file)
    with pytest.raises(EndedError):
        _children.ours(str(file), "loaded")
    assert ended == {"weights": sum(p.numel() * 4 for part in sd.parts.values() for p in part.parameters())}
    calls: list[bool] = []
    plain = type(sd.unet).forward
    monkeypatch.setattr(type(sd.unet), "forward", lambda *a, **k: (calls.append(True), plain(*a, **k))[1])
    for when, made in (("begun", 0), ("stepped", 1)):
        calls.clear()
        with pytest.raises(EndedError):
            _children.ours(str(file), when)
        assert len(calls) == made
    with pytest.raises(EndedError):
        _children.pictures(str(file), "2", "1")
    assert ended["seconds"] > 0
    assert ended["dtype"] == "torch.float32"


# --- one call --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_is_counted() -> None:
    batch, length, dim = 2, 64, 32
    work = _works.Work(Attention(dim, 4), (torch.randn(batch, length, dim),), torch.nn.Identity, torch.nn.Identity)
    _, flops = _works.counted(work)
    linear, products = 4 * 2 * batch * length * dim * dim, 2 * 2 * batch * length * length * dim
    assert flops == linear + products


def test_one_call_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert bench.main(["--family", "tiny", "--switches", "all", "--rounds", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    plain, all_on = (row["name"] for row in found["rows"])
    assert (plain, all_on) == ("minidiff, plain", f"minidiff, {'+'.join(fast.SWITCHES)}")
    assert [len(row["runs"]) for row in found["rows"]] == [2, 2]
    assert found["against"] == plain
    assert found["first"].keys() == {plain, all_on}
    assert found["first"][plain]["difference"] == 0
    assert found["flops"] > 0
    assert found["machine"]["threads"] == torch.get_num_threads()
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {len(bench.HEADER) + 1}
    assert table[2].endswith("| 1.00x | 0 |")
    assert "tiny, unet, 64 x 64, batch 2, float32, 2 rounds" in printed


def test_what_is_tried() -> None:
    device = torch.device("cpu")
    work = _works.decoding(_works.FAMILIES["tiny"], 64, 1)
    each = [way.name for way in bench.chosen(bench.arguments([]), work, torch.float32, 64)]
    assert each[0] == "minidiff, plain"
    assert each[1:-1] == [f"minidiff, {name}" for name in fast.SWITCHES]
    twin = work.twin()
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in work.ours.parameters()}
    assert not {id(m) for m in twin.modules()} & {id(m) for m in work.ours.modules()}
    none = bench.chosen(bench.arguments(["--switches", "none"]), work, torch.float32, 64)
    assert [way.name for way in none] == ["minidiff, plain"]
    with torch.no_grad():
        found = _ways.tried(
            [*none, _ways.Way("twice", lambda: 2 * work.ours(*work.inputs))], work.ours(*work.inputs), device
        )
    assert found["minidiff, plain"].difference == 0
    assert found["twice"].difference == pytest.approx(1)


def test_compiled_with_freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen: list[bool] = []
    work = _works.Work(torch.nn.Identity(), (torch.ones(1),), torch.nn.Identity, torch.nn.Identity)
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda x: (seen.append(config.freezing), module(x))[1])
    before = config.freezing
    way = _ways.frozen("minidiff", work.ours, work)
    assert way.name == "minidiff, compiled with freezing"
    assert torch.equal(way.run(), torch.ones(1))
    assert seen == [True]
    assert config.freezing is before


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "diffusers")
    with pytest.raises(SystemExit, match=r"^diffusers is not installed; pip install .* or leave out --against$"):
        bench.main(["--family", "tiny", "--against", "diffusers"])
    with pytest.raises(SystemExit, match=r"^diffusers is not installed; .* or take --tables bundled alone$"):
        bench_generate.main(["--work", str(tmp_path / "new"), "--tables", "load"])
    assert not (tmp_path / "new").exists()
    without(monkeypatch, "openvino")
    tiny = ["--family", "tiny", "--switches", "none"]
    with pytest.raises(SystemExit, match=r"^openvino is not installed; pip install openvino, or leave out --openvino$"):
        bench.main([*tiny, "--openvino"])
    monkeypatch.undo()
    monkeypatch.setattr(bench, "need", lambda *_: None)
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"^torch.compile needs a C\+\+ compiler, .*; install g\+\+, or leave out"):
        bench.main([*tiny, "--compiled"])
    with pytest.raises(SystemExit, match=r"^--openvino runs on the CPU, and --device is cuda; leave one of them out$"):
        bench.main([*tiny, "--openvino", "--device", "cuda"])


# --- whole commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Processes that are not started: diffusers' takes 3 s and 4 GB, ours 2 s and 3 GB. Gives what was asked for."""
    asked: list[list[str]] = []

    def run(command: list[Any]) -> _processes.Done:
        words = [str(word) for word in command]
        asked.append(words)
        facts = {"recipe": {"dtype": "bfloat16", "steps": 20, "width": 512, "height": 512}}.get(words[2], {})
        if words[2] == "pictures":
            facts = {"seconds": 4.0, "dtype": "torch.float32", "device": "cpu"}
        if words[-1] == "loaded":
            facts = {"weights": 2 * 10**9}
        if words[2] == "imports":
            return _processes.Done(1.0, 10**9, {})
        slow = "picture" in words or "theirs" in words
        return _processes.Done(3.0 if slow else 2.0, (4 if slow else 3) * 10**9, facts)

    monkeypatch.setattr(bench_generate, "run", run)
    monkeypatch.setattr(bench_generate, "need", lambda *_: None)
    return asked


def test_whole_commands(made: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all.json"
    work = tmp_path / "work"
    assert bench_generate.main(["--work", str(work), "--tiny", "--rounds", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    tables = json.loads(out.read_text())["tables"]
    assert list(tables) == list(bench_generate.TABLES)
    for name in ("defaults", "float32", "bfloat16"):
        assert list(tables[name]) == ["minidiff generate", "diffusers"]
        assert [run["seconds"] for run in tables[name]["diffusers"]] == [3.0, 3.0]
    assert printed.count("| minidiff generate | 2.00 | 0.00 | 1.50x | 3.00 | 0.75 |") == 3
    assert printed.count("| diffusers         | 3.00 | 0.00 | 1.00x | 4.00 | 1.00 |") == 3
    assert "minidiff computed in bfloat16, 20 steps, 512 x 512" in printed
    assert "| minidiff, float16 file    | 2.00 | 0.00 | 1.50x | 3.00 | 0.75 |" in printed  # the first step
    assert "| minidiff, float16 file    | 2.00 | 0.00 | 1.50x | 3.00 | 2.00 | 1.00 |" in printed  # (3 - 1) / 2
    assert "| diffusers, float32 folder | 3.00 | 0.00 | 1.00x | 4.00 | 2.00 | 1.50 |" in printed
    assert "| 16 pictures in one batch, model loaded  | 4.00 | 0.00 | 4.00 | 3.00 |" in printed
    ours = [words for words in made if "generate" in words]
    dtypes = [words[words.index("--dtype") + 1] for words in ours if "--dtype" in words]
    assert dtypes == ["float32"] * 3 + ["bfloat16"] * 3
    assert [words[words.index("--steps") + 1] for words in ours[:3]] == ["1", "20", "20"]  # short, to warm up
    assert [words[4] for words in made if "picture" in words[2:3]][::3] == ["default", "float32", "bfloat16"]
    assert made[0][2:] == ["prepare", str(work), "tiny"]


def test_a_model_is_made_once_and_not_taken_for_another(made: list[list[str]], tmp_path: Path) -> None:
    bench_generate.prepare(tmp_path, "tiny")
    bench_generate.prepare(tmp_path, "tiny")
    assert len(made) == 1
    with pytest.raises(SystemExit, match="holds a model of tiny, full size is asked for; name another folder"):
        bench_generate.prepare(tmp_path, "full size")


def test_further_options_and_another_model(made: list[list[str]], tmp_path: Path) -> None:
    options = ["--options=--sampler 'euler' --quiet", "--model", "shapes.safetensors", "--work", str(tmp_path)]
    bench_generate.main([*options, "--tables", "bundled", "--rounds", "1"])
    generate = next(words for words in made if "generate" in words)
    assert generate[-3:] == ["--sampler", "euler", "--quiet"]
    assert generate[generate.index("--model") + 1] == "shapes.safetensors"
    assert next(words for words in made if "pictures" in words)[3:] == ["shapes.safetensors", "16", "1"]


# --- growth and overhead ---------------------------------------------------------------------------------------------


def test_growth_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str]) -> _processes.Done:
        place = command.index("--point")
        size, batch = map(int, command[place + 1 : place + 3])
        work = batch * size**2
        return _processes.Done(0.0, 0, {"flops": work * 10**6, "seconds": work / 1e6, "memory": 1000 * work})

    monkeypatch.setattr(bench_scaling, "run", run)
    out = tmp_path / "scaling.json"
    assert bench_scaling.main(["--batches", "1", "2", "--sizes", "512", "1024", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| 512 x 512, 2 | 0.524 | 0.52 | 1000 | 0.52 | 2.00x | 2.00x | 2.00x |" in printed
    assert "| 1024 x 1024, 1 | 1.049 | 1.05 | 1000 | 1.05 | 4.00x | 4.00x | 4.00x |" in printed
    assert printed.count("time ~ FLOPs ** 1.00, memory ~ FLOPs ** 1.00") == 2
    points = json.loads(out.read_text())["points"]
    assert [(p["size"], p["batch"]) for p in points] == [(512, 1), (512, 2), (1024, 1)]


def test_one_point_of_growth(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_scaling.main(["--point", "64", "2", "--family", "tiny", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"flops", "seconds", "memory"}
    assert found["flops"] > 10**8
    assert found["seconds"] > 0


def test_overhead_of_every_sampler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_overhead, "BOUND", 1e9)
    out = tmp_path / "overhead.json"
    assert bench_overhead.main(["--steps", "5", "--rounds", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    measured = [row["name"] for row in found["rows"]]
    assert sorted([*measured, *found["refused"]]) == sorted(bench_overhead.SAMPLERS)
    assert {"pndm", "euler", "dpmpp_2m", "unipc"} <= set(measured)
    assert all(row["seconds"] > 0 for row in found["rows"])
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == 2 + len(measured)
    assert "slowest: " in printed


def test_overhead_beyond_the_bound_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(pipe: Any, sampler: str, steps: int) -> float:
        if sampler == "ddim":
            raise ConfigError("not with this one")
        return {"euler": 0.0005, "pndm": 0.002}[sampler]

    monkeypatch.setattr(bench_overhead, "seconds_a_call", seconds)
    assert bench_overhead.main(["--samplers", "euler", "pndm", "ddim"]) == 1
    printed = capsys.readouterr().out
    assert "| euler   | 0.500 | 0.000 |" in printed
    assert "ddim: left out: not with this one" in printed
    assert "slowest: pndm, 2.000 ms (ABOVE 1.000 ms)" in printed
    assert bench_overhead.main(["--samplers", "euler"]) == 0


@torch.no_grad()
def test_the_unet_of_the_overhead_answers_at_once() -> None:
    pipe = bench_overhead.without_unet(torch.device("cpu"))
    steps = list(pipe.steps("a horse", steps=2, sampler="euler", seed=0))
    assert steps[0].x.shape == (1, SD15.in_channels, SD15.sample_size, SD15.sample_size)
    assert steps[0].conditional is not None
    assert torch.equal(steps[0].conditional, steps[1].conditional)


def test_many_prompts_beside_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways make all pictures; the command's group size is the library's batch."""
    bench_prompts.main(["--lines", "3", "--steps", "1", "--rounds", "1", "--json", str(tmp_path / "rate.json")])
    assert "3 lines, 1 steps, 8 at once" in capsys.readouterr().out
    found = json.loads((tmp_path / "rate.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["from Python", "--prompts"]


def test_pictures_at_once_and_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways make the same pictures, in batches of the sizes that they say; the status tells of the bound."""
    made: list[tuple[int, ...]] = []
    generate = minidiff.StableDiffusion.generate

    def watched(sd: Any, prompts: Any, **options: Any) -> Any:
        if isinstance(prompts, list):
            made.append(tuple(options["seed"]))
        return generate(sd, prompts, **options)

    monkeypatch.setattr(minidiff.StableDiffusion, "generate", watched)
    for bound, status in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(bench_batch, "BOUND", bound)
        told = ["--pictures", "3", "--steps", "1", "--rounds", "1", "--json", str(tmp_path / "batch.json")]
        assert bench_batch.main(told) == status
    assert made == 2 * [(0,), (1,), (2,), (0, 1, 2)]
    ways = json.loads((tmp_path / "batch.json").read_text())["ways"]
    assert [way["name"] for way in ways] == ["one by one", "3 at once"]


def test_imports_are_summed_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_start, "LISTED", 3)
    found = bench_start.imports(["-c", "import json.decoder"])
    assert len(found) == 4
    assert list(found)[-1] == "all others"
    assert all(seconds > 0 for seconds in found.values())


def test_cost_and_gain_of_bfloat16(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_dtype.py", "--prompts", "1", "--steps", "2"])
    assert bench_dtype.main() == 0
    first, second, ratios, right = capsys.readouterr().out.splitlines()
    assert "bfloat16 is" in first
    assert second.startswith("--dtype auto takes")
    assert ratios.startswith("PSNR of 1 pictures")
    assert right.startswith("right: ")
