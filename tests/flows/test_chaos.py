"""kill -9 of workers, of whole groups and of the scheduler at random moments: nothing is lost, nothing runs twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from llmo.kernel.submit import submit
from llmo.store import Store
from llmo.types import Job, JobState, Needs
from support.kernel import DEVICES, TESTS, marked, until
from support.ops import lookup

pytestmark = pytest.mark.chaos

ROUNDS = int(os.environ.get("LLMO_CHAOS", "3"))
STEPS = 25
TOTAL = STEPS * (STEPS + 1) // 2


class Chaos:
    """A store, the scheduler process that works on it, and what the test wants to be true of both."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.store = Store.open(self.home)
        self.mark = f"LLMO_CHAOS_MARK={uuid.uuid4().hex}"
        self.jobs: dict[int, str] = {}
        self.done: dict[int, int] = {}  # how often a job had begun when it was first seen done
        self.server = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        name, _, value = self.mark.partition("=")
        env = os.environ | {"PYTHONPATH": TESTS, name: value}
        return subprocess.Popen([sys.executable, "-m", "support.schedule", str(self.home)], env=env)

    def count(self, name: str) -> dict[str, object]:
        return {"steps": STEPS, "pause": 0.01, "log": str(self.logs / name)}

    def submit(self) -> None:
        number = len(self.jobs)
        name = f"job{number}"
        needs = Needs(cores=0, memory=1 << 20)
        if number % 3 == 2:
            children = {k: {"op": "count", "spec": self.count(f"{name}-{k}"), "name": f"{name}-{k}"} for k in "ab"}
            spec: dict[str, object] = {"children": children, "at_once": True}
            job = submit(self.store, DEVICES, "parent", spec, {}, max_attempts=1000, lookup=lookup)
        else:
            spec = self.count(name)
            job = submit(
                self.store, DEVICES, "count", spec, {}, name=name, needs=needs, max_attempts=1000, lookup=lookup
            )
        self.jobs[job.id] = name

    def observe(self) -> list[Job]:
        """Every job, after checking what must hold at any moment."""
        jobs = self.store.jobs.list(limit=None)
        assert set(self.jobs) <= {job.id for job in jobs}, "an acknowledged job is lost"
        for job in jobs:
            assert job.state not in (JobState.FAILED, JobState.STOPPED), job
            if job.state is JobState.DONE:
                self.done.setdefault(job.id, self.begun(job))
        assert self.server.poll() is None, "the scheduler ended by itself"
        return jobs

    def begun(self, job: Job) -> int:
        log = self.logs / job.name
        return log.read_text().split().count("begin") if job.op == "count" and log.exists() else 0

    def progress(self) -> int:
        """The number of attempts begun and of steps saved, over all jobs: it grows while anything works."""
        saved = sum(p.stat().st_mtime_ns % 1_000_003 for p in self.home.glob("jobs/*/checkpoint/state.json"))
        return saved + sum(self.begun(job) for job in self.observe())

    def advance(self, steps: int) -> None:
        """Let it work until the progress was seen to change so often, or everything is done."""
        seen = self.progress()
        for _ in range(steps):
            until(lambda last=seen: self.progress() != last or self.idle(), lambda: time.sleep(0.001), "progress")
            seen = self.progress()

    def idle(self) -> bool:
        return all(job.state.ended for job in self.observe())

    def kill(self, what: str, pick: random.Random) -> None:
        if what == "server":
            self.server.kill()
            self.server.wait()
            self.server = self.start()
            return
        running = [j for j in self.observe() if j.pid and j.state in (JobState.STARTING, JobState.RUNNING)]
        if running:
            victim = pick.choice(running)
            with suppress(ProcessLookupError):  # it ended this very moment
                send = os.kill if what == "worker" else os.killpg
                send(victim.pid or 0, signal.SIGKILL)

    def close(self) -> None:
        if self.server.poll() is None:
            self.server.terminate()
        self.server.wait()
        self.store.close()


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    made = Chaos(tmp_path)
    yield made
    made.close()


def test_nothing_is_lost_and_nothing_runs_twice(chaos: Chaos) -> None:
    pick = random.Random(ROUNDS)
    kinds = ["worker", "group", "server"]
    for number in range(ROUNDS):
        for _ in range(1 + (number % 3 == 0)):
            chaos.submit()
        chaos.advance(pick.randrange(12))
        chaos.kill(kinds[number % 3] if ROUNDS < 6 else pick.choice(kinds), pick)
    until(chaos.idle, lambda: time.sleep(0.02), "the end of all jobs")
    jobs = chaos.observe()
    parents = [job for job in jobs if job.op == "parent"]
    assert len(jobs) == len(chaos.jobs) + 2 * len(parents), "a child was made twice, or never"
    for job in jobs:
        assert job.state is JobState.DONE
        assert chaos.begun(job) == chaos.done[job.id], f"{job} ran again after it was done"
        assert chaos.begun(job) <= job.attempt, f"{job} ran more often than it was started"
        if job.op == "count":
            assert job.result == {"total": TOTAL}
            assert (chaos.store.catalog.path(job.output or "") / "total.txt").read_text() == str(TOTAL)
            assert "overlap" not in (chaos.logs / job.name).read_text()
        else:
            results = [dict(child)["result"] for child in (job.result or {}).values()]
            assert results == [{"total": TOTAL}] * 2
    chaos.close()
    assert chaos.server.returncode == 0
    assert marked(chaos.mark) == []


def test_workers_die_with_a_scheduler_that_is_killed(chaos: Chaos) -> None:
    submit(chaos.store, DEVICES, "breed", {"stay": True}, {}, lookup=lookup)
    until(lambda: len(marked(chaos.mark)) == 4, lambda: time.sleep(0.01), "scheduler, worker and its two children")
    chaos.server.kill()
    chaos.server.wait()
    until(lambda: marked(chaos.mark) == [], lambda: time.sleep(0.01), "their end")
