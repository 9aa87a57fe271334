"""Set up everything, then check everything: format, lint, types, tests. `python3 scripts/test.py` on a fresh clone.

Needs nothing but Python 3.10 or newer; what it installs goes into .venv beside this checkout. Arguments that are not
its own are passed on to pytest, as in `scripts/test.py tests/unit -k schedule`.
"""

import argparse
import os
import re
import sys
import time

import _setup

OLDEST = ".venv-oldest"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only-tests", action="store_true", help="leave out format, lint and types")
    parser.add_argument(
        "--oldest",
        action="store_true",
        help=f"run tests/unit with the oldest dependencies that pyproject.toml allows, installed in {OLDEST}",
    )
    options, to_pytest = parser.parse_known_args()
    if options.oldest:
        _setup.enter(name=OLDEST, pins=tuple(oldest()))
        # As an ini value: pytest reads it only where the arguments name no tests themselves.
        return check([["pytest", *workers(), "-o", "testpaths=tests/unit", *to_pytest]])
    _setup.enter("test")
    static = [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]]
    return check([*([] if options.only_tests else static), ["pytest", *workers(), *without_reference(), *to_pytest]])


def check(commands: list[list[str]]) -> int:
    """Run all checks, whatever fails, and report each at the end; return 1 if any failed."""
    # One thread a process: the bits of a sum depend on how many threads share it, and so on the number of workers.
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    report, failed, begin = [], False, time.perf_counter()
    for command in commands:
        start = time.perf_counter()
        status = _setup.run([sys.executable, "-m", *command], env)
        if status == _setup.INTERRUPTED:
            return status
        verdict = "passed" if status == 0 else f"FAILED (status {status})"
        report.append(f"{' '.join(command[:2])}: {verdict}, {time.perf_counter() - start:.1f} s")
        failed |= status != 0
    report.append(f"{time.perf_counter() - begin:.1f} s in all")
    print("; ".join(report), flush=True)
    return int(failed)


def workers() -> list[str]:
    """Return pytest's options for one worker a core, four at most: each loads its own PyTorch. A worker that is done
    takes over what another still has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["-n", str(min(cores, 4)), "--dist", "worksteal"] if cores > 1 else []


def without_reference() -> list[str]:
    """Return pytest's option that skips the comparison with diffusers if its pinned release cannot be installed."""
    if sys.version_info >= (3, 11):
        return []
    print("tests/parity is left out: the releases of diffusers and transformers that it compares with need Python 3.11")
    return ["--ignore=tests/parity"]


def oldest() -> list[str]:
    """Return every run-time dependency pinned to its lower bound, and the newest versions of what runs the tests."""
    if sys.version_info >= (3, 13):
        sys.exit("--oldest needs Python 3.10, 3.11 or 3.12: the oldest numpy has no build for newer ones")
    pins = []
    for requirement in _setup.requirements("dependencies"):
        bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        if bound is None:
            sys.exit(f"pyproject.toml: the dependency {requirement!r} should read NAME>=VERSION")
        pins.append(f"{bound[1]}=={bound[2]}")  # 2.6 means 2.6.0 here
    tools = [r for r in _setup.requirements("test") if not r.startswith(("minidiff", "ruff", "mypy", "types-"))]
    return pins + tools


if __name__ == "__main__":
    sys.exit(main())
