"""The HTTP server's life: ports, hosts, start-up that fails, stopping with requests open, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from llmo.errors import EnvironmentProblem, InputError
from llmo.serve.server import HttpServer, is_loopback


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


APP = Starlette(routes=[Route("/", hello)])


def test_takes_a_free_port_and_gives_it_back() -> None:
    with HttpServer(APP) as server:
        assert httpx.get(server.url).text == "hello"
        port = server.port
    with HttpServer(APP, port=port) as again:
        assert again.port == port
    with pytest.raises(httpx.ConnectError):
        httpx.get(again.url)


def test_a_taken_port_is_named_with_who_has_it() -> None:
    with HttpServer(APP) as server, pytest.raises(EnvironmentProblem) as caught:
        HttpServer(APP, port=server.port)
    assert str(server.port) in caught.value.what
    assert f"pid {os.getpid()}" in caught.value.what
    assert "--port" in caught.value.hint


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_other_machines_are_kept_out_unless_allowed(host: str) -> None:
    with pytest.raises(InputError, match="other machines"):
        HttpServer(APP, host=host)


@pytest.mark.parametrize("port", [-1, 70000])
def test_a_port_is_a_port(port: int) -> None:
    with pytest.raises(InputError, match="not a port"):
        HttpServer(APP, port=port)


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))


def test_a_start_up_that_fails_is_raised_where_it_was_started() -> None:
    @asynccontextmanager
    async def broken(app: Starlette) -> AsyncIterator[None]:
        raise EnvironmentProblem("nothing to serve")
        yield

    server = HttpServer(Starlette(lifespan=broken))
    with pytest.raises(EnvironmentProblem):
        server.start()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_stopping_finishes_the_open_request() -> None:
    entered, go = threading.Event(), threading.Event()

    async def slow(request: Request) -> PlainTextResponse:
        entered.set()
        await asyncio.to_thread(go.wait, 60)
        return PlainTextResponse("done")

    server = HttpServer(Starlette(routes=[Route("/", slow)]))
    server.start()
    heard: list[str] = []
    asking = threading.Thread(target=lambda: heard.append(httpx.get(server.url, timeout=60).text))
    asking.start()
    assert entered.wait(60)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    go.set()
    stopping.join(60)
    asking.join(60)
    assert heard == ["done"]


def test_a_signal_ends_it_with_exit_code_zero() -> None:
    code = (
        "from starlette.applications import Starlette\n"
        "from llmo.serve.server import HttpServer\n"
        "server = HttpServer(Starlette())\n"
        "print(server.port, flush=True)\n"
        "server.run()\n"
        "print('left', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 404")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said == "left\n"
    assert process.returncode == 0
