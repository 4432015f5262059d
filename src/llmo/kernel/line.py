"""The line of queued jobs: who may start now and with what, who is done already, and why the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from llmo.kernel import service
from llmo.kernel.live import Live, label
from llmo.kernel.placement import Running, Wait, place
from llmo.plugins import Operation
from llmo.store import Store
from llmo.types import Device, Job, Placement

_PATIENCE_SECONDS = 30.0
_ELSEWHERE = "another command works in this store, on its own jobs only; this goes on after it, or with `llmo up`"


@dataclass(frozen=True, slots=True)
class Twin:
    """A done job whose result is this job's too."""

    job: Job


class Line:
    """Oldest first. A later job may overtake one that does not fit, but not for ever."""

    def __init__(self, store: Store, devices: Sequence[Device], allowed: Callable[[Job], bool]) -> None:
        self._store = store
        self._devices = devices
        self._allowed = allowed
        self._done: set[str] = set()  # cache keys of what was done while others waited
        self._deaths: dict[int, int] = {}  # of services, in a row
        self._not_before: dict[int, float] = {}
        self._first: Job | None = None

    def begin(self) -> None:
        """A new pass over the line."""
        self._first = None

    def done(self, job: Job) -> None:
        """Those who wait to do the same work need not."""
        if job.cache_key is not None:
            self._done.add(job.cache_key)

    def died(self, job: Job, *, earned: bool) -> None:
        """A service died; the more often in a row, the later it is started again."""
        self._deaths[job.id] = 1 if earned else self._deaths.get(job.id, 0) + 1
        self.hold(job, service.backoff(self._deaths[job.id]))

    def hold(self, job: Job, seconds: float) -> None:
        """Do not start the job for so long."""
        self._not_before[job.id] = time.monotonic() + seconds

    def decide(
        self, job: Job, operation: Operation, live: Collection[Live], publishing: Collection[Job]
    ) -> Placement | Twin | Wait:
        """What may be done with a queued job now."""
        if not self._allowed(job):
            return Wait(_ELSEWHERE)
        if time.monotonic() < self._not_before.get(job.id, 0.0):
            return Wait(f"ended {self._deaths.get(job.id, 1)} times in a row and is started again after a pause")
        if operation.cached and not operation.service:
            same = next((j for j in (*(w.job for w in live), *publishing) if j.cache_key == job.cache_key), None)
            if same is not None:
                return Wait(f"waits for {label(same)}, which does the same work")
            twin = self._twin(job)
            if twin is not None:
                return Twin(twin)
        ledger = [_entry(worker, job) for worker in live]
        granted = place(self._devices, ledger, job.needs, job.service)
        if isinstance(granted, Wait):
            self._remember(job, live)
            return granted
        if self._first is not None and granted.cores > 0:
            return Wait(f"waits for {label(self._first)}, which came first")
        return granted

    def _twin(self, job: Job) -> Job | None:
        if job.cache_key is None or job.cache_key not in self._done:
            return None
        found = self._store.jobs.find_done(job.cache_key)
        # What was done before this job was asked for was looked for then, or was not wanted (`fresh`).
        return found if found is not None and (found.ended_at or 0.0) >= job.created_at else None

    def _remember(self, job: Job, live: Collection[Live]) -> None:
        """Keep others from overtaking a job that waited long, if it can start once the jobs now running are done."""
        if self._first is not None or time.time() - job.created_at < _PATIENCE_SECONDS:
            return
        staying = [_entry(worker, job) for worker in live if worker.job.service]
        if isinstance(place(self._devices, staying, job.needs, job.service), Placement):
            self._first = job


def _entry(worker: Live, job: Job) -> Running:
    """The ledger's line; a service shares its cores with the one that replaces it, or that could never start."""
    endpoint = service.endpoint_of(job)
    replaced = endpoint is not None and service.endpoint_of(worker.job) == endpoint
    granted = replace(worker.placement, cores=0) if replaced else worker.placement
    return worker.job.needs, granted, label(worker.job)
