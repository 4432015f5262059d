"""The order of the line: who may overtake whom, and until when."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llmo.files import storage_errors
from llmo.kernel import line, scheduler, staging
from llmo.types import Device, JobState, Needs
from support.kernel import Kernel

MIB = 1 << 20
WIDE = Needs(cores=2, memory=MIB)
NARROW = Needs(cores=1, cores_max=1, memory=MIB)


def test_the_oldest_goes_first(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home", [Device("cpu", "cpu", 1 << 30, 1 << 30, cores=1)]) as kernel:
        jobs = [kernel.submit("write", {"text": str(n)}, name="x") for n in range(3)]
        kernel.until(lambda: all(kernel.job(job).state.ended for job in jobs))
        began = [kernel.job(job).started_at or 0.0 for job in jobs]
        assert began == sorted(began)


@pytest.mark.parametrize("patience", [3600.0, 0.0])
def test_a_small_job_overtakes_a_large_one_but_not_for_ever(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(line, "_PATIENCE_SECONDS", patience)
    go = tmp_path / "go"
    first = kernel.submit("wait", {"until": str(go)}, needs=NARROW)
    kernel.noted(first)
    large = kernel.submit("wait", {"until": str(go), "large": 1}, needs=WIDE)
    small = kernel.submit("wait", {"until": str(go), "small": 1}, needs=NARROW)
    free = kernel.submit("wait", {"until": str(go), "free": 1}, needs=Needs(cores=0))
    kernel.until(lambda: kernel.job(large).waiting)
    kernel.until(lambda: kernel.job(small).waiting or kernel.job(small).state is JobState.RUNNING)
    if patience:
        assert kernel.job(small).waiting == ""
    else:
        assert kernel.job(small).waiting == f"waits for job {large.id} (wait), which came first"
    kernel.reached(free, "running")
    go.touch()
    for job in (first, large, small, free):
        assert kernel.ended(job).state is JobState.DONE


def test_a_job_that_only_an_endpoint_keeps_out_holds_nobody_back(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "_PATIENCE_SECONDS", 0.0)
    kernel.reached(kernel.submit("serve", {"endpoint": "news"}), "running")
    large = kernel.submit("wait", {"large": 1}, needs=WIDE)
    small = kernel.submit("write", {"text": "x"}, name="x")
    assert kernel.ended(small).state is JobState.DONE
    assert "endpoint news (job 1) holds 1" in kernel.job(large).waiting


def test_a_folder_that_cannot_be_made_keeps_only_its_job_waiting(kernel: Kernel) -> None:
    first = kernel.submit("write", {"text": "a"}, name="a")
    second = kernel.submit("write", {"text": "b"}, name="b")
    kernel.folder(first).parent.mkdir()
    kernel.folder(first).write_text("in the way")
    assert kernel.ended(second).state is JobState.DONE
    assert "cannot be made" in kernel.job(first).waiting
    kernel.folder(first).unlink()
    assert kernel.ended(first).state is JobState.DONE


def test_an_input_that_is_gone_fails_its_job(kernel: Kernel) -> None:
    made = kernel.ended(kernel.submit("write", {"text": "a"}, name="a")).output or ""
    job = kernel.submit("write", {"text": "b"}, {"model": made}, name="b")
    (kernel.store.catalog.path(made) / "text.txt").unlink()
    ended = kernel.ended(job)
    assert (ended.state, (ended.error or {})["code"]) == (JobState.FAILED, "storage")


def test_fresh_work_is_not_taken_from_what_was_there(kernel: Kernel, tmp_path: Path) -> None:
    spec = {"text": "a", "log": str(tmp_path / "log")}
    kernel.ended(kernel.submit("write", spec, name="a"))
    jobs = [kernel.submit("write", spec, name=name, fresh=True) for name in "ab"]
    reasons = [kernel.ended(job).reason for job in jobs]
    assert reasons == ["finished", "cached"]
    assert (tmp_path / "log").read_text().split() == ["a", "a"]


def test_a_full_disk_delays_publishing_and_loses_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    publish = staging.publish

    def full_at_first(*args: object) -> object:
        tries.append(time.monotonic())
        with storage_errors(Path("/full")):
            if len(tries) < 3:
                raise OSError(28, "No space left on device")
        return publish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "publish", full_at_first)
    monkeypatch.setattr(scheduler, "_TROUBLE_SECONDS", 0.05)
    job = kernel.submit("write", {"text": "a"}, name="a")
    kernel.until(lambda: "is full" in kernel.scheduler.trouble)
    done = kernel.ended(job)
    assert (done.state, done.attempt, len(tries)) == (JobState.DONE, 1, 3)
    kernel.tick()
    assert kernel.scheduler.trouble == ""
