"""The line of queued jobs: who may start now and with what, who is done already, and why the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from llmo.errors import NeedsError
from llmo.kernel import service
from llmo.kernel.live import Live, label
from llmo.kernel.paging import ASLEEP, Pager, asleep
from llmo.kernel.placement import Running, Wait, for_endpoints, place
from llmo.plugins import Operation
from llmo.store import Store
from llmo.types import Device, Endpoint, Job, JobState, Placement

_PATIENCE_SECONDS = 30.0
_ELSEWHERE = "another command works in this store, on its own jobs only; this goes on after it, or with `llmo up`"


@dataclass(frozen=True, slots=True)
class Twin:
    """A done job whose result is this job's too."""

    job: Job


@dataclass(frozen=True, slots=True)
class Room:
    """There is room once these endpoints, and what leaves already, have gone; until then the job waits."""

    leaving: Sequence[Live]
    reason: str


class Line:
    """Oldest first. A later job may overtake one that does not fit, but not for ever."""

    def __init__(self, store: Store, devices: Sequence[Device], allowed: Callable[[Job], bool], pager: Pager) -> None:
        self._store = store
        self._devices = devices
        self._allowed = allowed
        self._pager = pager
        self._endpoints: dict[str, Endpoint] = {}
        self._promised: list[tuple[Job, Running]] = []  # room that is being made, to whom and how much
        self._done: set[str] = set()  # cache keys of what was done while others waited
        self._deaths: dict[int, int] = {}  # of services, in a row
        self._not_before: dict[int, float] = {}
        self._first: Job | None = None

    def begin(self, rows: Sequence[Job]) -> list[Job]:
        """A new pass over the line: the queued jobs among `rows` (oldest first), in the order of their turns."""
        self._first, self._promised = None, []
        queued = [job for job in rows if job.state is JobState.QUEUED]
        if any(job.service for job in queued):
            self._endpoints = {endpoint.name: endpoint for endpoint in self._store.endpoints.list()}
        return self._pager.order(queued)

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
    ) -> Placement | Twin | Wait | Room:
        """What may be done with a queued job now. Raises NeedsError when pinned endpoints leave it no room ever."""
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
        endpoint = self._endpoint(job)
        if endpoint is not None and endpoint.state == "asleep":
            return Wait(job.waiting if job.waiting.startswith(ASLEEP) else asleep(""))
        granted = self._fit(job, live, self._promised)
        if isinstance(granted, Wait):
            return self._otherwise(job, operation, live, granted)
        woken = endpoint is not None and endpoint.rests
        if self._first is not None and granted.cores > 0 and not woken:
            return Wait(f"waits for {label(self._first)}, which came first")
        self._pager.placed(job)
        return granted

    def _endpoint(self, job: Job) -> Endpoint | None:
        """The endpoint of a service, if it points to it already."""
        found = self._endpoints.get(service.endpoint_of(job) or "")
        return found if found is not None and found.job == job.id else None

    def _otherwise(self, job: Job, operation: Operation, live: Collection[Live], why: Wait) -> Wait | Room:
        """What comes of a job that does not fit as things are."""
        if operation.service or operation.makes_room:

            def fits(staying: Sequence[Live]) -> bool:
                return isinstance(self._fit(job, staying, self._promised), Placement)

            leaving = self._pager.room(job, live, fits, urgent=operation.service)
            if leaving is not None:
                needed = Placement(job.needs.cores, job.needs.memory)
                self._promised.append((job, (job.needs, needed, label(job))))
                return Room(leaving, f"{why.reason}; room is being made")
            self._refuse(job, live)
        self._remember(job, live)
        return why

    def _refuse(self, job: Job, live: Collection[Live]) -> None:
        """A new endpoint must not wait for ever for those that never give way."""
        if not job.service or not self._pager.on or self._endpoint(job) is not None:
            return
        stay = [w for w in live if service.pinned(w.job) and not w.stopping and not service.replaces(job, w.job)]
        answer = self._fit(job, stay)
        if isinstance(answer, Wait):
            raise NeedsError(
                f"there is no room beside the pinned endpoints: {answer.reason}",
                hint="deploy one of them again without `pinned`, or take it down: llmo endpoints --remove NAME",
            )

    def _fit(self, job: Job, live: Collection[Live], promised: Sequence[tuple[Job, Running]] = ()) -> Placement | Wait:
        """A place beside these workers and what was promised to others; for a service, within endpoints' memory."""
        held = [(worker.job, _entry(worker, job)) for worker in live] + [one for one in promised if one[0].id != job.id]
        if job.service:
            within = [entry for other, entry in held if other.service]
            answer = place(for_endpoints(self._devices), within, job.needs, True)
            if isinstance(answer, Wait):
                return answer
        return place(self._devices, [entry for _, entry in held], job.needs, job.service)

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
    """The ledger's line; a service shares its cores and its GPU with the one that replaces it, or that could never
    start."""
    granted = replace(worker.placement, cores=0, gpus=()) if service.replaces(job, worker.job) else worker.placement
    return worker.job.needs, granted, label(worker.job)
