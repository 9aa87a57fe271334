"""Put scripts/serve.py under load: many requests at a time, of which a third are cancelled and a third are broken.

    python scripts/load_serve.py                      # 200 requests, 20 at a time
    python scripts/load_serve.py --requests 2000

Counted is what becomes of each: whole ones get all their pictures, broken ones an error of their kind; the server stops
for each that was cancelled. Printed besides: the memory of the server's process as it goes on, which must stay flat,
and what HTTP, JSON, PNG and the queue add to a picture (its time through the server, less that of ``generate``).
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import minidiff
from minidiff.console.progress import Counter as Bar
from scripts.serve import BODY, PATH, Server

PNG = b"\x89PNG\r\n\x1a\n"
BROKEN: list[tuple[int, Any]] = [  # the status that is expected, and the body
    (400, b"{"),
    (400, b"[1, 2]"),
    (400, b"\xff\xfe\x00"),
    (400, b"[" * 5000),
    (400, {}),
    (400, {"prompt": ""}),
    (400, {"prompt": 3}),
    (400, {"prompt": "a", "n": 0}),
    (400, {"prompt": "a", "n": True}),
    (400, {"prompt": "a", "n": 10**30}),
    (400, {"prompt": "a", "size": "9999x9999"}),
    (400, {"prompt": "a", "size": "63x64"}),
    (400, {"prompt": "a", "size": [64]}),
    (400, {"prompt": "a", "response_format": "url"}),
    (400, {"prompt": "a", "stream": "yes"}),
    (400, {"prompt": "a", "steps": 0}),
    (413, b"x" * (BODY + 1)),
]


def post(port: int, body: Any, timeout: float = 300) -> tuple[int, bytes]:
    """Send a body; return the status and the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", PATH, data)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (BrokenPipeError, ConnectionResetError):
        return 413, b'{"error": {"message": "refused before it was read"}}'
    finally:
        connection.close()


def pictures(port: int, body: dict[str, Any]) -> list[bytes]:
    """Send a request until there is room in the queue; return its pictures, previews included."""
    while True:
        status, answer = post(port, body)
        if status != 429:
            break
        time.sleep(0.05)
    if status != 200:
        raise AssertionError(f"{status}: {answer[:300]!r}")
    if body.get("stream"):
        lines = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
        return [base64.b64decode(json.loads(line)["b64_json"]) for line in lines]
    return [base64.b64decode(one["b64_json"]) for one in json.loads(answer)["data"]]


def leave(port: int, body: dict[str, Any], after: float) -> None:
    """Send a request and close the connection soon after, without reading the answer."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as s:
        head = f"POST {PATH} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        s.sendall(head + data)
        time.sleep(after)


def one(port: int, k: int, steps: int) -> str:
    """Make request number ``k`` and return what became of it. Raises AssertionError for what should not."""
    if k % 3 == 1:
        leave(port, {"prompt": "a red star", "steps": 50 * steps, "n": 4}, 0.02 * (k % 5))
        return "left"
    if k % 3 == 2:
        wanted, body = BROKEN[(k // 3) % len(BROKEN)]
        status, answer = post(port, body)
        error = json.loads(answer)["error"]
        assert status in (wanted, 429), (status, wanted, body if len(str(body)) < 100 else "long")
        assert error["message"]
        assert "Traceback" not in error["message"]
        return "refused"
    n, partial = 1 + k % 2, k // 3 % 3
    body = {"prompt": "a red star", "steps": steps, "n": n, "seed": k}
    body |= {"stream": True, "partial_images": partial} if k % 6 == 3 else {}
    got = pictures(port, body)
    assert all(png.startswith(PNG) for png in got)
    assert len(got) == (n * (1 + min(partial, max(0, steps - 1))) if "stream" in body else n), (len(got), body)
    return "made"


def load(server: Server, requests: int, at_once: int, steps: int, show: bool = False) -> Counter[str]:
    """Send the requests, wait until the queue is empty, and return what became of them."""
    with ThreadPoolExecutor(at_once) as pool, Bar(requests, "request", show=show) as bar:

        def run(k: int) -> str:
            found = one(server.server_port, k, steps)
            bar.count()
            return found

        found = Counter(pool.map(run, range(requests)))
    until = time.monotonic() + 60
    while server.waiting.qsize() and time.monotonic() < until:
        time.sleep(0.05)
    pictures(server.server_port, {"prompt": "a star", "steps": 1})  # whatever was at work has ended
    return found


def started(sd: minidiff.StableDiffusion, waiting: int = 32) -> Server:
    """Start a server on a free port."""
    server = Server(sd, waiting=waiting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def overhead(server: Server, count: int = 30) -> float:
    """Return the seconds that a request adds to a picture: medians of pairs, one after the other."""
    body, request = {"prompt": "a red star", "steps": 1, "seed": 0}, minidiff.Request("a red star", steps=1, seed=0)
    more = []
    for _ in range(count):
        began = time.perf_counter()
        server.sd.generate(request, progress=False)
        between = time.perf_counter()
        pictures(server.server_port, body)
        more.append(time.perf_counter() - between - (between - began))
    return statistics.median(more)


def resident() -> int:
    """Return the bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> int:
    """Run and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=200)
    p.add_argument("--at-once", type=int, default=20)
    p.add_argument("--steps", type=int, default=2)
    args = p.parse_args()
    server = started(minidiff.bundled())
    load(server, 30, args.at_once, args.steps)
    print(f"overhead of a request: {1e3 * overhead(server):.2f} ms")
    before = resident()
    for k in range(2):
        began = time.monotonic()
        found = load(server, args.requests, args.at_once, args.steps, show=True)
        seconds = time.monotonic() - began
        print(f"round {k + 1}: {dict(found)} in {seconds:.1f} s; memory {(resident() - before) / 1e6:+.1f} MB")
    print(f"the server counts {server.counts}")
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
