"""Decides, as a pure function, what becomes of a job whose attempt ended."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmo.errors import JobFailed
from llmo.kernel.executor import DONE, FAILED, OUT_OF_MEMORY, STOPPED, Exit
from llmo.types import Job, JobState, Reason

ATTEMPTS = 3
HEARTBEAT_SECONDS = 60.0
LOST_CODE = -signal.SIGKILL  # for an attempt whose exit nobody saw


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of an ended attempt.

    `complete`: its manifest is there and true. `silent`: it was killed because its heartbeat stopped. `interrupted`:
    the scheduler itself goes down. `earned`: it got somewhere (a new checkpoint; a service that was up a minute),
    so that the attempts before it count no more.
    """

    exit: Exit
    error: Mapping[str, Any] | None = None
    complete: bool = False
    silent: bool = False
    interrupted: bool = False
    earned: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state that follows; `queued` is another attempt, for which `max_attempts` may have grown."""

    state: JobState
    reason: Reason
    error: Mapping[str, Any] | None = field(default=None)
    max_attempts: int = ATTEMPTS


def judge(job: Job, end: Ending) -> Outcome:
    """Done only with exit 0 and a complete manifest; what was lost is tried again, what was refused is not."""
    if end.exit.code == DONE and end.complete and not job.service:
        return Outcome(JobState.DONE, Reason.FINISHED)
    if job.stop_requested:
        return Outcome(JobState.STOPPED, Reason.USER)
    if end.interrupted and end.exit.code not in (FAILED, OUT_OF_MEMORY):
        # Not the job's fault, so it costs it no attempt.
        return Outcome(JobState.QUEUED, Reason.PREEMPTED, max_attempts=job.max_attempts + 1)
    if end.exit.code == OUT_OF_MEMORY:
        return Outcome(JobState.FAILED, Reason.OUT_OF_MEMORY, end.error or _failed(job, "the job ran out of memory"))
    if end.exit.code == FAILED and not (job.service and _crashed(end.error)):
        error = end.error or _failed(job, "the job failed and could not write down why")
        return Outcome(JobState.FAILED, Reason.ERROR, error)
    reason = Reason.OUT_OF_MEMORY if end.exit.out_of_memory else Reason.LOST
    error = end.error or _failed(job, explain(job, end))
    most = job.attempt + ATTEMPTS if end.earned else job.max_attempts
    if job.attempt < most:
        return Outcome(JobState.QUEUED, reason, error, max_attempts=most)
    return Outcome(JobState.FAILED, reason, error)


def explain(job: Job, end: Ending) -> str:
    """How a worker was lost, as a sentence."""
    code = end.exit.code
    if end.silent:
        return f"the worker gave no sign of life for {HEARTBEAT_SECONDS:.0f} seconds and was killed"
    if end.exit.out_of_memory:
        return "the machine ran out of memory and killed the worker"
    if code == -signal.SIGKILL and not end.exit.asked:
        return "the worker was killed, probably by the out-of-memory killer"
    if code < 0:
        return f"the worker was ended by signal {-code} ({signal.strsignal(-code)})"
    if code == DONE and job.service:
        return "the service ended by itself"
    if code == DONE:
        return "the worker ended, but what it wrote is not complete"
    if code == STOPPED:
        return "the worker was told to stop by something other than LLMO"
    return f"the worker ended with exit code {code}"


def _crashed(error: Mapping[str, Any] | None) -> bool:
    """An exception nobody foresaw; what a service refuses with a reason it would refuse again."""
    return error is None or error.get("code") == JobFailed.code


def _failed(job: Job, what: str) -> Mapping[str, Any]:
    return JobFailed(
        what, hint=f"see `llmo logs {job.id}`; running it again goes on from its last checkpoint"
    ).to_json()
