"""Recordings where there is no torch: ``minidiff parity compare``, ``assert_recording`` and the writer, in a process in
which importing anything but numpy and safetensors fails; and what importing the package costs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "recording_sd1.safetensors"

# Refuses every package but those that recordings need.
ALONE = """
import sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("minidiff", "numpy", "safetensors", "__main__"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refusing())
"""


def alone(code: str, cwd: Path) -> list[str]:
    """The lines that ``code`` prints in such a process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", ALONE + textwrap.dedent(code)]
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_command_compares_without_torch(tmp_path: Path) -> None:
    out = alone(
        f"""
        from minidiff import cli
        from minidiff.parity import Writer
        from minidiff.parity.values import open_recording
        with open_recording({str(FIXTURE)!r}) as old, Writer("new.safetensors", "port", layout="NHWC") as new:
            for stage, value in old.values.items():
                array = value.array()
                picture = array.ndim == 4 and array.dtype.kind == "f"
                new.add(stage, array.transpose(0, 2, 3, 1) if picture else array)
        print(cli.main(["parity", "compare", {str(FIXTURE)!r}, "new.safetensors", "--html", "r.html", "--quiet"]))
        print(cli.main(["parity", "compare", {str(FIXTURE)!r}, "new.safetensors", "--format", "json"]))
        print(cli.main(["parity", "compare", "no.safetensors", "new.safetensors"]))
        print("torch" in sys.modules)
        """,
        tmp_path,
    )
    statuses = [line for line in out if line in ("0", "1", "2", "True", "False")]
    assert statuses == ["0", "0", "2", "False"]
    assert any(line.startswith("equal: every value is equal at all ") for line in out)
    assert "equal: every value" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_assertion_needs_no_torch(tmp_path: Path) -> None:
    out = alone(
        f"""
        from minidiff import parity
        report = parity.assert_recording({str(FIXTURE)!r}, {str(FIXTURE)!r}, tolerance=2e-6)
        print(len(report.rows) > 200, parity.difference(1.0, 1.5).max_abs, "torch" in sys.modules)
        """,
        tmp_path,
    )
    assert out == ["True 0.5 False"]


def test_large_recordings_take_little_memory(tmp_path: Path) -> None:
    """Two of 256 MB each, of one stage; the files are holes, so nothing is written to the disk."""
    if sys.platform != "linux":
        pytest.skip("reads the peak of memory from /proc")
    out = alone(
        """
        import json
        from minidiff.parity.comparing import compare
        from minidiff.parity.values import open_recording
        from minidiff.parity.writer import VERSION
        def hollow(path, first):
            shape = [1, 64, 1024, 1024]
            told = {"recording.version": VERSION, "recording.stages": '["x"]', "recording.run": "{}"}
            header = {"__metadata__": told, "x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 28]}}
            text = json.dumps(header).encode()
            with open(path, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text + first)
                file.truncate(8 + len(text) + (1 << 28))
        hollow("a", b"")
        hollow("b", b"")
        hollow("c", bytes([0, 0, 128, 63]))
        for other in "bc":
            with open_recording("a") as a, open_recording(other) as b:
                print(compare(a, b).equal)
        with open("/proc/self/status") as status:
            print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) < 100_000)
        """,
        tmp_path,
    )
    assert out == ["True", "False", "True"]


def test_a_dump_of_torch_needs_it(tmp_path: Path) -> None:
    (tmp_path / "d.pt").write_bytes(b"\x80\x02}q\x00.")
    out = alone(
        """
        from minidiff import cli
        sys.stderr = sys.stdout
        cli.main(["parity", "compare", "d.pt", "d.pt"])
        """,
        tmp_path,
    )
    assert out == ["minidiff: error: d.pt: a file by torch.save, which needs torch; write a recording instead"]


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    """Not even numpy, which takes most of a tenth of a second."""
    out = alone(
        """
        import minidiff.parity
        print(sorted({"torch", "numpy", "safetensors"} & set(sys.modules)))
        from minidiff.parity import Writer, page, difference
        import minidiff.parity.difference, minidiff.parity.page
        print(callable(minidiff.parity.difference), callable(minidiff.parity.page), "torch" in sys.modules)
        """,
        tmp_path,
    )
    assert out == ["[]", "True True False"]
