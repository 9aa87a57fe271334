"""Build a release: wheel, source archive, reference and hashes, checked, in one folder.

    pip install build twine
    python scripts/make_release.py dist/            # builds in environments of its own, which fetches setuptools
    python scripts/make_release.py dist/ --offline  # builds with the setuptools that is installed

The source is what git has committed at HEAD, so that nothing else can slip in; a changed file is an error. Checked are
twine's view of the metadata, that the wheel holds every file of both packages and nothing else, that the source archive
builds the same wheel content, and that the wheel runs by itself, unpacked as well as from the zip that it is.
SHA256SUMS names the hashes. Printed are the sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("minidiff", "weights_convert")
RUN = """
import minidiff, sys
image = minidiff.bundled().generate("a red star", steps=1, seed=0, progress=False)[0]
print(minidiff.__file__, image.size)
"""


def call(*command: str | Path, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run a command and return what it prints. Exits with its output if it fails."""
    env = dict(os.environ) if path is None else {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def committed(folder: Path) -> Path:
    """Unpack what is committed. Exits if a tracked file was changed."""
    changed = call("git", "status", "--porcelain", "--untracked-files=no")
    if changed:
        sys.exit(f"these files differ from what is committed; commit them first:\n{changed}")
    data = subprocess.run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    source = folder / "source"
    source.mkdir()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(source, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(source)
    return source


def build(source: Path, out: Path, offline: bool) -> tuple[Path, Path]:
    """Build source archive and wheel; return the paths of both."""
    here = ["--no-isolation"] if offline else []
    call(sys.executable, "-m", "build", "--outdir", out, *here, source)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


def content(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel, but for those that describe it."""
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if ".dist-info/" not in name}


def wrong_files(wheel: Path, source: Path) -> list[str]:
    """Return the names of files that a wheel lacks, has too much, or has otherwise than ``source``."""
    wanted = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = content(wheel)
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def check(wheel: Path, archive: Path, source: Path, folder: Path, offline: bool) -> None:
    """Check what was built. Exits with what is wrong."""
    print(call(sys.executable, "-m", "twine", "check", "--strict", wheel, archive).strip())
    wrong = wrong_files(wheel, source)
    if wrong:
        sys.exit(f"{wheel.name} differs from the packages in {', '.join(wrong[:5])}")
    with tarfile.open(archive) as file:
        file.extractall(folder / "again", filter="data") if hasattr(tarfile, "data_filter") else file.extractall(
            folder / "again"
        )
    (again,) = (folder / "again").iterdir()
    second, _ = build(again, folder / "second", offline)
    if content(second) != content(wheel):
        sys.exit(f"{archive.name} does not build the content of {wheel.name}")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    for place in (folder / "site", wheel):
        made = call(sys.executable, "-c", RUN, cwd=folder, path=place)
        if not made.startswith(str(place)):
            sys.exit(f"another minidiff was imported: {made}")
        print(f"runs from {place.name}")


def sizes(paths: Sequence[Path]) -> None:
    """Print the size of each file, and write their hashes beside them."""
    lines = []
    for path in paths:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (paths[0].parent / "SHA256SUMS").write_text("".join(lines))


def main() -> int:
    """Build and check."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="FOLDER", type=Path, help="a new or empty folder")
    p.add_argument("--offline", action="store_true", help="build with the setuptools that is installed")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        sys.exit(f"{args.out}: is not empty; name a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = committed(folder)
        wheel, archive = build(source, args.out.resolve(), args.offline)
        check(wheel, archive, source, folder, args.offline)
        reference = args.out.resolve() / "reference.html"
        call(sys.executable, source / "scripts" / "make_reference.py", reference, path=source)
        sizes([wheel, archive, reference])
    return 0


if __name__ == "__main__":
    sys.exit(main())
