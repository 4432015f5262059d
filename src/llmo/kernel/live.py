"""What the scheduler remembers of a job between two ticks, and what can be read off its directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llmo.errors import StorageError
from llmo.kernel import jobdir, service
from llmo.kernel.executor import Exit, Handle
from llmo.kernel.outcome import Ending
from llmo.plugins import Operation
from llmo.types import Device, Job, Placement

_EARNED_SECONDS = 60.0

Made = Future[tuple[str | None, dict[str, Any]]]


@dataclass(slots=True)
class Live:
    """A job whose worker runs. Times are of the monotonic clock, which stands still while the machine sleeps."""

    job: Job
    operation: Operation
    handle: Handle
    placement: Placement
    offset: int = 0  # bytes of its events that are in the store
    began_at: float = field(default_factory=time.time)
    beat: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    ready: float | None = None
    stopping: bool = False
    leaving: str = ""  # why, of an endpoint that was put to sleep and answers what it has
    silent: bool = False

    def has_pulse(self, limit: float) -> bool:
        """False when the worker has not touched its heartbeat for `limit` seconds."""
        try:
            beat = (self.handle.job_dir / jobdir.HEARTBEAT).stat().st_mtime
        except FileNotFoundError:
            beat = 0.0
        if beat != self.beat:
            self.beat, self.heard = beat, time.monotonic()
        return time.monotonic() - self.heard < limit

    def ending(self, end: Exit, *, interrupted: bool) -> Ending:
        """What the outcome is judged by, once the worker ended."""
        folder = self.handle.job_dir
        error = jobdir.read_json(folder / jobdir.ERROR)
        return Ending(
            end,
            error if isinstance(error, dict) else None,
            complete=jobdir.finished(folder, self.job.attempt) and jobdir.intact(folder),
            silent=self.silent,
            interrupted=interrupted,
            earned=self._earned(),
        )

    def _earned(self) -> bool:
        if self.job.service:
            return self.ready is not None and time.monotonic() - self.ready >= _EARNED_SECONDS
        saved = (self.handle.job_dir / jobdir.CHECKPOINT).rglob("*")
        return any(path.stat().st_mtime > self.began_at for path in saved)


@dataclass(slots=True)
class Publishing:
    """A job whose work is complete and goes into the catalog, which takes as long as the disk wants."""

    job: Job
    operation: Operation
    start: Callable[[], Made]
    future: Made
    again_at: float | None = None


def label(job: Job) -> str:
    """What a job is called in a sentence."""
    endpoint = service.endpoint_of(job)
    if endpoint is not None:
        return f"{'pinned ' if service.pinned(job) else ''}endpoint {endpoint} (job {job.id})"
    return f"job {job.id} ({job.op} {job.name})" if job.name else f"job {job.id} ({job.op})"


def device_for(devices: list[Device], placement: Placement) -> Device:
    """What a worker is told that it has: the first GPU it was granted, else the CPU, with its share of it, and as
    `free` all the memory that LLMO may use there: nothing holds a worker to its share."""
    cores = max(1, placement.cores)
    gpu = next((d for d in devices if d.name in placement.gpus), None)
    if gpu is not None:
        return Device(gpu.name, gpu.kind, gpu.memory, gpu.free, cores, features=gpu.features)
    cpu = next(d for d in devices if d.kind == "cpu")
    return Device(cpu.name, cpu.kind, placement.memory, cpu.memory, cores, features=cpu.features)


def passes(error: BaseException) -> bool:
    """Whether trouble is the disk's or the database's, so that the same step may succeed later."""
    return isinstance(error, OSError) or (isinstance(error, StorageError) and error.__cause__ is not None)
