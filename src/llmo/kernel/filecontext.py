"""The `Context` of a job in a worker process: everything it says becomes a line or a file in the job's directory."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmo.errors import SpecError
from llmo.kernel import jobdir
from llmo.types import Device, Needs, Result, from_json, to_json

PROGRESS_SECONDS = 0.1
HEARTBEAT_SECONDS = 2.0


class FileContext:
    """See `llmo.context.Context`. `ring` tells the scheduler at once that there is something to read."""

    def __init__(
        self, folder: Path, attempt: int, device: Device, ring: Callable[[], None] = lambda: None, after: str = ""
    ) -> None:
        self.device = device
        self.attempt = attempt
        self.after = after
        self.stopped = False  # whether the operation was told to stop
        self._folder = folder
        self._ring = ring
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pending: dict[str, Any] | None = None
        self._reported = 0.0
        self._keys: set[str] = set()
        self._closed = threading.Event()
        self._events = os.open(folder / jobdir.EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._beat()
        self._pulse = threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True)
        self._pulse.start()

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        line = {"step": step, "total": total, **{k: _finite(v) for k, v in metrics.items()}}
        with self._lock:
            # A newer line may replace one that says the same things, never one that says others.
            if self._pending is not None and set(self._pending) - set(line):
                self._flush()
            soon = time.monotonic() - self._reported < PROGRESS_SECONDS
            self._pending = line
            if not soon or set(line) != self._keys:
                self._flush()

    def note(self, message: str) -> None:
        self._say("note", {"text": message})

    def should_stop(self) -> bool:
        asked = self._stop.is_set() or (self._folder / jobdir.STOP).exists()
        self.stopped = self.stopped or asked
        return asked

    def checkpoint(self) -> Path:
        folder = self._folder / jobdir.CHECKPOINT
        folder.mkdir(exist_ok=True)
        return folder

    def cache(self) -> Path:
        folder = self._folder.parents[1] / jobdir.CACHE  # beside the folder of all jobs
        folder.mkdir(exist_ok=True)
        return folder

    def ready(self, address: str) -> None:
        self._say("ready", {"address": address})

    def spawn(
        self,
        key: str,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        name: str = "",
        needs: Needs | None = None,
    ) -> None:
        if not key or len(key) > 200:
            raise SpecError(f"a child's key has 1 to 200 characters, not {len(key)}")
        asked = {"key": key, "op": op, "spec": to_json(spec), "inputs": dict(inputs), "name": name}
        self._say("spawn", asked | ({"needs": to_json(needs)} if needs is not None else {}))

    def stop(self, key: str) -> None:
        self._say("stop", {"key": key})

    def result(self, key: str) -> Result | None:
        body = jobdir.read_json(jobdir.child_file(self._folder, key))
        return None if body is None else from_json(Result, body)

    def ask_to_stop(self) -> None:
        """What SIGTERM does."""
        self._stop.set()

    def close(self) -> None:
        """Write the last progress line; the heartbeat ends."""
        self._closed.set()
        self._pulse.join()
        with self._lock:
            self._flush()
        os.close(self._events)

    def _say(self, kind: str, data: Mapping[str, Any]) -> None:
        with self._lock:
            self._flush()
            self._write(kind, data)
        self._ring()

    def _flush(self) -> None:
        if self._pending is not None:
            self._keys = set(self._pending)
            self._reported = time.monotonic()
            line, self._pending = self._pending, None
            self._write("progress", line)

    def _write(self, kind: str, data: Mapping[str, Any]) -> None:
        line = json.dumps({"at": time.time(), "kind": kind, "data": data}, allow_nan=False, ensure_ascii=False) + "\n"
        rest = line.encode(errors="replace")  # half a surrogate pair cannot be stored
        while rest:  # a disk that fills up takes a part
            rest = rest[os.write(self._events, rest) :]

    def _keep_alive(self) -> None:
        beaten = time.monotonic()
        while not self._closed.wait(2 * PROGRESS_SECONDS):
            with self._lock:
                if time.monotonic() - self._reported >= PROGRESS_SECONDS:
                    self._flush()
            if time.monotonic() - beaten >= HEARTBEAT_SECONDS:
                beaten = time.monotonic()
                self._beat()

    def _beat(self) -> None:
        (self._folder / jobdir.HEARTBEAT).touch()


def _finite(value: float | str) -> float | str:
    """JSON has no word for nan and infinity; NumPy's numbers become Python's."""
    if isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
