"""The one writer of job state: hears workers, ends what ended, stops what was asked to stop, starts what fits."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.errors import ConflictError, EnvironmentProblem, LLMOError, StorageError
from llmo.kernel import jobdir, staging, tail
from llmo.kernel.books import Books
from llmo.kernel.executor import FAILED, Executor, Exit
from llmo.kernel.family import Family
from llmo.kernel.line import Line, Room, Twin
from llmo.kernel.live import Live, Made, Publishing, device_for, passes
from llmo.kernel.lock import Holder, SchedulerLock
from llmo.kernel.outcome import HEARTBEAT_SECONDS, LOST_CODE, Ending, Outcome, judge
from llmo.kernel.paging import Pager, Usage, asleep
from llmo.kernel.placement import Wait
from llmo.kernel.service import announce
from llmo.kernel.submit import Lookup, register
from llmo.plugins import Operation
from llmo.store import Store
from llmo.types import Device, Job, JobState, Placement, Reason

__all__ = ["Holder", "Scheduler", "SchedulerLock"]

log = logging.getLogger(__name__)

GRACE_SECONDS = 15.0
_IDLE_SECONDS = 0.05
_TROUBLE_SECONDS = 1.0
_ACTIVE = [state for state in JobState if not state.ended]


class Scheduler:
    """Runs the jobs of `store` on `executor`, which `shutdown` closes. One thread calls it; any may `stop` and `wake`.

    `scope` limits it to the jobs it says yes to, and to what those wait for. `grace` is the time in seconds that
    a worker has to stop by itself, `heartbeat` the silence after which it counts as lost. `usage` says how replicas are
    used; without it no endpoint gives way to another. `trouble` says what keeps everything from going on (a full
    disk), or is empty.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        devices: Sequence[Device],
        *,
        scope: Callable[[Job], bool] | None = None,
        lock: SchedulerLock | None = None,
        lookup: Lookup = plugins.operation,
        grace: float = GRACE_SECONDS,
        heartbeat: float = HEARTBEAT_SECONDS,
        usage: Usage | None = None,
    ) -> None:
        self.lock = lock or SchedulerLock(store.home)
        self.trouble = ""  # what keeps every job from going on: a full disk
        self._found = ""  # of it in this tick
        self._store = store
        self._executor = executor
        self._devices = list(devices)
        self._scope = scope
        self._lookup = lookup
        self._grace = grace
        self._heartbeat = heartbeat
        self._lease = uuid.uuid4().hex
        self._live: dict[int, Live] = {}
        self._publishing: dict[int, Publishing] = {}
        self._family = Family(store, devices, lookup)
        self._books = Books(store, self._family)
        self._pager = Pager(store, usage)
        self._line = Line(store, self._devices, self._allowed, self._pager)
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._stopping = threading.Event()
        self._closing = False

    def try_acquire(self, url: str | None = None) -> bool:
        """Become the store's only scheduler, before the first `tick`; False while another is."""
        return self.lock.try_acquire(url)

    def run(self) -> None:
        """Tick until `stop`. Raises ConflictError when another scheduler runs the jobs of this store."""
        self._own()
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self.tick()
                # A long line takes long to walk, and must not take a core.
                pause = max(_IDLE_SECONDS, 10 * (time.monotonic() - began))
            # The loop must outlive anything; every step is in the store, so the next tick takes it up again.
            except Exception as error:
                if not passes(error):
                    log.exception("a tick of the scheduler failed")
                self.trouble = str(error) or type(error).__name__
                pause = _TROUBLE_SECONDS
            self._executor.wait(pause)

    def tick(self) -> None:
        """Hear the workers, end what ended, publish what is done, stop, deliver and place."""
        self._own()
        self._found = ""
        self._hear_all()
        self._end_all()
        self._publish_all()
        rows = self._store.jobs.list(states=_ACTIVE, limit=None, newest_first=False)
        self._recover(rows)
        self._stop_asked(rows)
        self._family.deliver()
        self._place(rows)
        self.trouble = self._found

    def wake(self) -> None:
        """Look at once: something was submitted or asked to stop."""
        self._executor.wake()

    def stop(self) -> None:
        """Let `run` return soon; what runs goes on until `shutdown`."""
        self._stopping.set()
        self._executor.wake()

    def shutdown(self, keep_services: bool = False) -> None:
        """Stop every worker: jobs that were asked to stop are stopped, the others are queued for the next scheduler.

        With `keep_services` services stay up, and this scheduler can go on. Without, it and its executor are closed.
        """
        self._closing = True
        deadline = time.monotonic() + self._grace + 10.0
        while (leaving := self._workers(keep_services)) or self._publishing:
            for live in leaving:
                self._ask(live)
            if time.monotonic() > deadline:
                break  # the executor kills what is left, and the next scheduler takes it up
            self._executor.wait(0.01)
            with suppress(StorageError):
                self.tick()
        self._closing = False
        if not keep_services:
            self._executor.close()
            self._publisher.shutdown()
            self.lock.release()

    def _own(self) -> None:
        if not self.lock.held and not self.lock.try_acquire():
            raise ConflictError(
                f"process {getattr(self.lock.holder(), 'pid', 0)} runs the jobs of this store",
                hint="set LLMO_URL to talk to it, or end it first",
            )

    def _workers(self, keep_services: bool) -> list[Live]:
        return [live for live in self._live.values() if not (keep_services and live.job.service)]

    # -- hear

    def _hear_all(self) -> None:
        for live in list(self._live.values()):
            self._hear(live)
            if not live.has_pulse(self._heartbeat) and not live.silent:
                live.silent = True
                self._executor.stop(live.handle, 0.0)
            if live.beat and live.job.state is JobState.STARTING and not live.job.service:
                live.job = self._books.running(live.job)

    def _hear(self, live: Live) -> bool:
        """Act on what the worker said since the last time, then remember that it was heard; False for nothing."""
        lines, offset = tail.read(live.handle.job_dir / jobdir.EVENTS, live.offset)
        if offset == live.offset:
            return False
        # Acting twice does nothing more, so it comes first: a crash in between loses nothing.
        for _, kind, data in lines:
            if kind == "spawn":
                self._family.spawn(live.job, data)
            elif kind == "stop":
                self._family.stop(live.job, data["key"])
            elif kind == "ready" and live.job.service and not live.stopping:
                live.ready = live.ready or time.monotonic()
                live.job = self._books.running(live.job, data["address"])
        self._store.events.append(live.job.id, live.job.attempt, lines, offset)
        live.offset = offset
        return True

    # -- end

    def _end_all(self) -> None:
        for live in list(self._live.values()):
            end = self._executor.poll(live.handle)
            if end is not None:
                while self._hear(live):
                    pass
                self._end(live, live.ending(end, interrupted=self._closing or bool(live.leaving)))

    def _end(self, live: Live, ending: Ending) -> None:
        job = self._store.jobs.get(live.job.id)
        outcome = judge(job, ending)
        if outcome.state is JobState.DONE:
            self._publish(job, live.operation)
        elif self._books.settle(job, outcome, live.leaving) is JobState.QUEUED and job.service:
            if outcome.reason is not Reason.PREEMPTED:
                self._line.died(job, earned=ending.earned)
            elif live.leaving:
                self._store.jobs.waiting(job.id, asleep(live.leaving))
        del self._live[job.id]

    def _recover(self, rows: Sequence[Job]) -> None:
        """Take up what an earlier scheduler left running, once nothing of it is alive any more."""
        for job in rows:
            if job.state is JobState.QUEUED or job.id in self._live or job.id in self._publishing:
                continue
            try:
                self._take_up(job)
            except LLMOError as error:
                if passes(error):
                    raise
                self._found = f"job {job.id}: {error}"

    def _take_up(self, job: Job) -> None:
        folder = jobdir.job_dir(self._store.home, job.id)
        self._executor.reclaim(folder, job.pid, job.pid_started)
        offset = self._store.events.offset(job.id, job.attempt)
        while (heard := tail.read(folder / jobdir.EVENTS, offset))[1] != offset:
            offset = heard[1]
            self._store.events.append(job.id, job.attempt, heard[0], offset)
        if jobdir.finished(folder, job.attempt) and not job.service:
            self._publish(job, self._lookup(job.op))
            return
        error = jobdir.read_json(folder / jobdir.ERROR)
        end = Exit(LOST_CODE if error is None else FAILED, asked=True)
        outcome = judge(job, Ending(end, error, interrupted=True))
        again = outcome.state is JobState.QUEUED
        self._books.settle(job, replace(outcome, reason=Reason.LOST) if again else outcome)

    # -- publish

    def _publish(self, job: Job, operation: Operation) -> None:
        def start() -> Made:
            try:
                future = self._publisher.submit(staging.publish, self._store, job, operation)
            except RuntimeError:  # closed while the interpreter ends: a pool takes no work then, but this thread can
                future = _at_once(lambda: staging.publish(self._store, job, operation))
            future.add_done_callback(lambda _: self._executor.wake())
            return future

        self._publishing[job.id] = Publishing(job, operation, start, start())

    def _publish_all(self) -> None:
        for made in list(self._publishing.values()):
            if made.again_at is not None and time.monotonic() >= made.again_at:
                made.again_at, made.future = None, made.start()
            if made.again_at is not None:
                self._found = str(made.future.exception())
            elif made.future.done():
                self._published(made)

    def _published(self, made: Publishing) -> None:
        job, error = made.job, made.future.exception()
        if error is None:
            self._books.done(job, Reason.FINISHED, *made.future.result())
            self._line.done(job)
        elif passes(error):
            # The work is whole and stays in the job's directory until the disk takes it.
            made.again_at = time.monotonic() + _TROUBLE_SECONDS
            return
        elif isinstance(error, StorageError):
            self._books.settle(job, judge(job, Ending(Exit(LOST_CODE), error.to_json())))
        elif isinstance(error, LLMOError):
            self._books.settle(job, Outcome(JobState.FAILED, Reason.ERROR, error.to_json()))
        else:
            raise error
        del self._publishing[job.id]

    # -- stop

    def _stop_asked(self, rows: Sequence[Job]) -> None:
        for job in rows:
            if job.id in self._live and (job.stop_requested or self._pager.left(self._live[job.id])):
                self._ask(self._live[job.id])

    def _ask(self, live: Live) -> None:
        if not live.stopping:
            live.stopping = True
            self._executor.stop(live.handle, self._grace)

    # -- place

    def _place(self, rows: Sequence[Job]) -> None:
        for job in self._line.begin(rows):
            if not self._closing:
                why = self._place_one(job)
                if why and why != job.waiting:
                    self._store.jobs.waiting(job.id, why)

    def _place_one(self, job: Job) -> str:
        """Start the job, or end it, or say why it waits."""
        try:
            operation = self._lookup(job.op)
            publishing = [made.job for made in self._publishing.values()]
            answer = self._line.decide(job, operation, self._live.values(), publishing)
            if isinstance(answer, Wait):
                return answer.reason
            if isinstance(answer, Room):
                for worker in answer.leaving:
                    self._pager.put_to_sleep(worker, job)
                return answer.reason
            if isinstance(answer, Twin):
                register(self._store, operation, answer.job.output, job.name or job.op)
                self._books.done(job, Reason.CACHED, answer.job.output, answer.job.result)
                return ""
            inputs = staging.inputs_of(self._store, job)
            folder = staging.prepare(self._store, job, operation, inputs, device_for(self._devices, answer))
        except OSError as error:
            return f"the job's folder cannot be made: {error}"
        except LLMOError as error:
            if passes(error):
                return str(error)
            self._books.settle(job, Outcome(JobState.FAILED, Reason.ERROR, error.to_json()))
            return ""
        if self._store.jobs.claim(job.id, job.attempt, self._lease, answer):
            self._start(job, operation, folder, answer)
        return ""

    def _start(self, job: Job, operation: Operation, folder: Path, placement: Placement) -> None:
        try:
            handle = self._executor.start(folder, placement)
        except EnvironmentProblem as error:
            self._line.hold(job, _TROUBLE_SECONDS)
            self._books.settle(job, judge(job, Ending(Exit(LOST_CODE), error.to_json())))
            return
        started = job.evolve(state=JobState.STARTING, placement=placement)
        self._live[job.id] = Live(started, operation, handle, placement)
        self._store.jobs.update(job.id, job.attempt, pid=handle.pid, pid_started=handle.started)
        if job.attempt > 1:
            self._family.begin(job)
        announce(self._store, job)

    def _allowed(self, job: Job) -> bool:
        return self._scope is None or job.id in self._family.adopted or self._scope(job)


def _at_once(work: Callable[[], tuple[str | None, dict[str, Any]]]) -> Made:
    future: Made = Future()
    try:
        future.set_result(work())
    except LLMOError as error:
        future.set_exception(error)
    return future
