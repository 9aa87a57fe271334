"""minidiff inside another program: threads, the state of the process, cancelling and interruptions.

Learned words, which are called embeddings too, are in ``test_embeddings.py``.
"""

from __future__ import annotations

import copy
import gc
import locale
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff import fast
from minidiff.adapters import lora
from minidiff.adapters import words as embeddings
from minidiff.adapters.lora import Adapter, Update
from minidiff.adapters.words import Word
from minidiff.errors import ConfigError
from minidiff.fast import machine, many_keys, onednn, trial
from minidiff.pipeline import StableDiffusion
from tests.support.tiny import tiny_ddpm, tiny_sd, tiny_xl

THREADS = 8
KERNEL = "blocks of 32"
SWITCHES = ["packed", "winograd", "memory", "attention", "halves"]  # what keeps something between two calls


@pytest.fixture(autouse=True)
def _as_on_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every switch applies to tiny layers, on any processor."""
    monkeypatch.setattr("minidiff.fast.packed.SMALLEST", 1)
    monkeypatch.setattr("minidiff.fast.linear.SMALLEST", 1)
    ranges = {name: of._replace(least=1) for name, of in many_keys.RANGES.items()}
    monkeypatch.setattr(many_keys, "RANGES", ranges)
    monkeypatch.setattr(machine, "private_cache", lambda: 1)  # the smallest blocks
    chosen = {name: trial.Result(KERNEL, {KERNEL: 1.0}) for name in ranges}
    monkeypatch.setattr(trial, "results", lambda dtype, measure=False: chosen)
    for name in ("NARROWEST", "SMALLEST", "POSITIONS"):
        monkeypatch.setattr(f"minidiff.fast.winograd.{name}", 1)


@pytest.fixture
def often() -> Iterator[None]:
    """Threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a horse", "seed": 1},
    {"prompt": "a cow", "seed": 2, "guidance_scale": 1.0},
    {"prompt": "a horse", "seed": 3, "num_images": 2},
    {"prompt": "a large red fox", "negative_prompt": "snow", "seed": 4, "sampler": "ddim"},
    {"prompt": "a horse", "seed": 5, "height": 72, "width": 40},
    {"prompt": ["a cat", "a dog"], "seed": 6, "sampler": "euler"},
    {"prompt": "a cow", "seed": 7, "sampler": "heun"},
    {"prompt": "a ship", "seed": 8, "guidance_interval": (0.2, 0.9)},
]


def drawn(pipe: Any, request: dict[str, Any]) -> Tensor:
    if not isinstance(pipe, StableDiffusion):
        request = {"seed": request["seed"], "sampler": "ddim"}
    found: Tensor = pipe.generate(**{"steps": 2, "output": "tensor", "progress": False, **request})
    return found


def side_by_side(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """The results of ``work`` for each number, all started at the same moment."""
    start = threading.Barrier(count)

    def begin(k: int) -> Any:
        start.wait()
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def check_threads(make: Callable[[], Any]) -> None:
    """Of a fresh model, so that the first calls meet: every thread gets all pictures, each with the bits that it has
    when they are made one after the other."""
    one = make()
    wanted = [drawn(one, request) for request in REQUESTS]
    shared = make()

    def work(k: int) -> list[bool]:
        order = [(k + i) % len(REQUESTS) for i in range(2)]
        return [torch.equal(drawn(shared, REQUESTS[i]), wanted[i]) for i in order]

    assert all(map(all, side_by_side(work)))
    assert all(torch.equal(drawn(shared, r), w) for r, w in zip(REQUESTS[:2], wanted, strict=False)), "and after them"


def optimized(*switches: str) -> Callable[[], StableDiffusion]:
    def make() -> StableDiffusion:
        sd = tiny_sd()
        on = fast.optimize(sd, switches)
        assert all(on.values()), on
        return sd

    return make


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("make", [tiny_sd, tiny_xl, tiny_ddpm])
def test_threads_share_a_plain_model(make: Callable[[], Any]) -> None:
    check_threads(make)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("pays", [True, False], ids=["with AVX512", "without"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_ddpm])
def test_threads_share_an_optimized_model(make: Callable[[], Any], pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: pays)

    def ready() -> Any:
        pipe = make()
        fast.optimize(pipe)
        return pipe

    check_threads(ready)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("switch", SWITCHES)
def test_threads_share_a_switch(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda *_: switch != "winograd")
    check_threads(optimized(switch))


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("how", [{"deep": 2}, {"merge": 0.5}], ids=str)
@pytest.mark.parametrize("switches", [(), tuple(fast.SWITCHES)], ids=["alone", "beside switches"])
def test_threads_share_an_approximation(how: dict[str, Any], switches: tuple[str, ...]) -> None:
    def make() -> StableDiffusion:
        sd = tiny_sd()
        fast.approximate(sd, **how)
        fast.optimize(sd, switches)
        return sd

    check_threads(make)


@pytest.mark.usefixtures("often")
def test_threads_share_tiles() -> None:
    def make() -> StableDiffusion:
        sd = tiny_sd()
        fast.tiled(sd, side=5)
        return sd

    check_threads(make)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("how", "extra"), [("low_memory", "plain"), ("low_memory", "approximate"), ("offload", "switches")]
)
def test_threads_share_parts_that_take_turns(how: str, extra: str, tmp_path: Path) -> None:
    tiny_sd().save(tmp_path / "model.safetensors")

    def make() -> Any:
        pipe = minidiff.load(tmp_path / "model.safetensors", "cpu", low_memory=how == "low_memory")
        if how == "offload":
            fast.offload(pipe, "cpu")
        if extra == "switches":
            fast.optimize(pipe)
        if extra == "approximate":
            fast.approximate(pipe, deep=2, merge=0.5)
        return pipe

    check_threads(make)


@pytest.mark.usefixtures("often")
def test_a_model_in_turns_is_saved_whole_while_it_works(tmp_path: Path) -> None:
    tiny_sd().save(tmp_path / "model.safetensors")
    sd = minidiff.load(tmp_path / "model.safetensors", "cpu", low_memory=True)

    def work(k: int) -> bool:
        if k % 2:
            drawn(sd, REQUESTS[k])
            return True
        return all(t.isfinite().all() for part in sd.parts.values() for t in part.state_dict().values())

    assert all(side_by_side(work, 4))


def test_a_run_may_go_from_thread_to_thread() -> None:
    """As with ``await asyncio.to_thread(next, run)``: what an approximation keeps goes along."""
    sd = tiny_sd()
    fast.approximate(sd, deep=3, merge=0.5)
    wanted = [step.x for step in sd.steps("a horse", steps=5, seed=1)]
    found = []
    run = sd.steps("a horse", steps=5, seed=1)
    for _ in wanted:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(next, run).result().x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_plain_model_beside_one_in_bfloat16() -> None:
    """The plain one has the bits that it has alone, and a third thread never sees a setting of torch's change."""
    narrow, plain = tiny_sd(), tiny_sd(1)
    narrow.to(dtype=torch.bfloat16)
    fast.optimize(narrow)
    wanted = [drawn(narrow, REQUESTS[0]), drawn(plain, REQUESTS[0])]
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    with watched(lambda: (getattr(matmul, "fp32_precision", None), torch.get_float32_matmul_precision())) as seen:
        found = side_by_side(lambda k: [drawn((narrow, plain)[k % 2], REQUESTS[0]) for _ in range(3)], 4)
    assert len(seen) == 1, seen
    for k, pictures in enumerate(found):
        assert all(torch.equal(picture, wanted[k % 2]) for picture in pictures)


def test_a_model_that_overflows_says_so_in_its_own_thread() -> None:
    """It is run once more to find the culprit; another thread's run on the same model is none of its business."""
    sd = tiny_sd()
    wanted = drawn(sd, REQUESTS[0])
    latents = torch.full((1, 4, 8, 8), float("inf"))

    def work(k: int) -> str:
        if k % 2:
            return str(all(torch.equal(drawn(sd, REQUESTS[0]), wanted) for _ in range(4)))
        try:
            sd.generate("a cow", steps=1, latents=latents, progress=False)
        except minidiff.MinidiffError as e:
            return str(e)
        return "no error"

    found = side_by_side(work, 4)
    assert found[1::2] == ["True"] * 2
    assert all("NaN or infinite values, first from unet.conv_in" in line for line in found[::2])
    assert not any(m._forward_hooks for part in sd.parts.values() for m in part.modules())


def test_how_many_threads_a_call_may_use() -> None:
    """A pool whose threads say it once, each for itself: the others keep theirs."""
    sd, before = tiny_sd(), torch.get_num_threads()
    wanted = drawn(sd, REQUESTS[0])
    counts = {1, 2} - {before}
    for count in counts:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(count,)) as pool:
            assert pool.submit(torch.get_num_threads).result() == count
            pool.submit(drawn, sd, REQUESTS[0]).result()
            assert torch.get_num_threads() == before
    torch.set_num_threads(before)  # what a thread that begins later takes
    assert torch.equal(drawn(sd, REQUESTS[0]), wanted)


# --- the state of the process -----------------------------------------------------------------------------------------


def state() -> tuple[Any, ...]:
    """All of the process that a program may have set, as a thread that does nothing else sees it."""
    cpu = torch.random.default_generator.get_state()
    backends = torch.backends
    return (
        str(torch.get_default_dtype()),
        str(torch.get_default_device()),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        getattr(getattr(backends.mkldnn, "matmul", None), "fp32_precision", None),
        getattr(getattr(backends.mkldnn, "conv", None), "fp32_precision", None),
        (backends.cudnn.allow_tf32, backends.cudnn.benchmark, backends.cudnn.deterministic),
        backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        len(torch.serialization.get_safe_globals()),
        hash(cpu.numpy().tobytes()),
        hash(str(random.getstate())),
        hash(str(np.random.get_state())),
        tuple(map(str, warnings.filters)),
        warnings.showwarning,
        tuple(sorted(os.environ.items())),
        Path.cwd(),
        tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)),
        (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook),
        locale.setlocale(locale.LC_ALL),
        sys.getrecursionlimit(),
        tuple(sys.path),
    )


@contextmanager
def watched(look: Callable[[], Any]) -> Iterator[list[Any]]:
    """The values that another thread sees meanwhile, each once."""
    seen: list[Any] = [look()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            now = look()
            if now not in seen:
                seen.append(now)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def changes(seen: list[Any]) -> list[Any]:
    return [(a, b) for now in seen[1:] for a, b in zip(seen[0], now, strict=True) if a != b]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_changes_nothing_of_the_process(dtype: torch.dtype, tmp_path: Path) -> None:
    from PIL import Image

    sd = tiny_sd()
    sd.save(tmp_path / "model.safetensors")
    picture = Image.new("RGB", (64, 64), "red")
    with watched(state) as seen:
        loaded = minidiff.load(tmp_path / "model.safetensors", "cpu", dtype)
        fast.optimize(loaded)
        drawn(loaded, REQUESTS[0])
        drawn(loaded, {**REQUESTS[1], "image": picture, "mask": picture.convert("L")})
        fast.approximate(loaded, deep=2, merge=0.5)
        drawn(loaded, REQUESTS[2])
        fast.restore(loaded)
        fast.optimize(loaded, ("attention", "halves", "vae_slices"))
        image = loaded.generate("a horse", seed=1, steps=2)[0]  # type: ignore[union-attr]
        minidiff.save_png(image, tmp_path / "a.png")
        minidiff.read_recipe(tmp_path / "a.png")
    assert changes(seen) == []


@pytest.mark.usefixtures("often")
def test_reading_other_layouts_changes_nothing_of_the_process(tmp_path: Path) -> None:
    import weights_convert

    tiny_sd().save(tmp_path / "model.safetensors")
    weights_convert.convert(tmp_path / "model.safetensors", tmp_path / "folder", to="diffusers")
    torch.save({"state_dict": {"emb_params": torch.ones(2, 16)}}, tmp_path / "word.ckpt")
    with watched(state) as seen:
        weights_convert.load(tmp_path / "folder", "cpu")
        for _ in range(5):
            with suppress(minidiff.MinidiffError):
                weights_convert.load(tmp_path / "word.ckpt", "cpu")
    assert changes(seen) == []


@pytest.mark.usefixtures("often")
def test_reading_pictures_to_train_on_changes_nothing_of_the_process(tmp_path: Path) -> None:
    from PIL import Image

    from minidiff.training.image_folder import ImageFolder

    for k in range(20):
        Image.new("RGB", (64, 64), (k, 0, 0)).save(tmp_path / f"{k}.png")
    with watched(state) as seen:
        assert len(ImageFolder(tmp_path, 8)) == 20
    assert changes(seen) == []


SETTINGS = re.compile(
    r"catch_warnings|simplefilter|filterwarnings|sys\.path\.|os\.environ\[[^]]+\] = |putenv|chdir|umask\(|setlocale|"
    r"torch\.manual_seed|set_rng_state|fork_rng|set_default_|set_num_threads|use_deterministic|signal\.signal|"
    r"torch\.backends\.\S+ = |set_float32|MAX_IMAGE_PIXELS = |LOAD_TRUNCATED|setrecursionlimit|"
    r"showwarning = |excepthook = "
)
SET_BY = {
    "minidiff/__main__.py": "of the command line, while it is being imported",
    "minidiff/console/__init__.py": "the frame of the command line",
    "minidiff/console/signals.py": "of the command line, and put back",
    "minidiff/cli/many/work.py": "of the command line",
    "minidiff/training/command.py": "of the command line",
    "minidiff/parity/goldens.py": "of the command line",
    "minidiff/export/formats.py": "hush(), of the command line",
    "minidiff/fast/__init__.py": "names one in its advice",
    "minidiff/parity/modules.py": "both modules draw the same numbers, which its docstring says",
}


def test_settings_of_the_process_are_touched_by_the_command_line_alone() -> None:
    """By reading: a moment is too short to be seen for sure, and what torch's exporter sets hides the rest."""
    root = Path(minidiff.__file__).parents[1]
    files = [path for name in ("minidiff", "weights_convert") for path in (root / name).rglob("*.py")]
    found = {path.relative_to(root).as_posix() for path in files if SETTINGS.search(path.read_text(encoding="utf-8"))}
    assert found == {*SET_BY}


def test_an_untrained_model_leaves_the_random_numbers_alone() -> None:
    with watched(state) as seen:
        for seed in range(3):
            tiny_sd(seed)
    assert changes(seen) == []


# --- silent, and off the network --------------------------------------------------------------------------------------


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    sd = tiny_sd()
    fast.optimize(sd)
    sd.generate("a horse", steps=2, seed=0)
    sd.steps("a horse", steps=2, seed=0).last()
    assert capfd.readouterr() == ("", "")


ALONE = """
import os, sys
kept = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr = None
for descriptor in (1, 2):
    os.close(descriptor)
def watch(event, arguments):
    if event.startswith("socket."):
        kept.write(event)
        kept.flush()
        os._exit(1)
sys.addaudithook(watch)
import minidiff
from minidiff import fast
sd = minidiff.load(sys.argv[1], "cpu")
fast.optimize(sd)
for progress in (None, True, False):
    sd.generate("a horse", steps=2, seed=0, progress=progress)
kept.write("made\\n"); kept.flush()
"""


def test_a_program_without_streams_and_without_a_network(tmp_path: Path) -> None:
    tiny_sd().save(tmp_path / "model.safetensors")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "model.safetensors")], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


# --- cancelling -------------------------------------------------------------------------------------------------------


@contextmanager
def held(layer: nn.Module, at: int) -> Iterator[tuple[threading.Event, threading.Event, list[int]]]:
    """``layer``'s call number ``at`` waits: (it has come there, it may go on, one entry a call)."""
    there, go_on, calls = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            there.set()
            assert go_on.wait(30)

    handle = layer.register_forward_pre_hook(wait)
    try:
        yield there, go_on, calls
    finally:
        go_on.set()
        handle.remove()


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except minidiff.Cancelled as e:
        return e


@pytest.mark.parametrize("approximate", [False, True])
def test_cancelled_from_another_thread_within_one_call(approximate: bool) -> None:
    sd = tiny_sd()
    if approximate:
        fast.approximate(sd, deep=2)
    run = sd.steps("a horse", steps=20, seed=1, sampler="ddim")
    with held(sd.unet.conv_in, 3) as (there, go_on, calls), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outcome, lambda: sd.finish(run))
        assert there.wait(30)
        run.cancel()
        go_on.set()
        found = waiting.result(30)
    assert isinstance(found, minidiff.Cancelled)
    assert isinstance(found, minidiff.MinidiffError)
    assert str(found) == "the run was cancelled"
    assert len(calls) == 3, "the call that was under way is the last"
    for again in (lambda: next(run), run.last, lambda: sd.finish(run)):
        assert isinstance(outcome(again), minidiff.Cancelled)
    assert drawn(sd, REQUESTS[0]).isfinite().all(), "the model goes on"


def test_generate_is_cancelled_by_its_step() -> None:
    """From whatever thread the step was handed to."""
    sd, seen = tiny_sd(), []

    def watch(step: minidiff.Step) -> None:
        seen.append(step.i)
        if step.i == 1:
            threading.Thread(target=step.cancel).start()
            time.sleep(0.05)

    with pytest.raises(minidiff.Cancelled):
        sd.generate("a horse", steps=30, seed=1, sampler="ddim", progress=watch)
    assert seen == [0, 1]


@pytest.mark.parametrize("how", ["tiles", "slices"])
def test_a_decoding_is_cancelled_within_one_tile(how: str) -> None:
    sd = tiny_sd()
    if how == "tiles":
        fast.tiled(sd, side=4)
    else:
        fast.optimize(sd, ("vae_slices",))
    run = sd.steps("a horse", steps=1, seed=1, num_images=4)
    with held(sd.vae.decoder.conv_in, 2) as (there, go_on, calls), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outcome, lambda: sd.finish(run))
        assert there.wait(30)
        run.cancel()
        go_on.set()
        assert isinstance(waiting.result(30), minidiff.Cancelled)
    assert len(calls) == 2
    assert drawn(sd, REQUESTS[0]).isfinite().all()


@pytest.mark.parametrize("end", ["cancel", "close", "leave", "finish"])
def test_a_run_that_is_left_is_freed(end: str) -> None:
    """Without the garbage collector: nothing of it is in a circle."""
    sd = tiny_sd()
    fast.optimize(sd)
    fast.approximate(sd, deep=2, merge=0.5)
    gc.collect()
    gc.disable()
    try:
        before = {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}
        run = sd.steps("a horse", steps=4, seed=1, height=72)
        gone = weakref.ref(next(run))
        if end == "cancel":
            run.cancel()
            with pytest.raises(minidiff.Cancelled):
                next(run)
        elif end == "close":
            run.close()
        elif end == "finish":
            sd.finish(run)
        del run
        left = [t for t in gc.get_objects() if isinstance(t, Tensor) and id(t) not in before]
        large = [tuple(t.shape) for t in left if 9 * 8 in (t.shape[-2:].numel(), *t.shape) or t.shape[1:2] == (77,)]
    finally:
        gc.enable()
    assert gone() is None
    assert large == []


# --- nothing grows ----------------------------------------------------------------------------------------------------


def held_by_the_process() -> tuple[int, int, int]:
    """(threads, file descriptors, kilobytes)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return threading.active_count(), len(os.listdir("/proc/self/fd")), int(status["VmRSS"].split()[0])


def what_is_left(folder: Path, times: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Memory that the process holds before and after so many loads, each with two runs, one of them left early."""
    tiny_sd().save(folder / "model.safetensors")

    def once(k: int) -> None:
        sd = minidiff.load(folder / "model.safetensors", "cpu", low_memory=k % 2 == 1)
        fast.optimize(sd)
        assert isinstance(sd, StableDiffusion)
        sd.generate("a horse", steps=2, seed=k)
        next(sd.steps("a horse", steps=2, seed=k))

    for k in range(6):
        once(k)
    gc.collect()
    before = held_by_the_process()
    for k in range(times):
        once(k)
    gc.collect()
    return before, held_by_the_process()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what a process holds")
def test_runs_and_loads_leave_nothing_behind(tmp_path: Path) -> None:
    """``scripts/check_embedding.py`` does 200 of each."""
    before, after = what_is_left(tmp_path, 20)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 8 * 1024, "kilobytes; the weights of one model are 600"


# --- interrupted ------------------------------------------------------------------------------------------------------


class Interruption:
    """Ctrl-C at line number ``at`` of what minidiff does."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if "/minidiff/" not in frame.f_code.co_filename.replace(os.sep, "/"):
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def interrupted(work: Callable[[], Any], at: int) -> bool:
    """True if ``work`` was interrupted before its end."""
    before = sys.gettrace()
    sys.settrace(Interruption(at))
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def length(work: Callable[[], Any]) -> int:
    """Number of places to interrupt ``work`` at."""
    counting = Interruption(-1)
    before = sys.gettrace()
    sys.settrace(counting)
    try:
        work()
    finally:
        sys.settrace(before)
    return -1 - counting.left


def weights(pipe: StableDiffusion) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.clone() for n, part in pipe.parts.items() for k, t in part.state_dict().items()}


def ink() -> Adapter:
    g = torch.Generator().manual_seed(1)
    names = [f"unet.{place}.attn{i}.{w}" for place in ("down.0.attn.0.blocks.0",) for i in (1, 2) for w in ("q", "out")]
    return Adapter("ink", {n: Update(torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g)) for n in names})


def undone(sd: StableDiffusion, handles: list[lora.Applied]) -> None:
    for handle in handles:
        handle.remove()
    fast.restore(sd)


OPERATIONS: dict[str, Callable[[StableDiffusion, list[lora.Applied]], Any]] = {
    "lora": lambda sd, kept: kept.append(lora.apply(sd.parts, [(ink(), 0.5), (ink(), 0.25)])),
    "live lora": lambda sd, kept: kept.append(lora.apply(sd.parts, [(ink(), 0.5)], live=True)),
    "optimize": lambda sd, _: fast.optimize(sd),
    "approximate": lambda sd, _: fast.approximate(sd, deep=2, merge=0.5),
    "tiled": lambda sd, _: fast.tiled(sd, side=4),
    "offload": lambda sd, _: fast.offload(sd, "cpu"),
}


def check_interruptions(name: str, count: int, seed: int) -> int:
    """Interrupt putting on, and taking off, at ``count`` random places each; how often it came in time.

    After it nothing is on that has no handle: once all handles are used, the model is the plain one, bit for bit, and
    not one hook or stand-in is left; and it can be done once more.
    """
    sd, drawing = tiny_sd(), random.Random(seed)
    before, plain = weights(sd), drawn(sd, REQUESTS[0])
    operation = OPERATIONS[name]
    handles: list[lora.Applied] = []
    places = length(lambda: operation(sd, handles))
    back = length(lambda: undone(sd, handles))
    came = 0
    for _ in range(count):
        handles.clear()
        came += interrupted(lambda: operation(sd, handles), 1 + drawing.randrange(places))
        undone(sd, handles)
        check_plain(sd, before)
        handles.clear()
        operation(sd, handles)
        came += interrupted(lambda: undone(sd, handles), 1 + drawing.randrange(back))
        undone(sd, handles)
        check_plain(sd, before)
    assert torch.equal(drawn(sd, REQUESTS[0]), plain)
    return came


def check_plain(sd: StableDiffusion, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(t, before[name]) for name, t in weights(sd).items())
    assert (sd.fast, sd.approximations, sd.low_memory) == ((), {}, None)
    for part in sd.parts.values():
        for m in part.modules():
            assert not [*m._forward_hooks, *m._forward_pre_hooks, *m._state_dict_hooks]
            assert not m.__dict__.keys() & {"forward", "decode", "state_dict"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupted_anywhere_it_is_done_whole_or_not_at_all(name: str) -> None:
    assert check_interruptions(name, 12, seed=len(name)) > 12


def test_a_word_is_learned_whole_or_not_at_all() -> None:
    word = Word("<cat>", {"text_encoder": torch.ones(2, 16)})
    places = length(lambda: embeddings.add(tiny_sd(), word)) - length(tiny_sd)
    assert places > 50
    for at in random.Random(0).sample(range(1, places), 12):
        sd = tiny_sd()
        before, config, tokenizer = weights(sd), sd.config, sd.tokenizer
        assert interrupted(lambda sd=sd: embeddings.add(sd, word), at)  # type: ignore[misc]
        if sd.config is config:
            assert sd.tokenizer is tokenizer
            assert all(torch.equal(t, before[name]) for name, t in weights(sd).items())
            embeddings.add(sd, word)
        assert sd.tokenizer.encode("<cat>") == [49408, 49409]
        assert len(sd.text_encoder.token.weight) == 49410
        assert drawn(sd, {"prompt": "a <cat>", "seed": 1}).isfinite().all()


# --- copies -----------------------------------------------------------------------------------------------------------

CHANGES: list[Callable[[StableDiffusion], Any]] = [
    lambda sd: fast.optimize(sd),
    lambda sd: fast.optimize(sd, ("memory",)),
    lambda sd: fast.optimize(sd, ("inplace",)),
    lambda sd: fast.approximate(sd, deep=2),
    lambda sd: fast.approximate(sd, merge=0.5),
    lambda sd: fast.tiled(sd, side=4),
    lambda sd: fast.offload(sd, "cpu"),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("by", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_changed_model_says_that_it_cannot_be_copied(change: Callable[[Any], Any], by: Callable[[Any], Any]) -> None:
    sd = tiny_sd()
    plain = drawn(sd, REQUESTS[0])
    change(sd)
    drawn(sd, REQUESTS[0])
    for thing in (sd, sd.parts):
        with pytest.raises(ConfigError, match=r"^this model is changed for speed .* can't be copied or pickled") as e:
            by(thing)
        assert "\n" not in str(e.value)
    fast.restore(sd)
    again = by(sd)
    again = pickle.loads(again) if isinstance(again, bytes) else again
    assert torch.equal(drawn(again, REQUESTS[0]), plain)


# --- a program that has set something else ----------------------------------------------------------------------------


@contextmanager
def set_otherwise(how: str) -> Iterator[None]:
    if how == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
    elif how == "default meta":
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)
    else:
        with torch.device("meta"):
            yield


SAMPLERS = sorted(minidiff.samplers.SAMPLERS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["float64", "meta", "default meta"])
def test_what_a_program_has_set_by_default_changes_no_bit(how: str, tmp_path: Path) -> None:
    from PIL import Image

    sd, xl, ddpm = tiny_sd(), tiny_xl(), tiny_ddpm()
    sd.save(tmp_path / "model.safetensors")
    picture = Image.linear_gradient("L").resize((64, 64))
    shown = {"image": picture.convert("RGB"), "strength": 0.8}
    requests: list[tuple[Any, dict[str, Any]]] = [
        *((sd, {"prompt": "a horse", "seed": 1, "steps": 5, "sampler": name}) for name in SAMPLERS),
        *(
            (sd, {"prompt": "a horse", "seed": 1, "sampler": "ddim", "like": p})
            for p in ("diffusers", "a1111", "comfyui")
        ),
        (sd, {"prompt": "a horse", "seed": 1, **shown}),
        (sd, {"prompt": "a horse", "seed": 1, **shown, "mask": picture}),
        (sd, {"prompt": "a horse", "seed": 1, "guidance_rescale": 0.7}),
        (xl, {"prompt": "a horse", "seed": 1}),
        (ddpm, {"seed": 1}),
    ]
    wanted = [drawn(pipe, request) for pipe, request in requests]
    ids = sd.tokenizer(["a horse"])
    with set_otherwise(how):
        for (pipe, request), want in zip(requests, wanted, strict=True):
            found = drawn(pipe, request)
            assert found.device.type == "cpu", request
            assert found.dtype == want.dtype, request
            assert torch.equal(found, want), request
        assert torch.equal(sd.tokenizer(["a horse"]), ids)
        images = sd.generate("a horse", seed=1, steps=2)
        loaded = minidiff.load(tmp_path / "model.safetensors", "cpu")
        assert torch.equal(drawn(loaded, REQUESTS[0]), drawn(sd, REQUESTS[0]))
        fast.optimize(loaded)
        fast.approximate(loaded, deep=2, merge=0.5)
        quick = drawn(loaded, REQUESTS[0])
    assert images[0].tobytes() == sd.generate("a horse", seed=1, steps=2)[0].tobytes()
    assert torch.equal(drawn(loaded, REQUESTS[0]), quick)
