"""Half-sent requests against a real server: cut off when they stall, left alone while they move."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from llmo.guard import slow
from llmo.serve import server
from llmo.serve.server import HttpServer

PATIENCE = 0.3


async def size(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(scope="module")
def site() -> Iterator[HttpServer]:
    with HttpServer(Starlette(routes=[Route("/", size, methods=["GET", "POST"])]), request_timeout=PATIENCE) as running:
        yield running


def connect(site: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", site.port), timeout=60)


def until_closed(connection: socket.socket) -> bytes:
    """What the server still says before it closes; a test that hangs here fails by the socket's timeout."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            said += part
    return said


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-y: ",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET / HT",
    ],
)
def test_a_request_that_never_comes_is_cut_off(site: HttpServer, sent: bytes) -> None:
    with connect(site) as connection:
        connection.sendall(sent)
        said = until_closed(connection)
    assert said == b"" or b"408" in said or said.startswith(b"HTTP/1.1 200")


def test_trickled_headers_do_not_buy_time(site: HttpServer) -> None:
    with connect(site) as connection:
        connection.setblocking(False)
        until = time.monotonic() + 60
        closed = False
        connection.send(b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ")
        while not closed and time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                try:
                    connection.send(b"a")
                    connection.recv(100)
                    closed = True
                except (BrokenPipeError, ConnectionResetError):
                    closed = True
            time.sleep(0.01)
    assert closed


def test_endless_headers_are_refused_before_they_fill_memory(site: HttpServer) -> None:
    with connect(site) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-long: ")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(1024):  # far more than what the kernel holds for a server that has stopped reading
                connection.sendall(b"a" * (64 << 10))
            pytest.fail("64 MiB of headers were taken")
        with contextlib.suppress(ConnectionResetError):
            said = connection.recv(4096)
            assert said == b"" or said.startswith(b"HTTP/1.1 431")


def test_a_body_that_keeps_moving_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "bounded", lambda timeout: slow.bounded(timeout, slowest=10))
    app = Starlette(routes=[Route("/", size, methods=["POST"])])
    with HttpServer(app, request_timeout=0.2) as site, connect(site) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2000\r\n\r\n")
        until = time.monotonic() + 1.0  # five times what a stalled one gets
        sent = 0
        while time.monotonic() < until and sent < 1900:
            connection.sendall(b"x" * 20)
            sent += 20
            time.sleep(0.01)
        connection.sendall(b"x" * (2000 - sent))
        assert until_closed(connection).endswith(b"2000")


def test_requests_that_come_whole_share_a_connection(site: HttpServer) -> None:
    with httpx.Client(base_url=site.url) as client:
        for n in (0, 10, 200_000):
            assert client.post("/", content=b"x" * n).text == str(n)


def test_pipelined_requests_are_all_answered(site: HttpServer) -> None:
    one = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    with connect(site) as connection:
        connection.sendall(one * 3)
        said = b""
        while said.count(b"HTTP/1.1 200") < 3:
            part = connection.recv(4096)
            assert part
            said += part
