"""Writes what became of jobs: their rows, their state events, their endpoints and what their parents hear."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llmo.errors import ConflictError
from llmo.kernel import service, staging
from llmo.kernel.family import Family
from llmo.kernel.outcome import Outcome
from llmo.store import Store
from llmo.types import Job, JobState, Reason


class Books:
    """Every write names the attempt it is about; the store drops those of an attempt that is over."""

    def __init__(self, store: Store, family: Family) -> None:
        self._store = store
        self._family = family

    def running(self, job: Job, address: str | None = None) -> Job:
        """The worker works, or (with an address) the service answers."""
        self._store.jobs.update(job.id, job.attempt, state=JobState.RUNNING, address=address)
        self._say(job, JobState.RUNNING)
        self._family.changed = True
        if address is not None:
            service.take_over(self._store, job, address)
        return job.evolve(state=JobState.RUNNING, address=address)

    def done(self, job: Job, reason: Reason, output: str | None, result: Mapping[str, Any] | None) -> None:
        ended: dict[str, Any] = {
            "state": JobState.DONE,
            "reason": reason,
            "output": output,
            "result": result,
            "error": None,
        }
        if self._store.jobs.update(job.id, job.attempt, **ended):
            self._say(job, JobState.DONE, reason)
            self._family.end(job, stop=False)
            staging.tidy(self._store, job)

    def settle(self, job: Job, outcome: Outcome, why: str = "") -> JobState:
        """Another attempt, or an end without a result, `why` in words; returns the state that the job has now."""
        if outcome.state is not JobState.QUEUED:
            ended: dict[str, Any] = {"state": outcome.state, "reason": outcome.reason, "error": outcome.error}
            self._store.jobs.update(job.id, job.attempt, **ended)
            return self._settled(job, outcome.state, outcome, why)
        if outcome.max_attempts != job.max_attempts:
            self._store.jobs.update(job.id, job.attempt, max_attempts=outcome.max_attempts)
        try:
            state = self._store.jobs.retry(job.id, job.attempt, outcome.reason).state
        except ConflictError:
            return self._store.jobs.get(job.id).state  # its row moved on without this scheduler
        return self._settled(job, state, outcome, why)

    def _settled(self, job: Job, state: JobState, outcome: Outcome, why: str) -> JobState:
        reason = Reason.USER if state is JobState.STOPPED else outcome.reason
        self._say(job, state, reason, why or str((outcome.error or {}).get("what", "")))
        again = state is JobState.QUEUED and outcome.reason is not Reason.PREEMPTED
        service.leave(self._store, job, "starting" if again else "down", ended=state.ended)
        self._family.end(job, stop=state.ended)
        if state.ended:
            staging.clear(self._store, job)
        return state

    def _say(self, job: Job, state: JobState, reason: Reason | None = None, text: str = "") -> None:
        data = {"state": state, "reason": reason, "text": text}
        at = self._store.events.offset(job.id, job.attempt)
        self._store.events.append(job.id, job.attempt, [(time.time(), "state", data)], at)
