"""Kill every command that writes, again and again, and check what it leaves; and let two write at once.

    python scripts/kill_writers.py                      # 200 kills of each command, 200 pairs of each kind
    python scripts/kill_writers.py --kills 5 --pairs 5  # the short form
    python scripts/kill_writers.py --only train

A kill is SIGKILL, which nothing can catch: by turns at a random moment of the run, and just before a random one of the
system's operations on files that it makes. After each: nothing half-written may stand under a final name, and what was
there before must be whole. The next run, which is let be, must sweep what was left, and training must end at the
weights of a run that was never stopped. Of two that write one name, both must succeed under two names (pictures), or
one must succeed and the other say in one line why not.

Commands run in forks of this process, which has imported everything, on tiny models with random weights. POSIX only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import minidiff.parity.command
import minidiff.training.command
import weights_convert  # noqa: F401
from minidiff import cli, read_recipe
from minidiff.config import to_json
from minidiff.pipeline import random_model
from minidiff.storage import files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPERATIONS = ("open", "mkdir", "link", "replace", "rename", "unlink", "fsync")  # of the module os
SEED = 0


class Wrong(AssertionError):
    """Broken promise."""


def need(condition: object, what: str) -> None:
    """Raise :class:`Wrong` unless ``condition``."""
    if not condition:
        raise Wrong(what)


# --- processes ---------------------------------------------------------------------------------------------------


def start(argv: list[str], said: Path, gate: int | None = None, die_at: int | None = None) -> int:
    """Fork a process that runs the command; return its number.

    It waits for ``gate``, and dies before operation ``die_at``.
    """
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        if gate is not None:
            os.read(gate, 1)
        if die_at is not None:
            die(die_at)
        status = cli.main(argv)
    finally:
        os._exit(status)


def die(at: int) -> None:
    """Let this process die just before operation number ``at`` of the module os."""
    left = [at]

    def wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return plain(*args, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def finish(child: int) -> int:
    """Wait for a fork; return its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Work:
    """Folder to work in, with the models, and one command run in it."""

    def __init__(self, root: Path) -> None:
        from tests.support.command import ORIGINAL, PLAIN

        self.root, self.place, self.said = root, root / "place", root / "said"
        self.model, self.config, self.photos = root / "model.safetensors", root / "plain.json", root / "photos"
        self.place.mkdir()
        random_model(ORIGINAL, seed=1).save(self.model)
        self.config.write_text(to_json(PLAIN))
        self.photos.mkdir()
        for k in range(4):
            minidiff.save_png(Image.new("RGB", (8, 8), (60 * k, 128, 255 - 60 * k)), self.photos / f"{k}.png")

    def run(self, argv: list[str]) -> float:
        """Run the command undisturbed; return the seconds that it took."""
        begun = time.monotonic()
        status = finish(start(argv, self.said))
        need(status == 0, f"{argv} ended with {status}: {self.said.read_text()}")
        return time.monotonic() - begun

    def kill(self, argv: list[str], seconds: float, draw: random.Random) -> bool:
        """Run and kill the command; return True if it was killed before it was done."""
        if draw.random() < 0.5:
            return finish(start(argv, self.said, die_at=draw.randrange(60))) < 0
        child = start(argv, self.said)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        return finish(child) < 0

    def left(self) -> list[str]:
        """Return hidden names in the place: those of half-written files."""
        return sorted(p.name for p in self.place.rglob(".*"))

    def clear(self) -> None:
        """Empty the place."""
        shutil.rmtree(self.place)
        self.place.mkdir()


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of every file in a folder except hidden ones."""
    found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in found if not p.name.startswith(".")}


# --- kills ---------------------------------------------------------------------------------------------------


def kill_generate(work: Work, kills: int, draw: random.Random) -> int:
    """Kill generate: existing pictures are whole, and stay as they are."""
    argv = ["generate", "a fox", "--model", str(work.model), "--steps", "1", "--num-images", "3", "--quiet"]
    argv += ["--seed", "7", "--out", f"{work.place}/"]
    seconds, killed = work.run(argv), 0
    before = contents(work.place)
    for _ in range(kills):
        killed += work.kill(argv, seconds, draw)
        now = contents(work.place)
        need(all(now.get(name) == data for name, data in before.items()), "a picture that was there is another one now")
        for name in now.keys() - before.keys():
            need(read_recipe(work.place / name)["prompt"] == "a fox", f"{name} is half a picture")
        before = now
        if len(before) > 60:
            work.clear()
            before = {}
    work.run(argv)
    return killed


def kill_file(argv: Callable[[Path], list[str]]) -> Callable[[Work, int, random.Random], int]:
    """Kill a command that replaces a file: it is the old or the new one."""

    def kill(work: Work, kills: int, draw: random.Random) -> int:
        target, old, killed = work.place / "target.safetensors", b"what was there before", 0
        command = [a.replace("MODEL", str(work.model)) for a in argv(target)]
        seconds = work.run(command)
        whole = target.read_bytes()
        for _ in range(kills):
            target.write_bytes(old)
            killed += work.kill(command, seconds, draw)
            need(target.read_bytes() in (old, whole), "the file is neither the old one nor the new one")
        work.run(command)
        need(target.read_bytes() == whole, "the last run wrote another file")
        return killed

    return kill


def kill_folder(work: Work, kills: int, draw: random.Random) -> int:
    """Kill a command that writes a folder: it is missing or whole."""
    target, killed = work.place / "target", 0
    argv = ["convert", str(work.model), str(target), "--to", "diffusers"]
    seconds = work.run(argv)
    whole = contents(target)
    for _ in range(kills):
        shutil.rmtree(target, ignore_errors=True)
        killed += work.kill(argv, seconds, draw)
        need(not target.exists() or contents(target) == whole, "there is half a folder")
    shutil.rmtree(target, ignore_errors=True)
    work.run(argv)
    need(contents(target) == whole, "the last run wrote another folder")
    return killed


def kill_train(work: Work, kills: int, draw: random.Random) -> int:
    """Kill and resume a training run until it is done: it ends with the weights of an uninterrupted one."""
    target, killed = work.place / "run", 0
    config = ["--config", str(work.config)]
    argv = ["train", "--data", str(work.photos), "--out", str(target), "--quiet", "--device", "cpu"]
    argv += ["--steps", "6", "--batch", "2", "--save-every", "1"]
    seconds = work.run(argv + config)
    whole = contents(target)
    while killed < kills:
        shutil.rmtree(target, ignore_errors=True)
        for _ in range(12):
            there = (target / "state.safetensors").exists()
            killed += work.kill(argv + (["--resume"] if there else config), seconds, draw)
            for name in ("state.safetensors", "model.safetensors"):
                if (target / name).exists():
                    files.content_hash(target / name)
                    file = files.TensorFile(target / name)
                    told = file.metadata[files.HASH_KEY]
                    file.close()
                    need(told == files.content_hash(target / name), f"{name} is not what was written")
        there = (target / "state.safetensors").exists()
        work.run(argv + (["--resume"] if there else config))
        now = contents(target)
        for name in ("state.safetensors", "model.safetensors", "log.csv"):
            need(now[name] == whole[name], f"{name} of the run that was resumed is another one")
        need(not work.left(), f"left: {work.left()}")
    return killed


KILLS: dict[str, Callable[[Work, int, random.Random], int]] = {
    "generate": kill_generate,
    "convert": kill_file(lambda target: ["convert", "MODEL", str(target), "--force"]),
    "convert to original": kill_file(lambda target: ["convert", "MODEL", str(target), "--force", "--to", "original"]),
    "convert to diffusers": kill_folder,
    "parity record": kill_file(
        lambda target: [
            "parity",
            "record",
            "MODEL",
            str(target),
            "--force",
            "--steps",
            "1",
            "--layers",
            "none",
            "--quiet",
        ]
    ),
    "train": kill_train,
}

# --- pairs ---------------------------------------------------------------------------------------------------


def both(work: Work, argv: list[str]) -> list[tuple[int, str]]:
    """Run the command twice at the same time; return status and output of each."""
    gate, hold = os.pipe()
    said = [work.root / "said-0", work.root / "said-1"]
    children = [start(argv, path, gate) for path in said]
    os.close(gate)
    os.write(hold, b"xx")
    os.close(hold)
    return [(finish(child), path.read_text()) for child, path in zip(children, said, strict=True)]


def pair_generate(work: Work) -> None:
    """Run two that make the same pictures: neither prints a path of the other's, and every picture exists."""
    argv = ["generate", "a fox", "--model", str(work.model), "--steps", "1", "--num-images", "2", "--quiet"]
    ends = both(work, [*argv, "--seed", "7", "--out", f"{work.place}/"])
    need([status for status, _ in ends] == [0, 0], f"{ends}")
    paths = [line for _, said in ends for line in said.split("\n") if line]
    need(len(set(paths)) == 4, f"paths twice: {paths}")
    need(sorted(map(str, work.place.iterdir())) == sorted(paths), f"lost: {paths}")
    seeds = sorted(read_recipe(path)["seed"] for path in paths)
    need(seeds == [7, 7, 8, 8], f"seeds {seeds}")


def pair_of(*more: str, words: tuple[str, ...]) -> Callable[[Work], None]:
    """Run two that write one name: one succeeds, the other says why it does not."""

    def pair(work: Work) -> None:
        argv = [a.replace("MODEL", str(work.model)).replace("PLACE", str(work.place / "target")) for a in more]
        argv = [a.replace("CONFIG", str(work.config)).replace("PHOTOS", str(work.photos)) for a in argv]
        ends = sorted(both(work, argv))
        need([status for status, _ in ends] == [0, 2], f"{ends}")
        said = ends[1][1]
        need(said.count("\n") == 1 and any(word in said for word in words), f"said: {said}")
        need(not work.left(), f"left: {work.left()}")
        for path in work.place.rglob("*.safetensors"):
            files.TensorFile(path).close()

    return pair


PAIRS: dict[str, Callable[[Work], None]] = {
    "two generate": pair_generate,
    "two convert": pair_of("convert", "MODEL", "PLACE.safetensors", words=("already exists",)),
    "two convert to diffusers": pair_of("convert", "MODEL", "PLACE", "--to", "diffusers", words=("is not replaced",)),
    "two train": pair_of(
        *("train", "--data", "PHOTOS", "--out", "PLACE", "--config", "CONFIG", "--quiet", "--steps", "2"),
        *("--batch", "1", "--device", "cpu"),
        words=("another run is using this folder", "already holds a run"),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="of each command (default: 200)")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="of each kind (default: 200)")
    parser.add_argument(
        "--only", choices=[*KILLS, *PAIRS], metavar="NAME", help=f"one of {', '.join([*KILLS, *PAIRS])}"
    )
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        parser.error("this system has no fork; use Linux or macOS")
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(Path(scratch))
        for name in [n for n in (*KILLS, *PAIRS) if args.only in (None, n)]:
            begun = time.monotonic()
            count, done = args.kills if name in KILLS else args.pairs, 0
            try:
                if name in KILLS:
                    work.clear()
                    done = KILLS[name](work, count, random.Random(SEED))
                    need(not work.left(), f"left: {work.left()}")
                while name in PAIRS and done < count:
                    work.clear()
                    PAIRS[name](work)
                    done += 1
                what = "were killed" if name in KILLS else "at once"
                print(f"{name}: {done} {what}, nothing wrong ({time.monotonic() - begun:.0f} s)", flush=True)
            except (Wrong, OSError, minidiff.MinidiffError) as e:
                failed += 1
                print(f"{name}: WRONG: {type(e).__name__}: {e}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
