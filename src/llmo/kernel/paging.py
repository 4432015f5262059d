"""Which endpoints give way when another needs the room: the least recently used first, a pinned one never, but
to its own successor."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from llmo.kernel import service
from llmo.kernel.live import Live, label
from llmo.kernel.placement import make_room
from llmo.store import Store
from llmo.types import Job

# So long an endpoint in use is up, and the other one waits, before they change places.
_TURN_SECONDS = 3.0
ASLEEP = "asleep"


@dataclass(frozen=True, slots=True)
class Use:
    """What whoever sends requests to a replica knows of it.

    `open`: it is sent new ones; `asked`: how many ask its endpoint or wait for it; `outstanding`: how many it has not
    answered; `at`: when one last came or went, in seconds of the monotonic clock.
    """

    open: bool = False
    asked: int = 0
    outstanding: int = 0
    at: float = 0.0

    @property
    def idle(self) -> bool:
        return self.open and self.asked == 0 and self.outstanding == 0

    @property
    def left(self) -> bool:
        """Nothing is under way there, and nothing more comes."""
        return not self.open and self.outstanding == 0


Usage = Callable[[str, str], Use]  # of the replica of an endpoint (its name) at an address; asked from any thread


class Pager:
    """Without `usage` nobody knows which endpoints are idle, and none gives way."""

    def __init__(self, store: Store, usage: Usage | None) -> None:
        self.on = usage is not None
        self._store = store
        self._usage = usage or (lambda name, address: Use())
        self._asking: dict[int, float] = {}  # job -> since when it asks for room

    def order(self, queued: Sequence[Job]) -> list[Job]:
        """Those that asked for room first, the longest waiting before the others: it is made for nobody else."""
        here = {job.id for job in queued}
        self._asking = {id: since for id, since in self._asking.items() if id in here}
        return sorted(queued, key=lambda job: self._asking.get(job.id, float("inf")))

    def room(
        self, job: Job, live: Collection[Live], fits: Callable[[Sequence[Live]], bool], *, urgent: bool
    ) -> list[Live] | None:
        """Which endpoints are to leave, besides what does already, so that the job fits; None when it would not.

        `fits` says whether it fits beside so many. For an `urgent` job (a service) those in use give way too, once
        their turn is over.
        """
        if not self.on:
            return None
        now = time.monotonic()
        asked = self._asking.setdefault(job.id, now)
        may = self._may_leave(job, live, now, in_use=urgent and now - asked >= _TURN_SECONDS)
        movable = {worker.job.id for worker in may}
        staying = [w for w in live if not w.stopping and not w.leaving and w.job.id not in movable]
        return make_room(may, lambda kept: fits([*staying, *kept]))

    def placed(self, job: Job) -> None:
        """It asks no more."""
        self._asking.pop(job.id, None)

    def put_to_sleep(self, worker: Live, other: Job) -> None:
        """No request is sent to the endpoint any more; `left` says when its service may stop."""
        service.sleep(self._store, worker.job)  # first: if it cannot be written, the next pass tries again
        worker.leaving = f"gave way to {label(other)}"

    def left(self, worker: Live) -> bool:
        """Whether an endpoint that was put to sleep has answered what it had."""
        return bool(worker.leaving) and self._use(worker).left

    def _may_leave(self, job: Job, live: Collection[Live], now: float, *, in_use: bool) -> list[Live]:
        """The idle ones and, after them, those in use; the least recently used first. A pinned one gives way to what
        replaces it."""
        found: list[tuple[bool, float, Live]] = []
        for worker in live:
            stays = service.pinned(worker.job) and not service.replaces(job, worker.job)
            if worker.ready is None or worker.stopping or worker.leaving or stays:
                continue
            use = self._use(worker)
            if use.idle or (in_use and use.open and now - worker.ready >= _TURN_SECONDS):
                found.append((not use.idle, max(use.at, worker.ready), worker))
        return [worker for *_, worker in sorted(found, key=lambda one: one[:2])]

    def _use(self, worker: Live) -> Use:
        return self._usage(service.endpoint_of(worker.job) or "", worker.job.address or "")


def asleep(why: str) -> str:
    """What a job waits for whose endpoint gave way."""
    return f"{ASLEEP}{f': {why}' if why else ''}; the next request wakes it"
