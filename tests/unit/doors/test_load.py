"""The load against a server that counts what it is asked, answers in pieces, refuses and hangs up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import psutil
import pytest

from llmo.doors.load import WARM, Load, Target, Window, joined
from llmo.errors import UnreachableError

DELAY = 0.01


class Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: ClassVar[Counter[str]] = Counter()
    keys: ClassVar[set[str | None]] = set()
    connections: ClassVar[set[tuple[str, int]]] = set()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen[body["text"]] += 1
        self.keys.add(self.headers["authorization"])
        self.connections.add(self.client_address)
        if body["text"] == "hang up":
            self.close_connection = True
            return
        time.sleep(DELAY)
        answer = b'{"error": {"what": "too many"}}' if body["text"] == "refuse" else b'{"answers": [1]}'
        self.send_response(429 if body["text"] == "refuse" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        for start in range(0, len(answer), 5):
            self.wfile.write(answer[start : start + 5])
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    server.daemon_threads = True
    Asked.seen, Asked.keys, Asked.connections = Counter(), set(), set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/predict"
    server.shutdown()
    thread.join()
    server.server_close()


def target(url: str, *texts: str) -> Target:
    return Target(url, "secret", [json.dumps({"text": text}) for text in texts])


def test_every_client_has_one_request_in_flight_and_all_are_counted(url: str) -> None:
    ticks: list[float] = []
    with Load() as load:
        window = load.window(target(url, "one", "two", "thrée"), 4, 0.6, lambda: ticks.append(time.monotonic()))
    assert not window.failed
    assert ticks
    assert len(Asked.connections) == 4
    assert {"Bearer secret"} == Asked.keys
    assert set(Asked.seen) == {"one", "two", "thrée"}
    seen = sum(Asked.seen.values())
    counted = len(window.latencies) * (0.6 + WARM) / 0.6  # those of the warming are not
    assert counted == pytest.approx(seen, rel=0.25)
    assert window.requests_per_second < 4 / DELAY
    assert window.latencies == sorted(window.latencies)
    assert window.latencies[0] >= DELAY * 1e6
    assert 0 < window.cpu < 0.6


def test_what_fails_is_counted_by_its_reason(url: str) -> None:
    with Load() as load:
        window = load.window(target(url, "one", "refuse", "hang up"), 2, 0.4)
    assert set(window.failed) == {"429", "closed"}
    assert window.latencies
    assert json.loads(window.said)["error"]["what"] == "too many"
    assert window.figures()["failed"] == sum(window.failed.values())
    assert len(Asked.connections) > 2


def test_nobody_there_is_said(url: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{probe.getsockname()[1]}/predict"
    with Load() as load:
        with pytest.raises(UnreachableError, match="refused"):
            load.window(target(gone, "one"), 2, 0.2)
        assert load.window(target(url, "one"), 1, 0.2).latencies


def test_nothing_is_left_of_it_whatever_it_was_doing(url: str) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), Load() as load:
        load.window(target(url, "one"), 2, 600.0, stop)
    assert set(psutil.Process().children()) == before


def test_figures() -> None:
    window = joined([Window(1.0, [1000, 3000], {"429": 1}, "no", 0.001), Window(1.0, [2000, 4000], {}, "", 0.001)])
    assert window.latencies == [1000, 2000, 3000, 4000]
    figures = window.figures()
    assert figures == {
        "requests_per_second": 2.0, "p50_ms": 2.0, "p95_ms": 4.0, "p99_ms": 4.0, "failed": 1, "load_us": 400.0,
    }  # fmt: skip
    assert Window(1.0, []).figures()["p99_ms"] is None
