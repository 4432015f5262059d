"""The server's life: started in the foreground or detached, found by its store's folder, stopped with its jobs kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from llmo.errors import ConflictError, EnvironmentProblem, LLMOError, NotFoundError, StorageError, from_json
from llmo.files import make_home, publish_json, storage_errors
from llmo.settings import Settings

if TYPE_CHECKING:
    from llmo.serve.server import HttpServer
    from llmo.system import System

RECORD = "server.json"
START_SECONDS = 60.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.05
WATCH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server of a store. `key` is only there in the answer of the start that made it."""

    url: str
    pid: int
    started: float
    key: str | None = None


def running_server(home: Path) -> Running | None:
    """The live server of the store in `home`, or None."""
    try:
        record = json.loads((home / RECORD).read_text())
        found = Running(record["url"], record["pid"], record["started"])
        alive = psutil.Process(found.pid).create_time() == found.started
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return found if alive else None


def serve(host: str, port: int, *, expose: bool = False, ready: Callable[[Running], None]) -> None:
    """Run the server until SIGTERM or Ctrl-C; `ready` hears its address, and the admin key if it was made now.

    Raises ConflictError when the store has a server already, EnvironmentProblem when the port is taken.
    """
    from llmo.doors.api import create_app  # FastAPI costs half a second that `llmo down` need not pay
    from llmo.serve.server import HttpServer
    from llmo.system import System

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    settings = Settings.from_environment()
    other = running_server(settings.home)
    if other is not None:
        raise ConflictError(f"a server runs on this store already, at {other.url}", hint="stop it with: llmo down")
    closing, gone = threading.Event(), threading.Event()
    try:
        with System(settings, embedded=False) as system:
            _run(
                system, HttpServer(create_app(system), host=host, port=port, allow_remote=expose), ready, closing, gone
            )
    except (OSError, LLMOError) as error:
        if not gone.is_set():
            raise
        logging.getLogger("llmo.server").info("while stopping: %s", error)
    if gone.is_set():
        raise StorageError(f"the store in {settings.home} was taken away while its server ran", hint="llmo up")


def _run(
    system: System, http: HttpServer, ready: Callable[[Running], None], closing: threading.Event, gone: threading.Event
) -> None:
    home = system.settings.home
    key = None
    if not any(k.role == "admin" and k.revoked_at is None for k in system.api_keys()):
        _, key = system.make_key("admin", "admin")
    found = Running(http.url, os.getpid(), psutil.Process().create_time(), key)
    publish_json(home / RECORD, {"url": found.url, "pid": found.pid, "started": found.started})
    try:
        system.url = http.url
        system.start()
        ready(found)
        threading.Thread(target=_watch, args=(home, closing, gone), name="llmo-home", daemon=True).start()
        http.run()
    finally:
        closing.set()
        (home / RECORD).unlink(missing_ok=True)


def _watch(home: Path, closing: threading.Event, gone: threading.Event) -> None:
    """Stop this process when its store is deleted or moved: whatever it did further would be lost."""
    before = _identity(home)
    while not closing.wait(WATCH_SECONDS):
        if _identity(home) != before:
            gone.set()
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _identity(home: Path) -> list[tuple[int, int]]:
    """Which folder and record these are, or nothing when one of them is not there."""
    try:
        return [(found.st_dev, found.st_ino) for found in (home.stat(), (home / RECORD).stat())]
    except OSError:
        return []


def start_detached(host: str, port: int, *, expose: bool = False) -> Running:
    """Start the server in the background; returns once it answers. Raises what its start raised."""
    settings = Settings.from_environment()
    make_home(settings.home)
    command = [sys.executable, "-m", "llmo.doors.cli", "up", "--json", "--host", host, "--port", str(port)]
    with storage_errors(settings.home / "server.log"), (settings.home / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *(["--expose"] if expose else [])],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    if process.stdout is None:
        raise EnvironmentProblem("the server's output cannot be read")
    line = process.stdout.readline()
    process.stdout.close()
    try:
        said = json.loads(line)
    except ValueError:
        raise EnvironmentProblem("the server did not start", hint=f"see {settings.home / 'server.log'}") from None
    if "error" in said:
        process.wait(START_SECONDS)
        raise from_json(said["error"])
    return Running(said["url"], said["pid"], said["started"], said["key"])


def stop(home: Path | None = None) -> int:
    """Ask the store's server to stop and wait until it has; returns its process id. Raises NotFoundError."""
    found = running_server(home or Settings.from_environment().home)
    if found is None:
        raise NotFoundError("no server runs on this store", hint="start one with: llmo up")
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(found.pid)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise LLMOError(f"the server (process {found.pid}) does not stop", hint=f"kill -9 {found.pid}")
            time.sleep(POLL_SECONDS)
    return found.pid


@contextlib.contextmanager
def serve_in_thread(system: System) -> Iterator[str]:
    """The HTTP API of a System in this process, on a free loopback port, for as long as the block lasts."""
    from llmo.doors.api import create_app  # see serve()
    from llmo.serve.server import HttpServer

    with HttpServer(create_app(system)) as http:
        yield http.url
