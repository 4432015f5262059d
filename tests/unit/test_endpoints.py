"""An endpoint can be taken back at any time, also before it ever answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmo.doors.cli.server import endpoints_table
from llmo.doors.cli.show import console
from llmo.errors import NotFoundError
from llmo.kernel import service
from llmo.settings import Settings
from llmo.system import System
from llmo.types import Endpoint, Job, JobState, Needs


def test_an_endpoint_that_still_waits_is_removed(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path)) as system:
        waiting = system.store.jobs.insert(
            op="serve", spec={"endpoint": "news"}, inputs={}, needs=Needs(), service=True
        )
        other = system.store.jobs.insert(op="serve", spec={"endpoint": "else"}, inputs={}, needs=Needs(), service=True)
        system.remove_endpoint("news")
        assert system.job(waiting.id).state is JobState.STOPPED
        assert system.job(other.id).state is JobState.QUEUED
        with pytest.raises(NotFoundError):
            system.remove_endpoint("news")


def sleeping(system: System) -> Job:
    """A service whose endpoint gave way."""
    job = system.store.jobs.insert(op="serve", spec={"endpoint": "news"}, inputs={}, needs=Needs(), service=True)
    service.announce(system.store, job)
    service.sleep(system.store, job)
    system.store.jobs.waiting(job.id, "asleep: gave way to endpoint sport (job 9); the next request wakes it")
    system.store.events.append(job.id, 1, [(5.0, "state", {"state": "queued"})], 0)
    return job


def test_an_endpoint_that_is_asleep_is_killed_or_removed(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path)) as system:
        assert system.kill(sleeping(system).id).state is JobState.STOPPED
        assert system.store.endpoints.get("news").state == "down"
        job = sleeping(system)
        system.remove_endpoint("news")
        assert system.job(job.id).state is JobState.STOPPED
        assert system.endpoints() == []


def test_it_says_since_when_and_why_it_is_asleep(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path), embedded=False) as system:
        sleeping(system)
        system.start()
        found = system.endpoints()
        assert [(one.state, one.since, one.rests) for one in found] == [("asleep", 5.0, True)]
        pinned = Endpoint("mail", "up", "sha256:1", "mail@4", 7, deploy={"pinned": True}, waiting="an older reason")
        with console.capture() as shown:
            console.print(endpoints_table([*found, pinned]))
        lines = [" ".join(line.split()) for line in shown.get().splitlines()]
    assert lines[1].startswith("news asleep for ")
    assert lines[1].endswith("gave way to endpoint sport (job 9); the next request wakes it")
    assert lines[2] == "mail up, pinned mail@4 7"
