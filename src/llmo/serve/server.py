"""Runs an ASGI application on uvicorn: loopback by default, on any free port, in a thread or in the foreground."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator

import psutil
import uvicorn
from starlette.types import ASGIApp

from llmo.errors import EnvironmentProblem, InputError, LLMOError
from llmo.guard.slow import bounded

START_SECONDS = 60.0
_BACKLOG = 1024
_KEEP_ALIVE = 75  # seconds: longer than clients' own, so that they close first and never write to a closed one


class HttpServer:
    """One listening socket and the application behind it; the port is taken when this is made.

    `port` 0 means any free one; `url` says which. A host that other machines reach needs `allow_remote`. A
    request that has not arrived within `request_timeout` seconds (for bodies: that stalls for so long) is cut
    off. Raises EnvironmentProblem for a taken port, InputError for a host that is not allowed or not ours.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        allow_remote: bool = False,
        request_timeout: float = 10.0,
        connections: int = 2048,
        drain_seconds: float = 30.0,
    ) -> None:
        if not allow_remote and not is_loopback(host):
            raise InputError(
                f"'{host}' can be reached from other machines",
                hint="keep 127.0.0.1 and put a TLS proxy before it, or allow it explicitly",
            )
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=bounded(request_timeout),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                limit_concurrency=connections,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=int(drain_seconds),
            )
        )
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Serve in a background thread; returns once requests are answered. Raises what start-up raises."""
        self._thread = threading.Thread(target=self._in_thread, name="llmo-http", daemon=True)
        self._thread.start()
        if not self._server.up.wait(START_SECONDS) or self._failure is not None or not self._server.started:
            self.stop()
            raise self._problem()

    def run(self) -> None:
        """Serve in this thread until SIGTERM or SIGINT, or until `stop` is called; open requests are finished."""
        with _signals(self._server):
            self._serve()
        if not self._server.served:
            raise self._problem()

    def stop(self) -> None:
        """Accept nothing more, finish open requests, and return when that is done."""
        self._server.should_exit = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> HttpServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _in_thread(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a thread's own death would go unseen; `start` raises it again
            self._failure = error
        finally:
            self._server.up.set()

    def _serve(self) -> None:
        try:
            self._server.run([self._socket])
        except SystemExit:  # uvicorn's way to say that the application's start-up failed
            return
        finally:
            self._socket.close()

    def _problem(self) -> LLMOError:
        if isinstance(self._failure, LLMOError):
            return self._failure
        return EnvironmentProblem(
            f"the server could not start{f': {self._failure}' if self._failure else ''}", hint="see the log above"
        )


class _Server(uvicorn.Server):
    """Tells when it is up, and leaves signals to whoever runs it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()
        self.served = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.served = self.started
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _signals(server: _Server) -> Iterator[None]:
    """SIGTERM and SIGINT ask the server to stop; uvicorn's own handler would kill the process afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise EnvironmentProblem(
                f"the port {port} is taken{_holder(port)}", hint="stop it, or choose another one with --port"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise EnvironmentProblem(
                f"no permission to use the port {port}", hint="choose one above 1023 with --port"
            ) from None
        raise InputError(f"cannot listen on '{host}': {os.strerror(error.errno or 0)}", hint="use 127.0.0.1") from None
    except OverflowError:
        listener.close()
        raise InputError(f"{port} is not a port", hint="use a number from 0 to 65535") from None
    return listener


def _holder(port: int) -> str:
    """` by NAME (pid N)` when the system says who listens there, else an empty string."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, PermissionError):
        return ""
    return ""
