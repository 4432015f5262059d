"""Jobs through the scheduler, with real workers: what each kind of end leaves behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from llmo.errors import ConflictError, NeedsError, NotFoundError, SpecError
from llmo.kernel.lock import SchedulerLock
from llmo.types import JobState, Kind, Needs, Reason
from support.kernel import Kernel, alive, until


def test_a_job_runs_and_its_output_is_in_the_catalog(kernel: Kernel) -> None:
    job = kernel.ended(kernel.submit("write", {"text": "one"}, name="first"))
    assert (job.state, job.reason, job.attempt) == (JobState.DONE, Reason.FINISHED, 1)
    assert job.result == {"length": 3, "cores": 2, "threads": "2"}
    artifact = kernel.store.catalog.get("first@1", Kind.MODEL)
    assert (artifact.digest, artifact.job, artifact.card["engine"]) == (job.output, job.id, "test")
    assert (kernel.store.catalog.path(artifact.digest) / "text.txt").read_text() == "one"
    assert [e.data["state"] for e in kernel.events(job, "state")] == ["running", "done"]
    assert kernel.events(job, "progress")[-1].data == {"step": 1, "total": 1, "length": 3}


def test_inputs_are_paths_of_what_earlier_jobs_made(kernel: Kernel) -> None:
    first = kernel.ended(kernel.submit("write", {"text": "one"}, name="first"))
    second = kernel.ended(kernel.submit("write", {"text": "two"}, {"model": first.output or ""}, name="second"))
    assert (kernel.store.catalog.path(second.output or "") / "text.txt").read_text() == "onetwo"
    assert [a.name for a in kernel.store.catalog.lineage(second.output or "")] == ["first", "second"]


@pytest.mark.parametrize(
    ("how", "reason", "code", "words"),
    [
        ("refuse", Reason.ERROR, "data", "the file is empty"),
        ("crash", Reason.ERROR, "job_failed", "RuntimeError: a bolt is loose"),
        ("memory", Reason.OUT_OF_MEMORY, "job_failed", "ran out of memory"),
        ("exit", Reason.ERROR, "job_failed", "ended its process with 9"),
        ("full", Reason.ERROR, "storage", "disk is full"),
        ("nan", Reason.ERROR, "job_failed", "Out of range float"),
        ("import", Reason.ERROR, "environment", "no_such_package"),
    ],
)
def test_an_operation_that_fails_is_not_tried_again(
    kernel: Kernel, how: str, reason: Reason, code: str, words: str
) -> None:
    job = kernel.ended(kernel.submit("fail", {"how": how}))
    assert (job.state, job.reason, job.attempt) == (JobState.FAILED, reason, 1)
    assert job.error is not None
    assert job.error["code"] == code
    assert words in job.error["what"]
    assert "Traceback" not in json.dumps(dict(job.error))
    assert job.error["hint"]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("try half of it", "try half of it"),
        ("std::bad_alloc", "smaller batch"),
        ("Unable to allocate 9 GiB", "smaller"),
    ],
)
def test_what_an_operation_says_of_memory_is_the_hint(kernel: Kernel, said: str, hint: str) -> None:
    job = kernel.ended(kernel.submit("fail", {"how": "memory", "why": [said]}))
    assert job.reason is Reason.OUT_OF_MEMORY
    assert hint in (job.error or {})["hint"]


def test_an_attempt_hears_why_the_one_before_ended(kernel: Kernel, tmp_path: Path) -> None:
    job = kernel.submit("fail", {"how": "die", "log": str(tmp_path / "log"), "times": 1})
    written = kernel.folder(job) / "spec.json"
    kernel.until(written.exists, "the first attempt")
    assert json.loads(written.read_text())["after"] == ""
    kernel.ended(job)
    again = json.loads(written.read_text())
    assert (again["attempt"], again["after"]) == (2, "lost")


def test_a_missing_package_is_named(kernel: Kernel) -> None:
    job = kernel.ended(kernel.submit("missing", {}))
    assert job.error is not None
    assert job.error["code"] == "environment"
    assert "support.no_such_module" in job.error["what"]


def test_the_traceback_is_in_the_log_only(kernel: Kernel) -> None:
    job = kernel.ended(kernel.submit("fail", {"how": "crash"}))
    assert "Traceback" in (kernel.folder(job) / "output.log").read_text()
    assert f"llmo logs {job.id}" in (job.error or {})["hint"]


@pytest.mark.parametrize("how", ["die", "early"])
def test_a_lost_worker_is_tried_again_until_it_works(kernel: Kernel, tmp_path: Path, how: str) -> None:
    spec = {"how": how, "log": str(tmp_path / "log"), "times": 2}
    job = kernel.ended(kernel.submit("fail", spec))
    assert (job.state, job.attempt, job.result) == (JobState.DONE, 3, {"after": 2})


def test_a_lost_worker_is_given_up_after_its_attempts(kernel: Kernel) -> None:
    job = kernel.ended(kernel.submit("fail", {"how": "die"}))
    assert (job.state, job.reason, job.attempt) == (JobState.FAILED, Reason.LOST, 3)
    assert "out-of-memory killer" in (job.error or {})["what"]
    assert [e.data["state"] for e in kernel.events(job, "state")].count("queued") == 2


def test_attempts_that_leave_a_checkpoint_do_not_count(kernel: Kernel, tmp_path: Path) -> None:
    job = kernel.submit("count", {"steps": 40, "log": str(tmp_path / "log"), "pause": 0.02})
    for kill in range(5):
        wanted = kernel.until(lambda k=kill: kernel.job(job).attempt == k + 1 and kernel.job(job).pid)
        state = kernel.folder(job) / "checkpoint" / "state.json"
        before = state.stat().st_mtime_ns if state.exists() else 0
        assert wanted
        kernel.until(lambda s=state, b=before: s.exists() and s.stat().st_mtime_ns > b, "a step")
        os.kill(kernel.job(job).pid or 0, signal.SIGKILL)
    done = kernel.ended(job)
    assert (done.state, done.attempt, done.result) == (JobState.DONE, 6, {"total": 820})
    assert not (kernel.folder(job) / "checkpoint").exists()


def test_a_worker_without_a_pulse_is_killed_and_replaced(kernel: Kernel, tmp_path: Path) -> None:
    job = kernel.submit("wait", {"until": str(tmp_path / "go")})
    first = kernel.noted(job) and kernel.job(job).pid
    assert first
    os.kill(first, signal.SIGSTOP)
    patience, kernel.scheduler._heartbeat = kernel.scheduler._heartbeat, 0.5
    kernel.until(lambda: kernel.job(job).attempt == 2)
    kernel.scheduler._heartbeat = patience
    assert not alive(first)
    lost = kernel.events(job, "state")[-1].data
    assert (lost["state"], lost["reason"]) == ("queued", "lost")
    assert "no sign of life" in lost["text"]
    (tmp_path / "go").touch()
    assert kernel.ended(job).state is JobState.DONE


def test_cancel_leaves_no_orphan(kernel: Kernel) -> None:
    job = kernel.submit("breed", {"stay": True})
    pids = [int(word) for word in kernel.noted(job).split()]
    kernel.store.jobs.request_stop(job.id)
    ended = kernel.ended(job)
    assert (ended.state, ended.reason) == (JobState.STOPPED, Reason.USER)
    assert not any(alive(pid) for pid in pids)


def test_cancel_of_a_worker_that_does_not_listen_leaves_nothing_of_its_output(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home", grace=0.1) as kernel:
        job = kernel.submit("stubborn", {})
        kernel.noted(job)
        assert (kernel.folder(job) / "out" / "half").exists()
        kernel.store.jobs.request_stop(job.id)
        assert kernel.ended(job).state is JobState.STOPPED
        kernel.until(lambda: not (kernel.folder(job) / "out").exists())


def test_cancel_reaches_children_but_not_services(kernel: Kernel, tmp_path: Path) -> None:
    children = {"up": {"op": "serve", "spec": {"endpoint": "news"}}, "slow": {"op": "wait", "spec": {}}}
    job = kernel.submit("parent", {"children": children, "at_once": True})
    kernel.until(lambda: len(kernel.store.jobs.list(states=[JobState.RUNNING])) == 3)
    kernel.store.jobs.request_stop(job.id)
    assert kernel.ended(job).state is JobState.STOPPED
    by_key = {child.child_key: child for child in kernel.store.jobs.list(parent=job.id)}
    assert kernel.ended(by_key["slow"]).state is JobState.STOPPED
    assert kernel.job(by_key["up"]).state is JobState.RUNNING


def test_a_failed_parent_takes_its_children_with_it(kernel: Kernel) -> None:
    children = {"bad": {"op": "fail", "spec": {"how": "refuse"}}, "slow": {"op": "wait", "spec": {}}}
    job = kernel.submit("parent", {"children": children, "at_once": True, "strict": True})
    assert kernel.ended(job).state is JobState.FAILED
    slow = next(child for child in kernel.store.jobs.list(parent=job.id) if child.child_key == "slow")
    assert kernel.ended(slow).state is JobState.STOPPED


def test_a_parent_hears_of_its_children(kernel: Kernel) -> None:
    children = {
        "a": {"op": "write", "spec": {"text": "a"}, "name": "letter"},
        "again": {"op": "write", "spec": {"text": "a"}, "name": "other"},
        "bad/key é": {"op": "fail", "spec": {"how": "refuse"}},
        "unknown": {"op": "nothing", "spec": {}},
        "huge": {"op": "write", "spec": {"text": "a"}, "inputs": {"model": "sha256:" + "0" * 64}},
    }
    job = kernel.ended(kernel.submit("parent", {"children": children}))
    assert job.state is JobState.DONE
    heard: dict[str, Any] = dict(job.result or {})
    assert (heard["a"]["state"], heard["a"]["cached"], heard["a"]["ref"]) == ("done", False, "letter@1")
    assert (heard["again"]["state"], heard["again"]["cached"], heard["again"]["ref"]) == ("done", True, "other@1")
    assert heard["again"]["output"] == heard["a"]["output"]
    assert heard["bad/key é"]["error"]["code"] == "data"
    assert heard["unknown"]["error"]["code"] == "spec"
    assert heard["huge"]["error"]["code"] == "not_found"


def test_a_parent_hands_on_its_input_says_what_children_need_and_stops_one(kernel: Kernel) -> None:
    base = kernel.ended(kernel.submit("write", {"text": "base "}, name="base"))
    job = kernel.ended(kernel.submit("choose", {}, {"model": base.output or ""}))
    assert job.result == {"dropped": "stopped", "why": "user"}
    children = {child.child_key: child for child in kernel.store.jobs.list(parent=job.id)}
    assert {key: child.inputs["model"] for key, child in children.items()} == dict.fromkeys(
        ("keep", "drop"), base.output
    )
    assert {child.placement.cores for child in children.values() if child.placement} == {1}, "not all that are free"
    assert (kernel.store.catalog.path(children["keep"].output or "") / "text.txt").read_text() == "base kept"
    assert children["keep"].state is JobState.DONE, "what has ended is not stopped"


def test_a_whole_family_is_fresh_where_its_root_is(kernel: Kernel, tmp_path: Path) -> None:
    letter = {"op": "write", "spec": {"text": "a", "log": str(tmp_path / "log")}, "name": "a"}
    inner = {"op": "parent", "spec": {"children": {"letter": letter}}}
    for fresh in (False, False, True):
        kernel.ended(kernel.submit("parent", {"children": {"inner": inner}, "fresh": fresh}))
    assert (tmp_path / "log").read_text().split() == ["a", "a"]


def test_a_restarted_parent_finds_its_children_again(kernel: Kernel, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    children = {k: {"op": "write", "spec": {"text": k, "log": log}, "name": k} for k in "abc"}
    job = kernel.submit("parent", {"children": children, "log": str(tmp_path / "parents"), "die_after": "b"})
    done = kernel.ended(job)
    assert (done.state, done.attempt) == (JobState.DONE, 2)
    assert Path(log).read_text().split() == ["a", "b", "c"]
    assert len(kernel.store.jobs.list(parent=job.id)) == 3
    assert set(done.result or {}) == set("abc")


def test_the_same_work_is_found_done(kernel: Kernel, tmp_path: Path) -> None:
    spec = {"text": "one", "log": str(tmp_path / "log")}
    first = kernel.ended(kernel.submit("write", spec, name="first"))
    second = kernel.submit("write", spec, name="second")
    assert (second.state, second.reason, second.output) == (JobState.DONE, Reason.CACHED, first.output)
    assert second.id != first.id
    assert second.result == first.result
    assert kernel.store.catalog.get("second@1").digest == first.output
    fresh = kernel.ended(kernel.submit("write", spec, name="first", fresh=True))
    assert fresh.reason is Reason.FINISHED
    assert kernel.submit("write", spec | {"text": "two"}, name="first").state is JobState.QUEUED
    assert (tmp_path / "log").read_text().split() == ["one", "one"]


def test_the_same_request_twice_is_one_job(kernel: Kernel) -> None:
    assert kernel.submit("wait", {"a": 1}).id == kernel.submit("wait", {"a": 1}).id
    assert kernel.submit("parent", {"children": {}}).id == kernel.submit("parent", {"children": {}}).id
    assert kernel.submit("wait", {"a": 2}).id != kernel.submit("wait", {"a": 1}).id


def test_twins_under_two_names_compute_once(kernel: Kernel, tmp_path: Path) -> None:
    spec = {"text": "one", "log": str(tmp_path / "log")}
    first, second = (kernel.submit("write", spec, name=name) for name in ("first", "second"))
    assert first.id != second.id
    assert (kernel.ended(first).reason, kernel.ended(second).reason) == (Reason.FINISHED, Reason.CACHED)
    assert kernel.store.catalog.get("second@1").digest == kernel.store.catalog.get("first@1").digest
    assert (tmp_path / "log").read_text().split() == ["one"]


def test_a_waiting_job_says_why(kernel: Kernel, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = kernel.submit("wait", {"until": str(go)}, name="long", needs=Needs(cores=2, memory=1 << 20))
    kernel.noted(first)
    second = kernel.submit("write", {"text": "x"}, name="short")
    kernel.until(lambda: kernel.job(second).waiting)
    assert kernel.job(second).waiting == f"needs 1 core, 0 are free; job {first.id} (wait long) holds 2"
    go.touch()
    assert kernel.ended(second).waiting == ""


def test_what_can_never_run_is_refused(kernel: Kernel) -> None:
    with pytest.raises(NeedsError, match="needs 5 cores; this machine has 2"):
        kernel.submit("wait", {}, needs=Needs(cores=5))
    with pytest.raises(SpecError, match="unknown operation"):
        kernel.submit("nothing", {})
    with pytest.raises(NotFoundError, match="not in the store"):
        kernel.submit("wait", {}, {"model": "sha256:" + "0" * 64})
    with pytest.raises(SpecError, match="cannot be a name"):
        kernel.submit("write", {"text": ""}, name="../up")
    with pytest.raises(SpecError, match="not plain JSON"):
        kernel.submit("wait", {"x": float("inf")})
    assert kernel.store.jobs.list() == []


def test_lines_that_are_no_events_do_no_harm(kernel: Kernel) -> None:
    job = kernel.ended(kernel.submit("babble", {}))
    assert job.state is JobState.DONE
    assert [e.data["text"] for e in kernel.events(job, "note")] == ["before", "after ?"]
    assert len(kernel.events(job, "error")) == 6
    progress = kernel.events(job, "progress")
    assert progress[-1].data == {"step": 1000, "total": 1000, "loss": "nan"}
    assert len(progress) < 100


def test_one_scheduler_a_store(kernel: Kernel) -> None:
    kernel.tick()
    other = SchedulerLock(kernel.store.home)
    holder = other.holder()
    assert holder is not None
    assert holder.pid == os.getpid()
    assert not other.try_acquire()
    with Kernel(kernel.store.home) as other_kernel, pytest.raises(ConflictError, match=f"process {os.getpid()} runs"):
        other_kernel.tick()
    kernel.scheduler.lock.release()
    assert other.holder() is None
    assert other.try_acquire("http://127.0.0.1:1")
    assert kernel.scheduler.lock.holder() == type(holder)(os.getpid(), "http://127.0.0.1:1")
    other.release()


def test_a_scope_runs_only_its_own_and_says_so(tmp_path: Path) -> None:
    mine: set[int] = set()
    with Kernel(tmp_path / "home", scope=lambda job: job.root in mine) as kernel:
        other = kernel.submit("write", {"text": "other"}, name="other")
        child = {"a": {"op": "write", "spec": {"text": "child"}, "name": "child"}}
        job = kernel.submit("parent", {"children": child})
        mine.add(job.id)
        assert kernel.ended(job).state is JobState.DONE
        assert kernel.job(other).state is JobState.QUEUED
        assert "llmo up" in kernel.job(other).waiting


def test_an_embedded_parent_adopts_what_it_waits_for(tmp_path: Path) -> None:
    mine: set[int] = set()
    with Kernel(tmp_path / "home", scope=lambda job: job.root in mine) as kernel:
        stray = kernel.submit("serve", {"endpoint": "news"})
        job = kernel.submit("parent", {"children": {"up": {"op": "serve", "spec": {"endpoint": "news"}}}})
        mine.add(job.id)
        done = kernel.ended(job)
        assert (done.result or {})["up"]["state"] == "running"
        assert kernel.job(stray).state is JobState.RUNNING


def test_shutdown_queues_what_it_interrupts_and_stops_what_was_asked(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as kernel:
        batch = kernel.submit("count", {"steps": 10**6, "pause": 0.005, "log": str(tmp_path / "log")})
        asked = kernel.submit("wait", {})
        service = kernel.submit("serve", {"endpoint": "news"}, needs=Needs(cores=0))
        for job in (batch, asked, service):
            kernel.reached(job, "running")
        kernel.store.jobs.request_stop(asked.id)
        kernel.scheduler.shutdown()
        assert (kernel.job(batch).state, kernel.job(batch).reason) == (JobState.QUEUED, Reason.PREEMPTED)
        assert (kernel.job(asked).state, kernel.job(asked).reason) == (JobState.STOPPED, Reason.USER)
        assert kernel.job(service).state is JobState.QUEUED
        assert (kernel.store.endpoints.get("news").state, kernel.store.endpoints.get("news").address) == ("down", None)
        assert kernel.scheduler.lock.holder() is None
    with Kernel(tmp_path / "home") as again:
        again.reached(service, "running")
        again.until(lambda: again.store.endpoints.get("news").state == "up")
        assert again.reached(batch, "running").max_attempts == 4


def test_shutdown_may_keep_services(kernel: Kernel) -> None:
    service = kernel.submit("serve", {"endpoint": "news"})
    job = kernel.submit("wait", {})
    for running in (service, job):
        kernel.reached(running, "running")
    kernel.scheduler.shutdown(keep_services=True)
    assert kernel.job(job).state is JobState.QUEUED
    assert kernel.job(service).state is JobState.RUNNING
    kernel.reached(job, "running")


def test_run_goes_on_until_stop(kernel: Kernel) -> None:
    thread = threading.Thread(target=kernel.scheduler.run)
    thread.start()
    try:
        job = kernel.submit("write", {"text": "x"}, name="x")
        kernel.scheduler.wake()
        until(lambda: kernel.job(job).state.ended, lambda: threading.Event().wait(0.01))
    finally:
        kernel.scheduler.stop()
        thread.join()
    assert kernel.job(job).state is JobState.DONE
