"""A headless Chromium, driven by its DevTools protocol with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 300.0  # seconds for an answer: the machine may be busy
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
)


def executable() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Socket:
    """Text messages over a WebSocket (RFC 6455), as a client on this machine."""

    def __init__(self, port: int, path: str) -> None:
        self.raw = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.left = b""
        key = base64.b64encode(os.urandom(16)).decode("ascii")
        lines = (
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        )
        self.raw.sendall("\r\n".join([*lines, "", ""]).encode())
        while b"\r\n\r\n" not in self.left:
            self.left += self._more()
        head, self.left = self.left.split(b"\r\n\r\n", 1)
        assert b" 101 " in head.split(b"\r\n")[0], head

    def send(self, text: str) -> None:
        """Send one message."""
        content, mask = text.encode(), os.urandom(4)
        size = len(content)
        short = size if size < 126 else 126 if size < 1 << 16 else 127
        head = bytes([0x81, 0x80 | short])
        head += b"" if short < 126 else struct.pack(">H", size) if short == 126 else struct.pack(">Q", size)
        masked = bytes(b ^ mask[k % 4] for k, b in enumerate(content))
        self.raw.sendall(head + mask + masked)

    def receive(self) -> str:
        """Return the next message, of one frame or several."""
        whole = b""
        while True:
            first, second = self._take(2)
            size = second & 0x7F
            if size > 125:
                size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
            content = self._take(size)
            assert first & 0x0F in (0, 1), f"frame of kind {first & 0x0F}: the browser went away"
            whole += content
            if first & 0x80:
                return whole.decode()

    def close(self) -> None:
        """Hang up."""
        self.raw.close()

    def _take(self, count: int) -> bytes:
        while len(self.left) < count:
            self.left += self._more()
        found, self.left = self.left[:count], self.left[count:]
        return found

    def _more(self) -> bytes:
        found = self.raw.recv(1 << 16)
        assert found, "the browser closed the connection"
        return found


class Page:
    """One tab. ``events``: what it told, (method, parameters) in order."""

    def __init__(self, connection: Socket) -> None:
        self.connection, self.count = connection, 0
        self.events: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.count += 1
        self.connection.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.receive())
            if message.get("id") == self.count:
                assert "error" not in message, f"{method}: {message['error']}"
                found: dict[str, Any] = message["result"]
                return found
            if "method" in message:
                self.events.append((message["method"], message["params"]))

    def run(self, script: str) -> Any:
        """Return the value of an expression; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            assert time.monotonic() < end, "the page does not finish loading"
            self.call("Runtime.evaluate", expression="0")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key, such as "ArrowLeft", where the focus is."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def troubles(self) -> list[str]:
        """Errors and warnings of the console since the page was opened, and requests for anything but the page."""
        found = []
        for method, p in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(p["exceptionDetails"])[:500])
            if method == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(p["args"])[:500])
            if method == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                found.append(p["entry"]["text"])
            if method == "Network.requestWillBeSent":
                address, kind = p["request"]["url"], p.get("type")
                if not address.startswith("data:") and not (address.startswith("file:") and kind == "Document"):
                    found.append(f"a request for {address[:200]}")
        return found


@contextmanager
def browser(path: str, folder: Path) -> Iterator[Page]:
    """Context with a tab of the Chromium at ``path``, without a network. ``folder``: for its profile."""
    command = [path, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    told = folder / "DevToolsActivePort"
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not told.is_file() or "\n" not in told.read_text():
            assert running.poll() is None, f"{path} ended with {running.returncode}"
            assert time.monotonic() < end, f"{path} does not start"
            time.sleep(0.1)
        port = int(told.read_text().split("\n")[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
            tabs = json.loads(answer.read())
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        connection = Socket(port, "/" + address.split("/", 3)[3])
        try:
            page = Page(connection)
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            nothing = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            page.call("Network.emulateNetworkConditions", offline=True, **nothing)
            yield page
        finally:
            connection.close()
    finally:
        running.terminate()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
