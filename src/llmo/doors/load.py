"""Closed-loop load from a process of its own: N clients, each with one request in flight, on bare sockets.

It shares the machine with the server that it measures, so it is as light as Python gets (20 to 100 us of CPU a request;
every window tells its own): no event loop, no HTTP library, requests made before the clock runs.

`python -m llmo.doors.load` answers each line of standard input, an order, with one line, a window; it ends when
standard input does.
"""

from __future__ import annotations

import gc
import json
import math
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

from llmo.errors import LLMOError, UnreachableError

TICK = 0.2  # seconds between two looks at the clock for whoever shows progress
WARM = 0.5  # seconds of load before a window that are not counted
PATIENCE = 60.0  # seconds for the answers that are under way when a window ends
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Target:
    """Where JSON is posted to, with which key; the clients walk through `bodies`, each from a place of its own."""

    url: str
    key: str
    bodies: Sequence[str]


@dataclass(frozen=True, slots=True)
class Window:
    """What was answered in `seconds`: `latencies` (us, ascending) of answers with a 2xx status, `failed` the others by
    status, `closed` (no answer) or `late`, and what the first of them said. `cpu` is the load's own, in seconds."""

    seconds: float
    latencies: list[int]
    failed: dict[str, int] = field(default_factory=dict)
    said: str = ""
    cpu: float = 0.0

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, part: float) -> float | None:
        """Milliseconds within which `part` of the answers came; None without any."""
        if not self.latencies:
            return None
        return self.latencies[math.ceil(part * len(self.latencies)) - 1] / 1e3

    def figures(self) -> dict[str, Any]:
        """`requests_per_second`, `p50_ms`, `p95_ms`, `p99_ms`, `failed`, and `load_us` of CPU a request."""
        found = {f"p{part}_ms": self.percentile(part / 100) for part in (50, 95, 99)}
        asked = len(self.latencies) + sum(self.failed.values())
        return {
            "requests_per_second": round(self.requests_per_second, 1),
            **{name: None if value is None else round(value, 2) for name, value in found.items()},
            "failed": sum(self.failed.values()),
            "load_us": round(1e6 * self.cpu / asked, 1) if asked else None,
        }


def joined(windows: Sequence[Window]) -> Window:
    """Several windows of the same load as one."""
    failed: dict[str, int] = {}
    for window in windows:
        for why, count in window.failed.items():
            failed[why] = failed.get(why, 0) + count
    return Window(
        sum(window.seconds for window in windows),
        sorted(latency for window in windows for latency in window.latencies),
        failed,
        next((window.said for window in windows if window.said), ""),
        sum(window.cpu for window in windows),
    )


class Load:
    """The process. Nothing is left of it when the block ends, whatever it was doing."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for whoever asked
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def window(self, target: Target, clients: int, seconds: float, tick: Callable[[], None] = lambda: None) -> Window:
        """Load `target` with `clients`; `tick` is called a few times a second meanwhile. Raises UnreachableError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise self._died()
        order = {**asdict(target), "clients": clients, "seconds": seconds}
        try:
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not selector.select(TICK):
                tick()
        line = stdout.readline()
        if not line:
            raise self._died()
        found = json.loads(line)
        if "error" in found:
            raise UnreachableError(f"{target.url} cannot be loaded: {found['error']}", hint="see: llmo endpoints")
        return Window(**found)

    def _died(self) -> LLMOError:
        return LLMOError(f"the load's process ended with code {self._process.wait()}", hint="try it again")


class _Client:
    """One connection; sends the next request when the last is answered."""

    __slots__ = ("at", "buffer", "sent", "socket")

    def __init__(self, at: int) -> None:
        self.at = at
        self.buffer = b""
        self.sent = 0.0
        self.socket = socket.socket()

    def connect(self, place: tuple[str, int]) -> None:
        self.socket = socket.create_connection(place, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def heard(self) -> tuple[int, bytes] | None:
        """Status and body of the answer once it is whole; status 0 when the connection ended instead."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return 0, b""
        self.buffer = data = self.buffer + data if self.buffer else data
        end = data.find(_HEAD_END)
        if end < 0:
            return None
        size = _length(data[:end])
        if size is None:
            return 0, b"an answer without a content-length"
        if len(data) < end + 4 + size:
            return None
        self.buffer = b""
        return int(data[9:12]), data[end + 4 : end + 4 + size]


class _Drive:
    """One window: all clients behind one epoll."""

    def __init__(self, order: dict[str, Any]) -> None:
        place = urlsplit(order["url"])
        self._place = (place.hostname or "127.0.0.1", place.port or 80)
        self._requests = [_request(place.path, place.netloc, order["key"], body) for body in order["bodies"]]
        self._epoll = select.epoll()
        self._clients: dict[int, _Client] = {}
        self._latencies: list[int] = []
        self._failed: dict[str, int] = {}
        self._said = ""
        self._open = True
        for number in range(order["clients"]):
            self._join(_Client(number * len(self._requests) // order["clients"]))

    def run(self, seconds: float) -> dict[str, Any]:
        for client in list(self._clients.values()):
            self._send(client)
        self._until(time.perf_counter() + WARM)
        self._latencies.clear()
        self._failed.clear()
        self._said = ""
        began, cpu = time.perf_counter(), time.process_time()
        self._until(began + seconds)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        latencies, failed = sorted(self._latencies), dict(self._failed)
        self._open = False  # what is under way is still heard, so that the next window finds the server at rest
        self._until(time.perf_counter() + PATIENCE)
        if self._clients:
            failed["late"] = len(self._clients)
        for client in self._clients.values():
            client.socket.close()
        self._epoll.close()
        return asdict(Window(took, latencies, failed, self._said, cpu))

    def _until(self, end: float) -> None:
        poll, clients, now = self._epoll.poll, self._clients, time.perf_counter
        while clients and (left := end - now()) > 0:
            for number, _ in poll(min(left, 0.1)):
                client = clients[number]
                found = client.heard()
                if found is not None:
                    self._answered(client, *found)

    def _answered(self, client: _Client, status: int, body: bytes) -> None:
        if 200 <= status < 300:
            self._latencies.append(round((time.perf_counter() - client.sent) * 1e6))
        else:
            why = str(status) if status else "closed"
            self._failed[why] = self._failed.get(why, 0) + 1
            self._said = self._said or body[:500].decode("utf-8", "replace")
        if status == 0 or not self._open:
            self._leave(client)
        if self._open:
            if status == 0:
                self._join(client)
            self._send(client)

    def _send(self, client: _Client) -> None:
        data = self._requests[client.at % len(self._requests)]
        client.at += 1
        client.sent = time.perf_counter()
        with suppress(OSError):  # it is closed: the next recv says so, and that counts it
            client.socket.sendall(data)

    def _join(self, client: _Client) -> None:
        client.connect(self._place)
        self._clients[client.socket.fileno()] = client
        self._epoll.register(client.socket.fileno(), select.EPOLLIN)

    def _leave(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._epoll.unregister(client.socket.fileno())
        client.socket.close()


def _length(head: bytes) -> int | None:
    at = head.find(b"content-length:")
    if at < 0:
        head = head.lower()
        at = head.find(b"content-length:")
        if at < 0:
            return None
    end = head.find(b"\r\n", at)
    return int(head[at + 15 : end if end >= 0 else len(head)])


def _request(path: str, host: str, key: str, body: str) -> bytes:
    data = body.encode()
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, f"content-length: {len(data)}"]).encode() + _HEAD_END + data


def main() -> None:
    """Obey until standard input ends."""
    gc.disable()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            found = _Drive(order).run(order["seconds"])
        except OSError as error:
            found = {"error": str(error)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
