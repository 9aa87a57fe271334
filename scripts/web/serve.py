"""Serve a page that draws in the browser, with ONNX Runtime, from an export of a model.

    minidiff export bundled ./shapes --to onnx --plan dpmpp_2m:12
    python scripts/web/serve.py ./shapes              # then open http://127.0.0.1:8000
    python scripts/web/serve.py ./shapes --try        # once in headless Chromium, against minidiff itself

onnxruntime-web is installed by npm into the folder of --packages when it is not there. The server listens on this
machine only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

HERE = Path(__file__).resolve().parent
PACKAGE = "onnxruntime-web@1.30.0"
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LARGEST = 64 << 20  # bytes of a report
PROMPT, SEED, SCALE, SIDE = "a large red star on a blue background", 3, 2.0, 64
BOUND = 1e-4  # of the latents' largest value: float32 kernels in another order, and other logarithms in the noise


class Handler(SimpleHTTPRequestHandler):
    """The page, the packages under /ort, and the export under /model; a report is put into the server's ``report``."""

    extensions_map: ClassVar[dict[str, str]] = {**SimpleHTTPRequestHandler.extensions_map, **TYPES}

    def __init__(self, *args: Any, roots: dict[str, Path], **options: Any) -> None:
        self.roots = roots
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        """Return the file of an address."""
        first = path.lstrip("/").split("/", 1)[0]
        self.directory = str(self.roots.get(first, HERE))
        return super().translate_path(path[len(first) + 1 :] if first in self.roots else path)

    def do_POST(self) -> None:
        """Take the report of a page that was opened with ?report."""
        length = int(self.headers.get("Content-Length", 0))
        if self.path != "/report" or not 0 < length <= LARGEST:
            self.send_error(404)
            return
        self.server.report.append(json.loads(self.rfile.read(length)))  # type: ignore[attr-defined]
        self.server.told.set()  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def installed(folder: Path) -> Path:
    """Return the folder of onnxruntime-web's files, installed first if need be."""
    found = folder / "node_modules/onnxruntime-web/dist"
    if not found.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            sys.exit("serve: npm is not installed; it fetches onnxruntime-web")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([npm, "install", "--silent", "--no-save", "--prefix", str(folder), PACKAGE], check=True)
    return found


def try_once(server: Any, export: Path, seconds: float) -> None:
    """Draw once in headless Chromium and with minidiff, and print how far they are apart."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("serve: no Chromium is installed")
    asked = urlencode({"prompt": PROMPT, "seed": SEED, "guidance": SCALE, "report": 1})
    address = f"http://127.0.0.1:{server.server_port}/?{asked}"
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
        ]
        child = subprocess.Popen([browser, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not server.told.wait(seconds):
                sys.exit(f"serve: the page did not report within {seconds:g} seconds")
        finally:
            child.kill()
            child.wait()
    found = server.report[0]
    if "error" in found:
        sys.exit(f"serve: the page failed: {found['error']}")
    print(f"latents differ by {difference(found['latents'], export):.3g} of their largest value (bound {BOUND:g})")


def difference(latents: list[float], export: Path) -> float:
    """Return the largest difference from what minidiff makes, relative to the largest value."""
    import torch

    import minidiff

    name, _, steps = Path(json.loads((export / "manifest.json").read_text())["plans"][0]).stem.rpartition("-")
    sd = minidiff.bundled(dtype=torch.float32)
    run = {"negative_prompt": "", "sampler": name, "steps": int(steps), "seed": SEED, "guidance_scale": SCALE}
    want = sd.generate(PROMPT, **run, height=SIDE, width=SIDE, output="latent").flatten()
    got = torch.tensor(latents)
    apart = ((got - want).abs().max() / want.abs().max()).item()
    if not apart <= BOUND:
        sys.exit(f"serve: the latents differ by {apart:.3g} of their largest value, beyond {BOUND:g}")
    return apart


def main() -> None:
    p = argparse.ArgumentParser(description="Serve a page that draws from an export, on this machine only.")
    p.add_argument("export", type=Path, help="the folder of an export --to onnx")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--packages", type=Path, default=HERE, help="where onnxruntime-web is, or is put (default: here)")
    p.add_argument("--try", dest="once", action="store_true", help="draw once in headless Chromium, and compare")
    p.add_argument("--seconds", type=float, default=600, help="how long --try waits (default: 600)")
    args = p.parse_args()
    if not (args.export / "manifest.json").is_file():
        sys.exit(f"serve: {args.export} is no export: there is no manifest.json in it")
    roots = {"ort": installed(args.packages), "model": args.export.resolve()}
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0 if args.once else args.port), partial(Handler, roots=roots))
    server.report, server.told = [], threading.Event()
    if not args.once:
        print(f"http://127.0.0.1:{server.server_port}")
        server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try_once(server, args.export, args.seconds)


if __name__ == "__main__":
    main()
