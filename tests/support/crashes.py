"""A real server that a test may kill -9 and start again, and what `/proc` says of the workers of its store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 240.0


def until(get: Callable[[], T], what: str, seconds: float = SECONDS, pause: float = 0.05) -> T:
    """The first true value of `get`, asked every `pause` seconds; fails with `what` when none comes in time."""
    deadline = time.monotonic() + seconds
    while not (value := get()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(pause)
    return value


class Server:
    """`llmo up` in the foreground of a process of its own, on a free port, as a user starts it."""

    def __init__(self, home: Path, **env: str) -> None:
        self.home, self.env = home, {**os.environ, "LLMO_HOME": str(home), **env}
        self.key, self.url, self.starts = "", "", 0
        self.start()

    def start(self) -> None:
        """Returns once it answers; its key is kept from the first start."""
        self.starts += 1
        said = self.home.with_name(f"up-{self.starts}.out")
        with said.open("wb") as out, said.with_suffix(".err").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmo.doors.cli", "up", "--port", "0", "--json"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self.env, start_new_session=True,
            )  # fmt: skip
        until(lambda: said.read_bytes().endswith(b"\n") or not self.alive, "the server to say that it is up", 60)
        text = said.read_text()
        assert self.alive, text + said.with_suffix(".err").read_text()
        answer = json.loads(text)
        self.url, self.key = answer["url"], answer["key"] or self.key

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self.process.terminate()
        return self.process.wait(90)

    def complaints(self) -> str:
        """What all starts wrote to standard error."""
        return "".join(p.read_text() for p in sorted(self.home.parent.glob("up-*.err")))


def workers(home: Path) -> dict[int, list[int]]:
    """Job -> the living processes that lead the session of one of its attempts."""
    return _of_jobs(home, leaders=True)


def members(home: Path) -> list[int]:
    """Every living process of any job of the store."""
    return [pid for found in _of_jobs(home, leaders=False).values() for pid in found]


def side_by_side(home: Path) -> list[Any]:
    """Jobs of which two attempts live at the same moment."""
    found = [(job, pids) for job, pids in workers(home).items() if len(pids) > 1]
    # One may have ended while the other began: only who is still there was there with it.
    return [(job, pids) for job, pids in found if all(_alive(pid) for pid in pids)]


def _of_jobs(home: Path, *, leaders: bool) -> dict[int, list[int]]:
    mark = f"LLMO_JOB_DIR={home.absolute()}/jobs/".encode()
    found: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes().split(b"\0")
            state, *numbers = _fields(int(entry.name))
        except (OSError, ValueError):
            continue
        job = next((line.removeprefix(mark) for line in environment if line.startswith(mark)), None)
        if job is not None and state not in "ZX" and (not leaders or int(numbers[2]) == int(entry.name)):
            found.setdefault(int(job), []).append(int(entry.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return _fields(pid)[0] not in "ZX"
    except OSError:
        return False


def _fields(pid: int) -> list[str]:
    """`/proc/PID/stat` from the state on: state, parent, group, session, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
