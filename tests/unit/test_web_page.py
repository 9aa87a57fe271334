"""scripts/web/serve.py: what its server gives out, and what --try makes of the report of a page.

The browser is a program of a few lines that reports what it is told to, but in the last test, which needs Chromium and
onnxruntime-web. What the page computes by itself is in test_export_web.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import minidiff
from minidiff.export.manifest import FORMAT, digests
from tests.support.scripts import script
from tests.tolerances import ELSEWHERE

WEB = Path(__file__).resolve().parents[2] / "scripts/web"
BROWSER = """#!{python}
import sys, time, urllib.request
if {ends}:
    sys.exit(3)
urllib.request.urlopen(sys.argv[-1].partition("?")[0] + "report", open({report!r}, "rb").read())
time.sleep(60)
"""


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    """The script as a module."""
    return script("web/serve")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder that says of itself to be an export of the bundled model, without its programs."""
    folder = tmp_path / "export"
    (folder / "plans").mkdir(parents=True)
    (folder / "plans/dpmpp_2m-2.json").write_text("{}")
    told = {"format": FORMAT, "to": "onnx", "family": "sd1", "model": minidiff.bundled().identity, "programs": {}}
    (folder / "manifest.json").write_text(
        json.dumps({**told, "files": digests(folder), "plans": ["plans/dpmpp_2m-2.json"]})
    )
    return folder


@pytest.fixture
def try_it(
    serve: ModuleType, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str | int | None]:
    """Try the page with a browser that reports what it is told; return what the script exits with, None for success."""

    def tried(report: Any = None, ends: bool = False, seconds: float = 60) -> str | int | None:
        (tmp_path / "report.json").write_text(json.dumps(report))
        browser = tmp_path / "browser"
        browser.write_text(
            BROWSER.format(python=sys.executable, ends=ends, report=str(tmp_path / "report.json")), "utf-8"
        )
        browser.chmod(0o755)
        monkeypatch.setattr(serve, "BROWSERS", (str(browser),))
        server = serve.started({"model": export}, 0)
        try:
            serve.try_once(server, export, seconds, tmp_path / "picture.png")
        except SystemExit as e:
            return e.code
        finally:
            server.shutdown()
            server.server_close()
        return None

    return tried


def test_what_the_server_gives(serve: ModuleType, tmp_path: Path) -> None:
    for name in ("ort/ort.wasm", "model/manifest.json", "secret"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    server = serve.started({"ort": tmp_path / "ort", "model": tmp_path / "model"}, 0)
    here = f"http://127.0.0.1:{server.server_port}"
    try:
        with urllib.request.urlopen(f"{here}/ort/ort.wasm") as answer:
            assert (answer.headers["Content-Type"], answer.read()) == ("application/wasm", b"ort/ort.wasm")
        for address, file in {"/": WEB / "index.html", "/page.js?report": WEB / "page.js"}.items():
            with urllib.request.urlopen(here + address) as answer:
                assert answer.read() == file.read_bytes()
        with urllib.request.urlopen(f"{here}/model/manifest.json") as answer:
            assert answer.read() == b"model/manifest.json"
        posted = urllib.request.Request(f"{here}/elsewhere", b"{}")
        for wrong in (f"{here}/model/../secret", f"{here}/model/%2e%2e/secret", f"{here}/secret", posted):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(wrong)
        assert not server.told.is_set()
        with urllib.request.urlopen(f"{here}/report", b'{"error": "none"}') as answer:
            assert answer.status == 204
        assert server.report == [{"error": "none"}]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(os.name != "posix", reason="the browser is a script")
def test_what_becomes_of_a_report(
    serve: ModuleType,
    export: Path,
    try_it: Callable[..., str | int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    want = serve.expected(export)
    monkeypatch.setattr(serve, "expected", lambda folder: want)
    latents, rgb = want["latents"].tolist(), want["picture"]
    canvas = [int(v) for row in rgb.reshape(-1, 3) for v in (*row, 255)]
    assert try_it({"latents": latents, "picture": canvas}) is None
    assert capsys.readouterr().out.splitlines() == [
        "latents differ by 0 of their largest value (bound 5e-05)",
        "the picture differs by 0 of 255 (bound 1)",
    ]
    assert (tmp_path / "picture.png").stat().st_size > 100
    most = max(map(abs, latents))
    assert try_it({"latents": [latents[0] + 1e-4 * most, *latents[1:]], "picture": canvas}) == (
        "serve: that is beyond the bound"
    )
    assert try_it({"latents": latents, "picture": [canvas[0] + (-2 if canvas[0] > 2 else 2), *canvas[1:]]}) == (
        "serve: that is beyond the bound"
    )
    assert try_it({"error": "no such file"}) == "serve: the page failed: no such file"
    assert "ended with status 3, before the page was drawn" in str(try_it(ends=True))
    assert ELSEWHERE.relative == serve.BOUND


def test_mistakes_are_one_line(
    serve: ModuleType, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*args: str | Path) -> str:
        done = subprocess.run([sys.executable, WEB / "serve.py", *args], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        return done.stderr

    assert "is no export: there is no manifest.json in it" in said(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm is not installed" in said(export, "--packages", tmp_path)
    (tmp_path / "node_modules/onnxruntime-web/dist").mkdir(parents=True)
    assert "no Chromium is installed" in said(export, "--packages", tmp_path, "--try")
    server = serve.started({}, 0)
    try:
        assert "name another one with --port" in said(export, "--packages", tmp_path, "--port", str(server.server_port))
    finally:
        server.shutdown()
        server.server_close()
    manifest = json.loads((export / "manifest.json").read_text())
    (export / "manifest.json").write_text(json.dumps({**manifest, "model": "another"}))
    with pytest.raises(SystemExit, match=r"takes an export of the bundled model: .* an export of another model"):
        serve.expected(export)


MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
MISSING += [] if shutil.which("chromium") else ["Chromium"]
MISSING += [] if (WEB / "node_modules/onnxruntime-web").is_dir() else ["onnxruntime-web (serve.py installs it)"]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_chromium_draws_the_same_picture(tmp_path: Path) -> None:
    """The bundled model through ONNX Runtime in the browser."""
    command = [sys.executable, "-m", "minidiff", "export", "bundled", "out", "--to", "onnx", "--plan", "dpmpp_2m:12"]
    env = {**os.environ, "PYTHONPATH": str(WEB.parents[1])}
    subprocess.run([*command, "--quiet"], cwd=tmp_path, env=env, check=True)
    command = [sys.executable, str(WEB / "serve.py"), str(tmp_path / "out"), "--try"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "latents differ by" in done.stdout
