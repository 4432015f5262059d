"""One scheduler a store: a lock on a file that says who holds it, and that the kernel lets go when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from llmo.files import storage_errors
from llmo.kernel import jobdir


@dataclass(frozen=True, slots=True)
class Holder:
    """Who runs a store's jobs: a process of this machine, and the URL it answers at if it is a server."""

    pid: int
    url: str | None


class SchedulerLock:
    """`home/scheduler.lock`. Two locks on one file exclude each other in one process as in two."""

    def __init__(self, home: Path) -> None:
        self._path = home.absolute() / "scheduler.lock"
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def try_acquire(self, url: str | None = None) -> bool:
        """Take the lock if nobody has it; True when it is held after this."""
        if self._file is None:
            with storage_errors(self._path):
                file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            self._file = file
        self.announce(url)
        return True

    def announce(self, url: str | None) -> None:
        """Write down the URL that the holder answers at (a server knows its port only after it has bound it)."""
        if self._file is None:
            raise RuntimeError("the lock is not held")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"pid": os.getpid(), "url": url}).encode(), 0)

    def holder(self) -> Holder | None:
        """Who holds the lock now, this process or another; None when nobody does."""
        if self._file is None and not self._taken():
            return None
        body = jobdir.read_json(self._path)
        if not isinstance(body, dict):
            return Holder(0, None)  # taken this very moment
        return Holder(int(body.get("pid", 0)), body.get("url"))

    def release(self) -> None:
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def _taken(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False
