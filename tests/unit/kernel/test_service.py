"""Services and endpoints: swaps, deaths and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmo.errors import NeedsError
from llmo.kernel import service
from llmo.store import Store
from llmo.types import Device, JobState, Needs, Placement, Reason
from support.kernel import Kernel, alive


def test_a_service_that_answers_has_its_endpoint(kernel: Kernel) -> None:
    model = kernel.ended(kernel.submit("write", {"text": "m"}, name="model")).output or ""
    job = kernel.submit("serve", {"endpoint": "news"}, {"model": model})
    kernel.until(lambda: service.find(kernel.store, "news"))
    assert kernel.store.endpoints.get("news").state == "starting"
    running = kernel.reached(job, "running")
    found = kernel.store.endpoints.get("news")
    assert (found.state, found.job, found.address) == ("up", job.id, running.address)
    assert (found.model, found.model_ref, found.engine, found.precision, found.task) == (
        model,
        "model@1",
        "test",
        "fp32",
        "none",
    )


def test_a_swap_moves_the_name_and_then_drains_the_old(kernel: Kernel) -> None:
    old = kernel.reached(kernel.submit("serve", {"endpoint": "news", "v": 1}), "running")
    new = kernel.submit("serve", {"endpoint": "news", "v": 2})
    kernel.until(lambda: kernel.store.endpoints.get("news").job == new.id)
    assert kernel.store.endpoints.get("news").state == "up"
    ended = kernel.ended(old)
    assert (ended.state, ended.reason) == (JobState.STOPPED, Reason.USER)
    assert not alive(old.pid or 0)
    assert kernel.store.endpoints.get("news").address == kernel.job(new).address


def test_nothing_is_up_when_the_process_that_ran_it_was_killed(kernel: Kernel) -> None:
    job = kernel.submit("serve", {"endpoint": "e"})
    kernel.reached(job, "running")
    kernel.crash()
    store = Store.open(kernel.store.home)
    assert store.endpoints.get("e").state == "up"
    service.bring_down(store)
    found = store.endpoints.get("e")
    assert (found.state, found.address, found.job) == ("down", None, job.id)
    store.close()


def test_an_endpoint_has_the_gpu_it_asks_for(tmp_path: Path) -> None:
    cpu, gpu = Device("cpu", "cpu", 1 << 30, 1 << 30, cores=2), Device("cuda:0", "cuda", 8 << 30, 8 << 30, cores=0)
    with Kernel(tmp_path / "home", [cpu, gpu]) as kernel:
        old = kernel.reached(kernel.submit("serve", {"endpoint": "news", "gpus": 1, "v": 1}), "running")
        assert old.needs.gpus == 1
        assert old.placement is not None
        assert old.placement.gpus == ("cuda:0",)
        new = kernel.reached(kernel.submit("serve", {"endpoint": "news", "gpus": 1, "v": 2}), "running")
        assert kernel.ended(old).state is JobState.STOPPED
        assert new.placement is not None
        assert new.placement.gpus == ("cuda:0",)
    with Kernel(tmp_path / "other", [cpu]) as kernel, pytest.raises(NeedsError, match="needs 1 GPU"):
        kernel.submit("serve", {"endpoint": "news", "gpus": 1})


def test_a_swap_fits_on_a_full_machine(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home", [Device("cpu", "cpu", 1 << 30, 1 << 30, cores=1)]) as kernel:
        old = kernel.reached(kernel.submit("serve", {"endpoint": "news", "v": 1}), "running")
        other = kernel.submit("serve", {"endpoint": "sport"})
        new = kernel.submit("serve", {"endpoint": "news", "v": 2})
        assert kernel.ended(old).state is JobState.STOPPED
        assert kernel.job(new).state is JobState.RUNNING
        assert kernel.job(other).state is JobState.QUEUED


def test_a_refused_model_leaves_the_endpoint_alone(kernel: Kernel) -> None:
    old = kernel.reached(kernel.submit("serve", {"endpoint": "news", "v": 1}), "running")
    bad = kernel.ended(kernel.submit("serve", {"endpoint": "news", "refuse": True}))
    assert (bad.state, bad.attempt, (bad.error or {})["code"]) == (JobState.FAILED, 1, "data")
    assert kernel.store.endpoints.get("news").job == old.id
    assert kernel.store.endpoints.get("news").state == "up"


def test_an_older_service_does_not_take_the_name_back(kernel: Kernel) -> None:
    old = kernel.submit("serve", {"endpoint": "news", "v": 1})
    new = kernel.submit("serve", {"endpoint": "news", "v": 2})
    service.take_over(kernel.store, new, "unix:/new")
    service.take_over(kernel.store, old, "unix:/old")
    assert kernel.store.endpoints.get("news").address == "unix:/new"
    assert kernel.job(old).state is JobState.STOPPED


def test_a_service_that_dies_comes_back_after_a_pause(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_BACKOFF_SECONDS", 0.2)
    die = tmp_path / "die"
    job = kernel.reached(kernel.submit("serve", {"endpoint": "news", "die": str(die)}), "running")
    die.touch()
    kernel.until(lambda: kernel.job(job).waiting)
    assert "started again after a pause" in kernel.job(job).waiting
    assert kernel.store.endpoints.get("news").state == "starting"
    kernel.reached(job, "running")
    assert kernel.job(job).attempt == 2
    assert kernel.store.endpoints.get("news").address == kernel.job(job).address
    for _ in range(2):
        die.touch()
        kernel.until(lambda: not die.exists() and kernel.job(job).state is not JobState.RUNNING)
        kernel.until(lambda: kernel.job(job).state in (JobState.RUNNING, JobState.FAILED))
    assert (kernel.job(job).state, kernel.job(job).reason) == (JobState.FAILED, Reason.LOST)
    assert (kernel.store.endpoints.get("news").state, kernel.store.endpoints.get("news").address) == ("down", None)


def test_backoff_grows_to_its_limit() -> None:
    pauses = [service.backoff(n) for n in range(1, 2000, 3)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.5, 30.0)


def test_cores_of_a_service_are_what_its_spec_says_or_half_of_the_machine(kernel: Kernel) -> None:
    free = kernel.reached(kernel.submit("serve", {"endpoint": "free"}), "running")
    assert (free.needs, free.placement) == (Needs(1, None, 1 << 20), Placement(1, 1 << 20))
    assert kernel.submit("serve", {"endpoint": "told", "cores": 2}).needs == Needs(2, 2, 1 << 20)


def test_the_engine_that_is_told_is_the_one_that_runs() -> None:
    chat, labels = {"task": "generation", "engine": "torch"}, {"task": "text-classification", "engine": "onnx"}
    assert service.engine_of(chat, {"engine": "native"}) == "native"
    assert service.engine_of(chat, {"engine": None}) == "torch"
    assert service.engine_of(labels, {"engine": "native"}) == "onnx"  # there it is not the user's choice
