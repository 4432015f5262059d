"""A training on two processes as a job: one of them is killed, the reason is told, and the job goes on to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from llmo.store import Store
from llmo.types import Job, JobState
from support.crashes import members, until
from support.project import llmo, project

SLOW = "devices: 2, checkpoint_seconds: 0.01, epochs: 40"


def test_a_killed_process_costs_an_attempt_and_not_the_job(tmp_path: Path) -> None:
    file, home = project(tmp_path / "project", rows=120), tmp_path / "home"
    file.write_text(file.read_text().replace("epochs: 10", SLOW))
    env = {"LLMO_HOME": str(home), "LLMO_CORES": "2"}
    store = Store.open(home)
    command = [sys.executable, "-m", "llmo.doors.cli", "run", str(file), "--json"]
    with (tmp_path / "out").open("wb") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env})

    def training() -> Job | None:
        assert running.poll() is None, (tmp_path / "out").read_text()
        return next(iter(store.jobs.list(op="train", states=[JobState.RUNNING])), None)

    def follower() -> psutil.Process | None:
        job = training()
        if job is None or job.pid is None or not list(home.glob(f"jobs/{job.id}/checkpoint/step-*/state.json")):
            return None
        return next((p for p in psutil.Process(job.pid).children() if "llmo.training.follow" in p.cmdline()), None)

    os.kill(until(follower, "the second process, and a checkpoint").pid, signal.SIGKILL)
    assert running.wait(240) == 0, (tmp_path / "out").read_text()
    (job,) = store.jobs.list(op="train")
    assert (job.state, job.attempt) == (JobState.DONE, 2)
    logs = llmo("logs", str(job.id), **env)
    assert "process 2 of 2 of this training ended by signal 9" in logs.out
    assert "resumed from the checkpoint of step" in logs.out
    store.close()
    until(lambda: not members(home), "every process to be gone", 20)


def test_more_devices_than_there_are_cores_are_refused_at_once(tmp_path: Path) -> None:
    file = project(tmp_path / "project", rows=40)
    file.write_text(file.read_text().replace("epochs: 10", "devices: 64, epochs: 10"))
    home = tmp_path / "home"
    said = llmo("run", file, LLMO_HOME=str(home), LLMO_CORES="2")
    assert said.code == 2
    assert "train.devices is 64, and this machine has 2 cores" in said.err
    with Store.open(home) as store:
        assert not store.jobs.list(), "nothing was begun"
