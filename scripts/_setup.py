"""Set-up of an environment in which minidiff runs, from a bare Python; shared by demo.py and test.py.

A script calls :func:`enter` first. It returns only in the Python of an environment beside the checkout that has the
package installed (editable); started with any other Python, it makes or completes that environment and runs the same
command line there. A stamp inside the environment names what was installed, so that the second start costs a look at
one file. Standard library only; like its callers this file must at least parse under any Python 3.6, to be able to say
that it is too old.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"minidiff needs Python 3.10 or newer, this is {sys.version_info[0]}.{sys.version_info[1]}: use a newer one"
    )

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import time
import venv
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = "unfinished"
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


def enter(extra: str = "", name: str = ".venv", pins: tuple[str, ...] = ()) -> None:
    """Return in the Python of ``ROOT/name``, with minidiff, its ``extra`` and the requirements ``pins`` installed.

    Leaves through SystemExit: with the status of the same command line run there, or with one line that says what is
    missing.
    """
    home = ROOT / name
    try:
        with alone():
            prepare(home, extra, pins)
    except KeyboardInterrupt:
        print("interrupted: the next start sets up again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if inside(home):
        return
    command = [str(interpreter(home)), *sys.orig_argv[1:]]
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(command[0], command)
    sys.exit(run(command))


@contextmanager
def alone() -> "Iterator[None]":
    """Wait while another start sets up: two at once would each clear away what the other has begun. POSIX only."""
    with open(ROOT / "pyproject.toml", "rb") as held:
        if fcntl is not None:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print("waiting for another start, which is setting up", flush=True)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield


def prepare(home: Path, extra: str, pins: tuple[str, ...]) -> None:
    """Make ``home`` an environment that holds the editable package, doing only what its stamp says is not done."""
    stamp = home / "minidiff-setup.txt"
    done = stamp.read_text().split() if stamp.exists() else []
    version = sys.version if inside(home) else version_of(interpreter(home))
    if version is None or UNFINISHED in done:
        if inside(home):
            sys.exit(f"{home} is half set up: start this with the Python that it was made with, outside of it")
        create(home, stamp)
        version, done = sys.version, []
    # What has the test extra has all that the plain package needs.
    if not {fingerprint(version, e, pins) for e in (extra, "test")} & set(done):
        start = time.perf_counter()
        install(home, stamp, done, extra, pins)
        stamp.write_text(fingerprint(version, extra, pins) + "\n")
        print(f"set up {home} in {time.perf_counter() - start:.0f} s", flush=True)


def create(home: Path, stamp: Path) -> None:
    """Create an empty environment with pip; remains of a broken one are removed."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        major, minor = sys.version_info[:2]
        sys.exit(
            "this Python can't make virtual environments: its module ensurepip is missing"
            f" (on Debian and Ubuntu: sudo apt install python{major}.{minor}-venv)"
        )
    if home.exists():
        print(f"removing {home}, which was not finished or no longer runs", flush=True)
        shutil.rmtree(home)
    home.mkdir()
    stamp.write_text(UNFINISHED)
    print(f"making a virtual environment in {home}", flush=True)
    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(home)
    except subprocess.CalledProcessError as e:
        output = e.output.decode(errors="replace") if isinstance(e.output, bytes) else e.output
        sys.exit(f"no virtual environment could be made in {home}: {e}\n{output or ''}".rstrip())


def install(home: Path, stamp: Path, done: list[str], extra: str, pins: tuple[str, ...]) -> None:
    """Let pip install the checkout, marked as unfinished meanwhile: pip cleans up if it fails, not if it is killed."""
    python = str(interpreter(home))
    has_pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if not has_pip and run([python, "-m", "ensurepip"]) != 0:
        sys.exit(f"{home} has no pip: delete that folder and start this again")
    target = f".[{extra}]" if extra else "."
    print("installing minidiff and what it needs; the first time PyTorch is downloaded, up to a few gigabytes")
    stamp.write_text(UNFINISHED)
    status = run([python, "-m", "pip", "install", "--disable-pip-version-check", "--editable", target, *pins])
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    stamp.write_text("\n".join(done))
    if status != 0:
        sys.exit(f"pip could not install minidiff into {home} (status {status}); its output above says why")


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Print and run a command in the checkout's root; return its exit status, or ``INTERRUPTED`` after Ctrl-C.

    Ctrl-C reaches the command too: it is given time to clean up and to say so.
    """
    shown = ["python" if part == command[0] else part for part in command]
    print("$", *shown, flush=True)
    with subprocess.Popen(command, cwd=ROOT, env=env) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            try:
                child.wait(timeout=20)
            except (KeyboardInterrupt, subprocess.TimeoutExpired):
                child.kill()
            return INTERRUPTED


def interpreter(home: Path) -> Path:
    """Return the Python of the environment ``home``."""
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def inside(home: Path) -> bool:
    """Return True if this process runs in the environment ``home``."""
    return Path(sys.prefix).resolve() == home.resolve()


def version_of(python: Path) -> str | None:
    """Return ``sys.version`` of another interpreter, or None if it does not run (its base was removed, say)."""
    try:
        asked = subprocess.run([str(python), "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
    except OSError:
        return None
    return asked.stdout.rstrip("\n") if asked.returncode == 0 else None


def fingerprint(version: str, extra: str, pins: tuple[str, ...]) -> str:
    """Return a hash of all that an installation depends on: the project file, the place, the Python, the request."""
    project = (ROOT / "pyproject.toml").read_bytes()
    parts = [project, str(ROOT).encode(), version.encode(), extra.encode(), *(p.encode() for p in pins)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def requirements(table: str) -> list[str]:
    """Return the requirements of one list in pyproject.toml: "dependencies", or the name of an extra.

    Read with a regular expression, since Python 3.10 has no TOML reader.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    body = re.search(rf"^{re.escape(table)} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if body is None:
        sys.exit(f"pyproject.toml has no list named {table}")
    return re.findall(r'^\s*"([^"]+)"', body[1], re.MULTILINE)
