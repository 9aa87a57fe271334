"""The example of a server (``scripts/serve.py``), under a short load; ``scripts/load_serve.py`` has the long one."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from minidiff import StableDiffusion, read_recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts import load_serve, serve  # noqa: E402


@pytest.fixture
def server(sd: StableDiffusion) -> Iterator[serve.Server]:
    server = load_serve.started(sd)
    yield server
    server.shutdown()
    server.server_close()


def counted(server: serve.Server, how: str, least: int) -> bool:
    until = time.monotonic() + 60
    while server.counts[how] < least and time.monotonic() < until:
        time.sleep(0.02)
    return server.counts[how] >= least


def test_the_example_is_short() -> None:
    assert len((ROOT / "scripts" / "serve.py").read_text().splitlines()) <= 200


def test_pictures(server: serve.Server, sd: StableDiffusion) -> None:
    body = {"prompt": "a red star", "n": 2, "seed": 3, "steps": 2, "size": "40x32", "model": "any"}
    found = [Image.open(io.BytesIO(png)) for png in load_serve.pictures(server.server_port, body)]
    wanted = sd.generate("a red star", num_images=2, seed=3, steps=2, width=40, height=32)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in wanted]
    assert [read_recipe(image)["seed"] for image in found] == [3, 4]


def test_a_stream(server: serve.Server) -> None:
    body = {"prompt": "a", "steps": 4, "stream": True, "partial_images": 2, "seed": 1}
    status, answer = load_serve.post(server.server_port, body)
    assert status == 200
    events = [part.splitlines() for part in answer.decode().strip().split("\n\n")]
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [name for name, _ in events] == [f"event: {kind}" for kind in kinds]
    told = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [one["type"] for one in told] == kinds
    assert [one.get("partial_image_index") for one in told] == [0, 1, None]
    assert len({one["b64_json"] for one in told}) == 3
    whole = load_serve.pictures(server.server_port, {"prompt": "a", "steps": 4, "seed": 1})
    assert base64.b64decode(told[-1]["b64_json"]) == whole[0]


@pytest.mark.parametrize("k", range(len(load_serve.BROKEN)))
def test_broken_requests(server: serve.Server, k: int) -> None:
    status, body = load_serve.BROKEN[k]
    got, answer = load_serve.post(server.server_port, body)
    assert got == status
    if status != 413:  # there the client may not have come to reading
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]
        assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 501),
        (b"POST /v1/elsewhere HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 404),
        (b"POST /v1/images/generations HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/images/generations HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411),
        (b"no http at all\r\n\r\n", 400),
    ],
)
def test_what_is_no_request(server: serve.Server, text: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as s:
        s.sendall(text)
        s.settimeout(30)
        answer = http.client.HTTPResponse(s)
        answer.begin()
        assert answer.status == status
        assert json.loads(answer.read())["error"]["type"]


def test_a_fault_inside_stays_inside(
    server: serve.Server, sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("/secret/place")

    with monkeypatch.context() as m:
        m.setattr(sd, "steps", fault)
        status, answer = load_serve.post(server.server_port, {"prompt": "a"})
    assert status == 500
    assert json.loads(answer)["error"]["type"] == "server_error"
    assert b"secret" not in answer
    assert "RuntimeError: /secret/place" in capsys.readouterr().err
    assert len(load_serve.pictures(server.server_port, {"prompt": "a", "steps": 1})) == 1, "it goes on"


def test_who_goes_is_not_waited_for(server: serve.Server) -> None:
    """While its run goes on, and in the queue."""
    body = {"prompt": "a", "steps": 150, "n": 4, "size": "256x256"}
    began = time.monotonic()
    away = [threading.Thread(target=load_serve.leave, args=(server.server_port, body, 0.3)) for _ in range(3)]
    for thread in away:
        thread.start()
    for thread in away:
        thread.join()
    assert counted(server, "cancelled", 3)
    assert server.counts["made"] == 0
    assert len(load_serve.pictures(server.server_port, {"prompt": "a", "steps": 1})) == 1
    assert time.monotonic() - began < 60


def test_a_full_queue(sd: StableDiffusion) -> None:
    server = load_serve.started(sd, waiting=1)
    gate = threading.Event()
    plain = serve.make
    serve.make = lambda *args: (gate.wait(60), plain(*args))[1]
    try:
        threads = []
        for waiting in (0, 1):
            threads.append(
                threading.Thread(target=load_serve.pictures, args=(server.server_port, {"prompt": "a", "steps": 1}))
            )
            threads[-1].start()
            until = time.monotonic() + 30
            while server.waiting.qsize() != waiting and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.2)
        status, answer = load_serve.post(server.server_port, {"prompt": "a", "steps": 1})
        assert status == 429
        assert json.loads(answer)["error"]["type"] == "rate_limit_error"
        gate.set()
        for thread in threads:
            thread.join()
        assert server.counts["made"] == 2
    finally:
        gate.set()
        serve.make = plain
        server.shutdown()
        server.server_close()


def test_nothing_is_lost(server: serve.Server) -> None:
    found = load_serve.load(server, 36, 12, steps=1)
    assert found == {"made": 12, "left": 12, "refused": 12}
    assert server.counts["made"] >= 13  # and the one that load waits for; who leaves may do so too late
    assert server.counts["failed"] <= 1  # a size that the model does not have is refused when its turn comes
    assert sum(server.counts.values()) <= 12 + 12 + 2
    assert server.waiting.empty()
