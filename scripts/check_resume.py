"""Kill a training run without warning, resume it, and compare its weights with those of an uninterrupted run.

    python scripts/check_resume.py            # a small pixel model on the procedural shapes, about a minute

Both runs are `minidiff train` in processes of their own. One is killed (SIGKILL, which nothing can catch) some steps
after its first checkpoint, and resumed. Equal means: the two files with the averaged weights have the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--data", "shapes", "--batch", "4", "--rate", "1e-3", "--seed", "5", "--quiet"]


def command(folder: Path, steps: int, *more: str) -> list[str]:
    """Return the command for ``steps`` steps in ``folder``, with a checkpoint half way."""
    given = ["--out", str(folder), "--steps", str(steps), "--save-every", str(steps // 2), *more]
    return [sys.executable, "-m", "minidiff", "train", *OPTIONS, *given]


def steps_done(folder: Path) -> int:
    """Return the number of steps in the log of a run."""
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def killed(folder: Path, steps: int) -> int:
    """Start a run and kill it between its checkpoint and its end; return the step after which it died."""
    with subprocess.Popen(command(folder, steps), cwd=ROOT) as process:
        while process.poll() is None and steps_done(folder) < steps // 2 + steps // 4:
            time.sleep(0.02)
        process.kill()
    return steps_done(folder)


def digest(folder: Path) -> str:
    """Return the SHA-256 of the model that a run left."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each run, at least 8 (default: 40)")
    steps = parser.parse_args().steps
    if steps < 8:
        parser.error(f"--steps {steps}: at least 8, so that there is room to be killed between checkpoint and end")
    with tempfile.TemporaryDirectory() as scratch:
        unbroken, broken = Path(scratch) / "unbroken", Path(scratch) / "broken"
        subprocess.run(command(unbroken, steps), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"unbroken: {steps} steps, sha256 {digest(unbroken)[:16]}")
        died = killed(broken, steps)
        if died >= steps:
            print("the run was over before it could be killed; try more --steps", file=sys.stderr)
            return 1
        print(f"killed:   after step {died}, checkpoint of step {steps // 2}, sha256 {digest(broken)[:16]}")
        subprocess.run(command(broken, steps, "--resume"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"resumed:  to step {steps}, sha256 {digest(broken)[:16]}")
        same = digest(broken) == digest(unbroken)
        print("equal" if same else "NOT EQUAL")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
