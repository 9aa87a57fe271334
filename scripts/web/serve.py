"""Serve a page that draws in the browser, with ONNX Runtime, from an export of a model.

    minidiff export bundled ./shapes --to onnx --plan dpmpp_2m:12
    python scripts/web/serve.py ./shapes              # then open http://127.0.0.1:8000
    python scripts/web/serve.py ./shapes --try --picture star.png   # once in headless Chromium, against minidiff itself

onnxruntime-web is installed by npm into the folder of --packages when it is not there. The server listens on this
machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
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
BOUND = 5e-5  # of the latents' largest value: float32 kernels in another order, and other logarithms in the noise
LEVELS = 1  # of 255 in the picture, for the same reason: a value near a half rounds the other way


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
        command = [npm, "install", "--silent", "--no-save", "--prefix", str(folder), PACKAGE]
        if subprocess.run(command, check=False).returncode or not found.is_dir():
            sys.exit(f"serve: npm could not install {PACKAGE} into {folder}")
    return found


def started(roots: dict[str, Path], port: int) -> Any:
    """Start the server in a thread of its own. Port 0: one that is free."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, roots=roots))
    server.report, server.told = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def try_once(server: Any, export: Path, seconds: float, picture: Path | None) -> None:
    """Draw once in headless Chromium and with minidiff, and print how far they are apart."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("serve: no Chromium is installed")
    want = expected(export)
    asked = urlencode({"prompt": PROMPT, "seed": SEED, "guidance": SCALE, "report": 1})
    address = f"http://127.0.0.1:{server.server_port}/?{asked}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command = [browser, *options, "--remote-debugging-port=0", address]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + seconds
        try:
            while not server.told.wait(0.2):
                if child.poll() is not None:
                    sys.exit(f"serve: {browser} ended with status {child.returncode}, before the page was drawn")
                if time.monotonic() > until:
                    sys.exit(f"serve: the page did not report within {seconds:g} seconds")
        finally:
            child.kill()
            child.wait()
    found = server.report[0]
    if "error" in found:
        sys.exit(f"serve: the page failed: {found['error']}")
    compare(found, want, picture)


def expected(export: Path) -> dict[str, Any]:
    """Return the latents and the picture, (H, W, 3) in 0..255, that minidiff makes with the plan of the export."""
    import numpy as np
    import torch

    import minidiff
    from minidiff.export import open_export

    sd = minidiff.bundled(dtype=torch.float32)
    try:
        manifest = open_export(export)
        manifest.require(sd.identity)
    except minidiff.MinidiffError as e:
        sys.exit(f"serve: --try takes an export of the bundled model: {e}")
    name, _, steps = Path(manifest.manifest["plans"][0]).stem.rpartition("-")
    run = {"negative_prompt": "", "sampler": name, "steps": int(steps), "seed": SEED, "guidance_scale": SCALE}
    made = {kind: sd.generate(PROMPT, **run, height=SIDE, width=SIDE, output=kind) for kind in ("latent", "pil")}
    return {"latents": made["latent"].flatten().numpy(), "picture": np.asarray(made["pil"][0]).astype(int)}


def compare(found: dict[str, Any], want: dict[str, Any], picture: Path | None) -> None:
    """Print how far what the page drew is from what was expected, and exit if that is beyond a bound."""
    import numpy as np
    from PIL import Image

    latents = np.array(found["latents"], np.float32)
    canvas = np.array(found["picture"], np.uint8).reshape(SIDE, SIDE, 4)[..., :3]
    if picture is not None:
        Image.fromarray(canvas).save(picture)
    gap = float(np.abs(latents - want["latents"]).max() / np.abs(want["latents"]).max())
    levels = int(np.abs(canvas.astype(int) - want["picture"]).max())
    print(f"latents differ by {gap:.3g} of their largest value (bound {BOUND:g})")
    print(f"the picture differs by {levels} of 255 (bound {LEVELS})")
    if not (gap <= BOUND and levels <= LEVELS):
        sys.exit("serve: that is beyond the bound")


def main() -> None:
    p = argparse.ArgumentParser(description="Serve a page that draws from an export, on this machine only.")
    p.add_argument("export", type=Path, help="the folder of an export --to onnx")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--packages", type=Path, default=HERE, help="where onnxruntime-web is, or is put (default: here)")
    p.add_argument("--try", dest="once", action="store_true", help="draw once in headless Chromium, and compare")
    p.add_argument("--picture", metavar="FILE", type=Path, help="with --try, where to put what the page drew")
    p.add_argument("--seconds", type=float, default=600, help="how long --try waits (default: 600)")
    args = p.parse_args()
    if not (args.export / "manifest.json").is_file():
        sys.exit(f"serve: {args.export} is no export: there is no manifest.json in it")
    roots = {"ort": installed(args.packages), "model": args.export.resolve()}
    try:
        server = started(roots, 0 if args.once else args.port)
    except OSError as e:
        sys.exit(f"serve: port {args.port}: {e.strerror}; name another one with --port")
    if args.once:
        try_once(server, args.export, args.seconds, args.picture)
        return
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
