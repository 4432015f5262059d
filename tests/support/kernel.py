"""A scheduler over a store and real workers, driven tick by tick, for tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmo.kernel.local import LocalExecutor
from llmo.kernel.scheduler import Scheduler
from llmo.kernel.submit import submit
from llmo.store import Store
from llmo.types import Device, Event, Job
from support.ops import lookup

TESTS = str(Path(__file__).resolve().parent.parent)
DEVICES = [Device("cpu", "cpu", memory=4 << 30, free=4 << 30, cores=2)]
SECONDS = 60.0


def until(condition: Callable[[], Any], between: Callable[[], Any], what: str = "it to happen") -> Any:
    """The first true value of `condition`, with `between` called until then; fails after a minute."""
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        between()
    return value


class Kernel:
    """A store in `home` and the scheduler that owns it; leaving it shuts the scheduler down."""

    def __init__(self, home: Path, devices: Sequence[Device] = DEVICES, **options: Any) -> None:
        self.store = Store.open(home)
        self.devices = list(devices)
        self._closed = False
        self.executor = LocalExecutor({"PYTHONPATH": TESTS})
        self.scheduler = Scheduler(self.store, self.executor, devices, lookup=lookup, **({"grace": 5.0} | options))

    def submit(self, op: str, spec: Mapping[str, Any], inputs: Mapping[str, str] | None = None, **options: Any) -> Job:
        return submit(self.store, self.devices, op, spec, inputs or {}, lookup=lookup, **options)

    def job(self, job: Job | int) -> Job:
        return self.store.jobs.get(job if isinstance(job, int) else job.id)

    def tick(self) -> None:
        self.scheduler.tick()
        self.executor.wait(0.01)

    def until(self, condition: Callable[[], Any], what: str = "it to happen") -> Any:
        return until(condition, self.tick, what)

    def ended(self, job: Job) -> Job:
        """The job once it has ended."""
        self.until(lambda: self.job(job).state.ended, f"the end of {self.job(job)}")
        return self.job(job)

    def reached(self, job: Job, state: str) -> Job:
        self.until(lambda: self.job(job).state == state, f"{self.job(job)} to be {state}")
        return self.job(job)

    def noted(self, job: Job) -> str:
        """The first note of the job."""
        return str(self.until(lambda: self.events(job, "note"), "a note")[0].data["text"])

    def events(self, job: Job, kind: str) -> list[Event]:
        return [event for event in self.store.events.after(job=job.id) if event.kind == kind]

    def folder(self, job: Job) -> Path:
        return self.store.home / "jobs" / str(job.id)

    def crash(self) -> None:
        """Stop as kill -9 does: the workers die, nothing is written down."""
        self.executor.close()
        self.close(crashed=True)

    def close(self, *, crashed: bool = False) -> None:
        if not self._closed:
            self._closed = True
            if crashed:
                self.scheduler.lock.release()
            else:
                self.scheduler.shutdown()
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def lay_out(folder: Path, op: str, spec: Mapping[str, Any]) -> Path:
    """A job directory as staging makes it, for a worker without a store."""
    (folder / "out").mkdir(parents=True)
    (folder / "children").mkdir()
    device = {"name": "cpu", "kind": "cpu", "memory": 1 << 30, "free": 1 << 30, "cores": 1}
    body = {"job": 1, "attempt": 1, "op": op, "name": "", "target": lookup(op).target, "spec": spec, "inputs": {}}
    (folder / "spec.json").write_text(json.dumps(body | {"device": device}))
    return folder


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def marked(mark: str) -> list[int]:
    """Living processes with `mark` in their environment."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = Path(entry.path, "environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environment and alive(int(entry.name)):
                found.append(int(entry.name))
    return found
