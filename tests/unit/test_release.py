"""scripts/make_release.py in its quick form, from this checkout: what it builds, lists and hashes, and what it refuses;
and scripts/measure_install.py. tests/unit/test_packaging.py looks into the wheel."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from minidiff.version import VERSION
from tests.support.scripts import script

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    f"minidiff-{VERSION}-py3-none-any.whl",
    f"minidiff-{VERSION}.tar.gz",
    f"minidiff-goldens-{VERSION}.zip",
    "reference.html",
    "contents.txt",
]
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a release is made of a git checkout")


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return script("make_release")


@needs_git
@pytest.mark.slow
def test_a_release_of_this_checkout(tmp_path: Path) -> None:
    out = tmp_path / "dist"
    command = [sys.executable, str(ROOT / "scripts/make_release.py"), str(out), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "SHA256SUMS"])
    assert f"runs from {NAMES[0]}" in done.stdout, "the wheel is a zip that Python imports from"
    assert [line.split()[-1] for line in done.stdout.splitlines() if " MB  " in line] == NAMES

    told = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert told == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in NAMES}

    lists = (out / "contents.txt").read_text().splitlines()
    for wanted in (
        "minidiff/assets/shapes.safetensors",
        f"minidiff-{VERSION}/weights_convert/engine.py",
        f"minidiff-{VERSION}/LICENSE",
        "goldens/sd1/recording.safetensors",
    ):
        assert any(line.endswith(f"  {wanted}") for line in lists), wanted
    assert [line.split(":")[0] for line in lists if not line.startswith(" ")] == NAMES[:3]
    assert not any("__pycache__" in line or "/tests/" in line for line in lists)

    with zipfile.ZipFile(out / NAMES[2]) as packed:
        goldens = {name.removeprefix("goldens/"): packed.read(name) for name in packed.namelist()}
    here = ROOT / "tests/fixtures/goldens"
    assert goldens == {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}

    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "is not empty; name a new folder" in again.stderr


def test_goldens_are_packed_alike_and_only_if_they_are_small(release: ModuleType, tmp_path: Path) -> None:
    family = tmp_path / "tests/fixtures/goldens/sd9"
    family.mkdir(parents=True)
    (family / "recording.safetensors").write_bytes(bytes(1000))
    first = release.pack_goldens(tmp_path, tmp_path, "1").read_bytes()
    (family / "recording.safetensors").write_bytes(bytes(1000))  # at another time
    assert release.pack_goldens(tmp_path, tmp_path, "1").read_bytes() == first
    (family / "more").write_bytes(bytes(3_000_000))
    with pytest.raises(SystemExit, match=r"sd9 has 3,001,000 bytes; at most 3,000,000 are promised"):
        release.pack_goldens(tmp_path, tmp_path, "1")


def test_a_changed_file_is_not_released(release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "call", lambda *command: " M README.md\n")
    with pytest.raises(SystemExit, match=r"commit them first:\n M README.md"):
        release.committed(tmp_path)


def test_a_wheel_with_a_file_too_few_or_too_many(release: ModuleType, tmp_path: Path) -> None:
    for name in ("minidiff/a.py", "minidiff/b.py", "weights_convert/c.py", "minidiff/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("minidiff/a.py", "minidiff/a.py")
        wheel.writestr("minidiff/b.py", "otherwise")
        wheel.writestr("minidiff/secret", "")
        wheel.writestr("minidiff-1.dist-info/RECORD", "")
    assert release.wrong_files(tmp_path / "x.whl", tmp_path) == [
        "minidiff/b.py",
        "minidiff/secret",
        "weights_convert/c.py",
    ]


def test_the_room_that_an_install_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extras are followed where they are asked for, and nothing is counted twice."""
    measure = script("measure_install")
    known = {
        "minidiff": (10_000_000, ["torch>=2.6", "x; extra == 'test'"]),
        "torch": (2_000_000, ["kit[a,b]==1; platform_system == 'Linux'", "Loop_Back (>=1)"]),
        "kit": (0, ["one==1; extra == 'a'", "two; extra == 'c'"]),
        "loop-back": (300_000, ["torch", "not-there"]),
        "one": (4_000_000, []),
        "two": (500_000_000, []),
        "x": (500_000_000, []),
    }

    class Found(metadata.Distribution):
        def __init__(self, name: str) -> None:
            self.bytes, self.needs = known[name]
            self.place = tmp_path / name
            self.place.write_bytes(bytes(self.bytes))

        version = "1"

        @property
        def requires(self) -> list[str]:
            return self.needs

        @property
        def files(self) -> list[metadata.PackagePath]:
            return [metadata.PackagePath(name) for name in (self.place.name, self.place.name, "gone")]

        def locate_file(self, path: object) -> Path:
            return tmp_path / str(path)

        def read_text(self, filename: str) -> None:
            return None

    def distribution(name: str) -> Found:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return Found(name)

    monkeypatch.setattr(measure.metadata, "distribution", distribution)
    assert measure.main() == 0
    monkeypatch.setattr(measure, "SHOWN", 2)
    assert measure.main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:6] == [
        ["10.0", "MB", "minidiff", "1"],
        ["4.0", "MB", "one", "1"],
        ["2.0", "MB", "torch", "1"],
        ["0.3", "MB", "loop-back", "1"],
        ["0.0", "MB", "kit", "1"],
        ["16.3", "MB", "together"],
    ]
    assert lines[6:] == [*lines[:2], ["2.3", "MB", "3", "others"], lines[5]]
