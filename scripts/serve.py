"""Example of a server: the OpenAI images endpoint, by the standard library alone.

    curl localhost:8000/v1/images/generations -d '{"prompt": "a red star", "n": 2, "size": "512x512"}'

POST /v1/images/generations takes prompt, n, size ("WIDTHxHEIGHT" or "auto"), response_format ("b64_json"), seed, steps,
and stream with partial_images (0 to 3): server-sent events then carry previews and every picture. One thread makes the
pictures, one request after the other; others wait in one queue. If a client goes, its run ends within one model call.
It listens on this machine only, and knows neither users nor encryption: put a server that does in front of it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import queue
import re
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import minidiff
from minidiff.console import say
from minidiff.pipeline import metadata, png

BODY, PROMPT, PICTURES, SIDE, STEPS, PARTIAL = 64 << 10, 4000, 4, 1024, 150, 3  # the most of each
PATH, ENDS = "/v1/images/generations", ("made", "cancelled", "failed")


class Refused(Exception):
    """An answer other than pictures: status, message, and the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Work:
    """A request in the queue. ``events`` gets previews, pictures or an error, and None at the end."""

    def __init__(self, request: minidiff.Request, partial: int, stream: bool) -> None:
        self.request, self.partial, self.stream = request, partial, stream
        self.gone, self.events = threading.Event(), queue.Queue[Any]()

    def put(self, kind: str, image: Any, recipe: Any = None, **others: int) -> None:
        texts = {} if recipe is None else {metadata.KEY: json.dumps(recipe)}
        image.save(file := io.BytesIO(), format="PNG", **metadata.options_for("PNG", texts, metadata.MADE))
        self.events.put({"type": kind, "b64_json": base64.b64encode(file.getvalue()).decode(), **others})


def read(body: bytes) -> Work:
    """Check a body, and return the work."""

    def check(ok: Any, name: str | None, rule: str) -> None:
        if not ok:
            raise Refused(400, f"{name or 'the body'} must be {rule}", name)

    def number(name: str, low: int, high: int, default: int | None = None) -> Any:
        value = asked.get(name, default)
        whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        check(value is default or whole, name, f"a whole number from {low} to {high}")
        return value

    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    check(isinstance(asked, dict), None, "a JSON object")
    prompt, size, stream = asked.get("prompt"), asked.get("size", "auto"), asked.get("stream", False)
    check(isinstance(prompt, str) and 0 < len(prompt) <= PROMPT, "prompt", f"a text of 1 to {PROMPT} characters")
    sides = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", str(size))
    width, height = map(int, sides.groups()) if sides else (None, None)
    fits = size == "auto" or (sides and max(width or 0, height or 0) <= SIDE)
    check(fits, "size", f"'auto' or WIDTHxHEIGHT, each at most {SIDE}")
    check(asked.get("response_format", "b64_json") == "b64_json", "response_format", "'b64_json'; no files are kept")
    check(isinstance(stream, bool), "stream", "true or false")
    n, steps, seed = number("n", 1, PICTURES, 1), number("steps", 1, STEPS, 50), number("seed", 0, 2**63 - 1)
    request = minidiff.Request(prompt, num_images=n, steps=steps, seed=seed, width=width, height=height)
    return Work(request, number("partial_images", 0, PARTIAL, 0) if stream else 0, stream)


def make(sd: minidiff.StableDiffusion, work: Work) -> None:
    """Make the previews and the pictures of a request."""
    run = sd.steps(work.request)
    shown = {len(run) * k // (work.partial + 1) - 1: k - 1 for k in range(1, work.partial + 1)}
    for k, step in enumerate(run):
        if work.gone.is_set():
            run.cancel()
        elif k in shown and step.x0 is not None:
            for image in png.to_pil(sd.decode(step.x0)):
                work.put("image_generation.partial_image", image, partial_image_index=shown[k])
    for image, recipe in zip(png.to_pil(sd.finish(run, progress=False)), run.recipes, strict=True):
        work.put("image_generation.completed", image, recipe)


class Server(ThreadingHTTPServer):
    """The server with its queue, and the thread that makes pictures. ``counts``: how many requests ended how."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, sd: minidiff.StableDiffusion, port: int = 0, waiting: int = 32) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.sd, self.waiting, self.counts = sd, queue.Queue[Work](waiting), dict.fromkeys(ENDS, 0)
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        while True:  # whoever is next
            work, result = self.waiting.get(), None
            try:
                if not work.gone.is_set():
                    make(self.sd, work)
            except minidiff.MinidiffError as e:
                result = Refused(400, str(e))
            except Exception as e:  # the server goes on, and the client learns nothing of its inside
                say(f"{type(e).__name__}: {e}", "error")
                result = Refused(500, "the server could not make this picture")
            self.counts["cancelled" if work.gone.is_set() else "failed" if result else "made"] += 1
            work.events.put(result)

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # a client goes


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"
    timeout, disable_nagle_algorithm = 30, True  # seconds for a client to send; nothing waits to be sent together

    def log_message(self, format: str, *args: Any) -> None: ...

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = True
        self.answer(code, Refused(code, message or "this is no request that can be answered").body)

    def answer(self, status: int, body: Any = None) -> None:
        """Send an answer, or without a body the beginning of a stream."""
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if data else "text/event-stream")
        self.send_header(*(("Content-Length", str(len(data))) if data else ("Cache-Control", "no-cache")))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != PATH or not re.fullmatch("[0-9]{1,9}", length) or int(length) > BODY:
            status = 404 if self.path != PATH else 413 if length.isdigit() else 411
            return self.send_error(status, f"POST a body of at most {BODY} bytes to {PATH}")
        try:
            self.server.waiting.put_nowait(work := read(self.rfile.read(int(length))))
            self.tell(work)
        except queue.Full:
            self.answer(429, Refused(429, "too many requests are waiting; try again later").body)
        except Refused as e:
            self.answer(e.status, e.body)

    def tell(self, work: Work) -> None:
        """Tell the client what becomes of its request; if it goes, end that."""
        done: list[dict[str, Any]] = []
        try:
            while (event := self.next(work)) is not None:
                failed = isinstance(event, Refused)
                if failed and not (work.stream and done):
                    raise event
                if work.stream and not done:
                    self.close_connection = True
                    self.answer(200)
                said = {"type": "error", **event.body} if failed else event
                done.append({"b64_json": said.get("b64_json")})
                line = f"event: {said['type']}\ndata: {json.dumps(said)}\n\n" if work.stream else ""
                self.wfile.write(line.encode())
                if failed:
                    return
        finally:
            work.gone.set()  # of no effect once the pictures are made
        if not work.stream:
            self.answer(200, {"created": int(time.time()), "data": done})

    def next(self, work: Work) -> Any:
        """Return what comes next of the work. Raises ConnectionAbortedError if the client has gone."""
        while True:
            try:
                return work.events.get(timeout=0.1)
            except queue.Empty:
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError from None


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a minidiff file (default: the bundled model)")
    p.add_argument("--port", type=int, default=8000)
    args = p.parse_args()
    with Server(minidiff.StableDiffusion.load(args.model) if args.model else minidiff.bundled(), args.port) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}{PATH}", flush=True)
        server.serve_forever()
