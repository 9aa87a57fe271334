"""Build a release: wheel, source archive, goldens, reference, contents and hashes, checked, in one folder.

    pip install build twine
    python scripts/make_release.py dist/ --install  # whole, and into an empty environment, with all that it needs
    python scripts/make_release.py dist/ --offline  # builds with the setuptools that is installed
    python scripts/make_release.py dist/ --quick    # of the files as they are now; twine only if it is there

The source is what git has committed at HEAD, so that nothing else can slip in; a changed file is an error. Checked are
twine's view of the metadata, that the wheel holds every file of both packages and nothing else, that the source archive
builds the same wheel content, and that the wheel runs by itself, unpacked as well as from the zip that it is.

The goldens (tests/fixtures/goldens) become a zip of their own, for the tests of other projects. contents.txt lists the
files in the archives, SHA256SUMS the hashes (`sha256sum -c SHA256SUMS`). Printed are the sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("minidiff", "weights_convert")
GOLDENS = "tests/fixtures/goldens"
LARGEST_GOLDEN = 3_000_000  # bytes of a family, as their README promises
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools takes sys.argv for itself
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""
RUN = """
import minidiff, sys
image = minidiff.bundled().generate("a red circle", steps=1, seed=0, progress=False)[0]
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
    with tarfile.open(fileobj=io.BytesIO(data)) as packed:
        unpack(packed, source)
    return source


def present(folder: Path) -> Path:
    """Copy the files that git knows, as they are now."""
    source = folder / "source"
    for name in call("git", "ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    return source


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack an archive, by the rule that lets no file out of ``folder`` where Python has it."""
    archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def build(source: Path, out: Path, offline: bool) -> tuple[Path, Path]:
    """Build wheel and source archive; return the paths of both."""
    if offline:
        out.mkdir(exist_ok=True)
        call(sys.executable, "-c", BUILD, out, cwd=source)
    else:
        call(sys.executable, "-m", "build", "--outdir", out, source)
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


def check(wheel: Path, archive: Path, source: Path, folder: Path, *, offline: bool, quick: bool) -> None:
    """Check what was built. Exits with what is wrong."""
    if quick and importlib.util.find_spec("twine") is None:
        print("not checked by twine, which is not installed")
    else:
        print(call(sys.executable, "-m", "twine", "check", "--strict", wheel, archive).strip())
    wrong = wrong_files(wheel, source)
    if wrong:
        sys.exit(f"{wheel.name} differs from the packages in {', '.join(wrong[:5])}")
    if not quick:
        with tarfile.open(archive) as packed:
            unpack(packed, folder / "again")
        (again,) = (folder / "again").iterdir()
        second, _ = build(again, folder / "second", offline)
        if content(second) != content(wheel):
            sys.exit(f"{archive.name} does not build the content of {wheel.name}")
        with zipfile.ZipFile(wheel) as zipped:
            zipped.extractall(folder / "site")
    for place in (wheel,) if quick else (folder / "site", wheel):
        made = call(sys.executable, "-c", RUN, cwd=folder, path=place)
        if not made.startswith(str(place)):
            sys.exit(f"another minidiff was imported: {made}")
        print(f"runs from {place.name}")


def install(wheel: Path, folder: Path) -> None:
    """Install the wheel with all that it needs into an empty environment, and use it there."""
    venv.create(folder / "empty", with_pip=True)
    binaries = folder / "empty" / ("Scripts" if os.name == "nt" else "bin")
    call(binaries / "python", "-m", "pip", "install", "--quiet", wheel)
    call(binaries / "minidiff", "generate", "a red circle", "--steps", "2", "--out", "circle.png", cwd=folder)
    made = call(binaries / "python", "-c", RUN, cwd=folder)
    print(f"runs where it was installed: {Path(made).relative_to(folder)}".rstrip())
    print(call(binaries / "python", ROOT / "scripts" / "measure_install.py").rstrip())


def pack_goldens(source: Path, out: Path, version: str) -> Path:
    """Zip the goldens; equal files give an equal zip. Exits if a family is larger than it may be."""
    files = sorted(path for path in (source / GOLDENS).rglob("*") if path.is_file())
    for family in sorted((source / GOLDENS).iterdir()):
        size = sum(path.stat().st_size for path in files if family in path.parents)
        if size > LARGEST_GOLDEN:
            sys.exit(f"{GOLDENS}/{family.name} has {size:,} bytes; at most {LARGEST_GOLDEN:,} are promised")
    packed = out / f"minidiff-goldens-{version}.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            name = zipfile.ZipInfo(f"goldens/{path.relative_to(source / GOLDENS).as_posix()}")  # of 1980, always
            name.compress_type, name.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(name, path.read_bytes())
    return packed


def listed(path: Path) -> Iterator[str]:
    """Return a line for each file in an archive, its size and its name."""
    if path.suffix == ".gz":
        with tarfile.open(path) as packed:
            found = [(one.size, one.name) for one in packed if one.isfile()]
    else:
        with zipfile.ZipFile(path) as file:
            found = [(one.file_size, one.filename) for one in file.infolist()]
    yield f"{path.name}: {len(found)} files, {sum(size for size, _ in found):,} bytes"
    yield from (f"{size:12,}  {name}" for size, name in sorted(found, key=lambda one: one[1]))


def sizes(paths: Sequence[Path]) -> None:
    """Print the size of each file, and write their hashes beside them."""
    lines = []
    for path in paths:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (paths[0].parent / "SHA256SUMS").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> int:
    """Build and check."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="FOLDER", type=Path, help="a new or empty folder")
    p.add_argument("--offline", action="store_true", help="build with the setuptools that is installed")
    p.add_argument("--quick", action="store_true", help="build the files as they are, offline, and check the least")
    p.add_argument("--install", action="store_true", help="install into an empty environment, and use it there")
    args = p.parse_args()
    offline = args.offline or args.quick
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        sys.exit(f"{args.out}: is not empty; name a new folder")
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        source = present(folder) if args.quick else committed(folder)
        wheel, archive = build(source, out, offline)
        check(wheel, archive, source, folder, offline=offline, quick=args.quick)
        if args.install:
            install(wheel, folder)
        goldens = pack_goldens(source, out, wheel.name.split("-")[1])
        call(sys.executable, source / "scripts" / "make_reference.py", out / "reference.html", path=source)
    lines = [line for path in (wheel, archive, goldens) for line in listed(path)]
    (out / "contents.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    sizes([wheel, archive, goldens, out / "reference.html", out / "contents.txt"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
