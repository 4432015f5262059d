"""What a new scheduler does with the jobs of one that died at an unlucky moment."""

from __future__ import annotations

import json
import time
from pathlib import Path

from llmo.kernel import staging
from llmo.types import Job, JobState, Needs, Reason
from support.kernel import Kernel, alive, until
from support.ops import lookup


def begun(kernel: Kernel, job: Job, file: str) -> None:
    """Start the job, then only watch, as a scheduler that died does not even do, until the worker wrote `file`."""
    kernel.reached(job, "starting")
    until((kernel.folder(job) / file).exists, lambda: time.sleep(0.005), file)


def test_work_that_is_complete_is_published_and_not_done_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Kernel(tmp_path / "home") as first:
        job = first.submit("write", {"text": "one", "log": str(log)}, name="first")
        begun(first, job, "out/manifest.json")
        first.crash()
    with Kernel(tmp_path / "home") as second:
        done = second.ended(job)
        assert (done.state, done.reason, done.attempt) == (JobState.DONE, Reason.FINISHED, 1)
        assert (second.store.catalog.path(done.output or "") / "text.txt").read_text() == "one"
        assert second.events(job, "progress")
    assert log.read_text().split() == ["one"]


def test_a_publish_that_was_not_written_down_is_finished(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as first:
        job = first.submit("write", {"text": "one"}, name="first")
        begun(first, job, "out/manifest.json")
        digest, _ = staging.publish(first.store, first.job(job), lookup("write"))
        assert not (first.folder(job) / "out" / "text.txt").exists()
        first.crash()
    with Kernel(tmp_path / "home") as second:
        done = second.ended(job)
        assert (done.state, done.attempt, done.output) == (JobState.DONE, 1, digest)
        assert [a.ref for a in second.store.catalog.list(name="first")] == ["first@1"]
        assert second.store.catalog.get("first").card["engine"] == "test"


def test_a_failure_that_was_not_written_down_is_not_tried_again(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as first:
        job = first.submit("fail", {"how": "refuse"})
        begun(first, job, "error.json")
        first.crash()
    with Kernel(tmp_path / "home") as second:
        ended = second.ended(job)
        assert (ended.state, ended.attempt, (ended.error or {})["code"]) == (JobState.FAILED, 1, "data")


def test_an_interrupted_job_runs_again_at_no_cost_of_attempts(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as first:
        job = first.submit("wait", {"until": str(tmp_path / "go")})
        first.noted(job)
        pid = first.job(job).pid
        first.crash()
    with Kernel(tmp_path / "home") as second:
        second.until(lambda: second.job(job).attempt == 2 and second.job(job).pid)
        assert pid is not None
        assert not alive(pid)
        assert second.job(job).max_attempts == 4
        assert second.events(job, "state")[-1].data["reason"] == "lost"
        (tmp_path / "go").touch()
        assert second.ended(job).state is JobState.DONE


def test_the_old_group_is_dead_before_the_next_attempt(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as first:
        job = first.submit("breed", {"stay": True})
        pids = [int(word) for word in first.noted(job).split()]
        pids.append(first.job(job).pid or 0)
        first.scheduler.lock.release()  # it lost its lock, and its workers do not know
        with Kernel(tmp_path / "home") as second:
            second.until(lambda: second.job(job).attempt == 2)
            assert not any(alive(pid) for pid in pids)
        first.crash()


def test_a_stop_asked_for_while_nobody_listened(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as first:
        job = first.submit("wait", {})
        first.noted(job)
        first.store.jobs.request_stop(job.id)
        first.crash()
    with Kernel(tmp_path / "home") as second:
        ended = second.ended(job)
        assert (ended.state, ended.reason) == (JobState.STOPPED, Reason.USER)


def test_a_tree_of_jobs_and_a_service_come_back(tmp_path: Path) -> None:
    log = tmp_path / "log"
    go = tmp_path / "go"
    children = {
        "first": {"op": "write", "spec": {"text": "first", "log": str(log)}, "name": "first"},
        "up": {"op": "serve", "spec": {"endpoint": "news"}},
        "wait": {"op": "wait", "spec": {"until": str(go)}},
    }
    with Kernel(tmp_path / "home") as first:
        job = first.submit("parent", {"children": children})
        first.until(lambda: [j for j in first.store.jobs.list(op="wait") if j.state is JobState.RUNNING])
        old = first.store.endpoints.get("news").address
        first.crash()
    with Kernel(tmp_path / "home") as second:
        second.until(lambda: second.store.endpoints.get("news").address not in (None, old))
        go.touch()
        done = second.ended(job)
        assert done.state is JobState.DONE
        assert (done.result or {})["up"]["state"] == "running"
        assert len(second.store.jobs.list(parent=job.id)) == 3
    assert log.read_text().split() == ["first"]


def test_a_claim_without_a_worker_is_taken_up(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as kernel:
        job = kernel.submit("write", {"text": "x"}, name="x")
        placement = {"cores": 1, "memory": 0}
        assert kernel.store.jobs.claim(job.id, 1, "someone", placement)  # type: ignore[arg-type]
        assert kernel.ended(job).attempt == 2


def test_a_damaged_output_is_made_again(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as kernel:
        job = kernel.submit("write", {"text": "x"}, name="x", needs=Needs(memory=1))
        begun(kernel, job, "out/manifest.json")
        (kernel.folder(job) / "out" / "text.txt").unlink()
        done = kernel.ended(job)
        assert (done.state, done.attempt) == (JobState.DONE, 2)


def test_the_same_work_asked_for_again_goes_on_from_what_a_stopped_job_left(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as kernel:
        spec = {"steps": 60, "pause": 0.02, "log": str(tmp_path / "log")}
        stopped = kernel.submit("count", spec)
        left = kernel.folder(stopped) / "checkpoint" / "state.json"
        kernel.until(left.exists, "a checkpoint")
        kernel.store.jobs.request_stop(stopped.id)
        assert kernel.ended(stopped).state is JobState.STOPPED
        reached = json.loads(left.read_text())["step"]
        again = kernel.submit("count", spec)
        assert again.id != stopped.id
        done = kernel.ended(again)
        assert (done.state, (done.result or {})["total"]) == (JobState.DONE, 60 * 61 // 2)
        assert kernel.events(again, "progress")[0].data["step"] == reached + 1
        assert not left.exists()
