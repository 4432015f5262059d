"""Endpoints that give way: who does, who never, when, and that they come back."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.errors import NeedsError, StorageError
from llmo.kernel import paging, service
from llmo.kernel.paging import Use
from llmo.kernel.placement import make_room
from llmo.specs import adapter_bytes
from llmo.store import Store
from llmo.types import Device, Endpoint, Job, JobState, Kind, Needs, Reason
from support.kernel import DEVICES, Kernel, alive

MIB = 1 << 20


@given(st.lists(st.integers(0, 5)), st.integers(0, 20))
def test_no_more_leave_than_must_and_the_first_before_the_last(sizes: list[int], free: int) -> None:
    movable = list(enumerate(sizes))
    leaving = make_room(movable, lambda staying: sum(size for _, size in staying) <= free)
    assert leaving is not None, "it fits when nobody stays"
    assert leaving == sorted(leaving)
    held = sum(sizes) - sum(size for _, size in leaving)
    assert held <= free
    assert all(held + size > free for _, size in leaving), "each of them had to leave"
    if sizes and set(sizes) == {1}:
        assert leaving == movable[: len(leaving)]
    assert make_room(movable, lambda staying: False) is None


@dataclass
class Requests:
    """What a gateway would know: it sends requests where the store says, and counts them as the test wants."""

    store: Store | None = None
    asked: dict[str, int] = field(default_factory=dict)
    outstanding: dict[str, int] = field(default_factory=dict)
    at: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, address: str) -> Use:
        assert self.store is not None
        found = service.find(self.store, name)
        is_open = found is not None and found.address == address
        return Use(is_open, self.asked.get(name, 0), self.outstanding.get(name, 0), self.at.get(name, 0.0))


class Paged(Kernel):
    """A kernel with a gateway."""

    def __init__(self, home: Path, devices: list[Device] = DEVICES) -> None:
        self.requests = Requests()
        super().__init__(home, devices, usage=self.requests)
        self.requests.store = self.store

    def endpoint(self, name: str) -> Endpoint:
        return self.store.endpoints.get(name)

    def deploy(self, name: str, **spec: Any) -> Job:
        return self.submit("serve", {"endpoint": name, "cores": 1, **spec})

    def up(self, name: str, **spec: Any) -> Job:
        return self.reached(self.deploy(name, **spec), "running")

    def use(self, *names: str) -> None:
        """One request each, in this order, all answered."""
        far = 1e9 + max(self.requests.at.values(), default=0.0)
        self.requests.at |= {name: far + number for number, name in enumerate(names)}

    def wake(self, name: str) -> None:
        self.store.endpoints.want(name)
        self.until(lambda: self.endpoint(name).state == "up", f"{name} to be up")

    def states(self, names: str) -> list[str]:
        return [self.endpoint(name).state for name in names]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Paged]:
    with Paged(tmp_path / "home") as made:
        yield made


def test_the_least_recently_used_gives_way_and_wakes_when_it_is_asked(kernel: Paged) -> None:
    a, b = kernel.up("a"), kernel.up("b")
    kernel.use("b", "a")
    c = kernel.up("c")
    kernel.until(lambda: kernel.job(b).waiting)
    assert kernel.states("abc") == ["up", "asleep", "up"]
    slept = kernel.job(b)
    assert (slept.state, slept.reason, slept.attempt) == (JobState.QUEUED, Reason.PREEMPTED, 2)
    assert slept.waiting == f"asleep: gave way to endpoint c (job {c.id}); the next request wakes it"
    assert (kernel.endpoint("b").address, kernel.endpoint("b").waiting) == (None, slept.waiting)
    assert not alive(b.pid or 0)
    kernel.use("a", "c")
    for _ in range(20):
        kernel.tick()
    assert kernel.states("abc") == ["up", "asleep", "up"], "nobody asked"
    kernel.wake("b")
    kernel.until(lambda: kernel.job(a).waiting)
    assert kernel.states("abc") == ["asleep", "up", "up"]
    assert kernel.job(b).max_attempts > kernel.job(b).attempt, "sleeping costs it no attempt"


def test_pinned_ones_stay_and_what_cannot_fit_beside_them_is_refused(kernel: Paged) -> None:
    kernel.up("a", pinned=True)
    b = kernel.up("b")
    kernel.use("a", "b")
    kernel.up("c", pinned=True)
    kernel.until(lambda: kernel.job(b).waiting)
    assert kernel.states("abc") == ["up", "asleep", "up"]
    assert kernel.endpoint("a").deploy["pinned"] is True
    refused = kernel.ended(kernel.deploy("d"))
    assert (refused.error or {})["code"] == NeedsError.code
    assert "pinned endpoint a (job 1) holds 1" in (refused.error or {})["what"]
    kernel.store.endpoints.want("b")
    kernel.until(lambda: "pinned endpoint" in kernel.job(b).waiting)
    assert kernel.states("abc") == ["up", "waking", "up"], "it waits for a pinned one to be taken down"


def test_a_pinned_one_gives_way_to_its_own_successor(kernel: Paged) -> None:
    wide = Needs(cores=1, cores_max=1, memory=3 << 30)  # of four
    old = kernel.reached(kernel.submit("serve", {"endpoint": "a", "cores": 1, "pinned": True}, needs=wide), "running")
    kernel.use("a")
    new = kernel.reached(kernel.submit("serve", {"endpoint": "a", "cores": 1}, needs=wide), "running")
    kernel.ended(old)
    assert (kernel.endpoint("a").state, kernel.endpoint("a").job) == ("up", new.id)
    assert not kernel.endpoint("a").deploy.get("pinned")


def test_deploying_what_sleeps_wakes_it(kernel: Paged) -> None:
    a = kernel.up("a")
    kernel.up("b")
    kernel.use("a", "b")
    kernel.up("c")
    kernel.until(lambda: kernel.job(a).waiting)
    assert kernel.endpoint("a").state == "asleep"
    assert kernel.up("a").id == a.id
    assert kernel.endpoint("a").state == "up"


def test_a_sleep_that_cannot_be_written_is_tried_again(kernel: Paged, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.up("a")
    kernel.up("b")
    kernel.use("a", "b")
    write, failures = kernel.store.endpoints.point, []

    def point(*arguments: Any, **more: Any) -> None:
        if not failures:
            failures.append(arguments)
            raise StorageError("the disk is full") from OSError(errno.ENOSPC, "no space")
        write(*arguments, **more)

    monkeypatch.setattr(kernel.store.endpoints, "point", point)
    kernel.up("c")
    assert failures
    assert kernel.states("abc") == ["asleep", "up", "up"]


def test_requests_under_way_are_answered_first(kernel: Paged, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = kernel.up("a"), kernel.up("b")
    kernel.use("a", "b")
    kernel.requests.outstanding = {"a": 1, "b": 1}
    c = kernel.deploy("c")
    kernel.until(lambda: kernel.job(c).waiting)
    assert kernel.states("ab") == ["up", "up"], "both are in use, and their turn is not over"
    monkeypatch.setattr(paging, "_TURN_SECONDS", 0.0)
    kernel.until(lambda: kernel.endpoint("a").state == "asleep", "a to give way")
    for _ in range(20):
        kernel.tick()
    assert kernel.job(a).state is JobState.RUNNING, "it still answers"
    assert kernel.job(c).waiting.endswith("room is being made")
    kernel.requests.outstanding["a"] = 0
    kernel.reached(c, "running")
    assert kernel.job(b).pid == b.pid


def test_who_has_just_woken_stays_for_those_who_wait_for_it(kernel: Paged) -> None:
    kernel.up("a")
    b = kernel.up("b")
    kernel.use("a", "b")
    kernel.requests.asked = {"a": 2, "b": 3}
    c = kernel.deploy("c")
    kernel.until(lambda: kernel.job(c).waiting)
    assert kernel.states("ab") == ["up", "up"]
    kernel.requests.asked["b"] = 0
    kernel.reached(c, "running")
    kernel.until(lambda: kernel.job(b).waiting)
    assert kernel.states("abc") == ["up", "asleep", "up"]


def test_jobs_wait_for_endpoints_unless_they_are_short(kernel: Paged) -> None:
    kernel.up("a")
    kernel.up("b")
    kernel.use("a", "b")
    training = kernel.submit("write", {"text": "long"}, name="long", needs=Needs(cores=1, memory=MIB))
    kernel.until(lambda: kernel.job(training).waiting)
    assert kernel.states("ab") == ["up", "up"]
    short = kernel.submit("short", {"text": "x"}, name="x")
    assert kernel.ended(short).state is JobState.DONE
    assert kernel.states("ab") == ["asleep", "up"]
    began = [kernel.ended(job).started_at or 0.0 for job in (short, training)]
    assert began == sorted(began), "the room that was made for it was its own"


def test_memory_that_endpoints_may_take_together(tmp_path: Path) -> None:
    devices = [Device("cpu", "cpu", 4 << 30, 4 << 30, cores=8, serve_memory=2 * MIB)]
    with Paged(tmp_path / "home", devices) as kernel:
        kernel.up("a")
        kernel.up("b")
        kernel.use("a", "b")
        beside = kernel.submit("write", {"text": "x"}, name="x", needs=Needs(cores=1, cores_max=1, memory=3 * MIB))
        assert kernel.ended(beside).state is JobState.DONE
        kernel.up("c")
        kernel.until(lambda: kernel.endpoint("a").waiting)
        assert kernel.states("abc") == ["asleep", "up", "up"]
        with pytest.raises(NeedsError, match="LLMO may use 2 MiB"):
            kernel.submit("serve", {"endpoint": "d"}, needs=Needs(memory=3 * MIB))


def test_a_service_needs_memory_for_its_weights(kernel: Paged) -> None:
    model = kernel.ended(kernel.submit("write", {"text": "x" * MIB}, name="model")).output or ""
    job = kernel.submit("serve", {"endpoint": "a", "cache_mib": 64}, {"model": model})
    stored = kernel.store.catalog.find(model)
    assert stored is not None
    assert stored.size > MIB
    assert job.needs.memory == MIB + stored.size
    card = {"task": {"task": "generation"}}
    (kernel.store.home / "made").mkdir()
    (kernel.store.home / "made" / "weights").write_bytes(bytes(10))
    chat = kernel.store.catalog.publish(Kind.MODEL, "chat", kernel.store.home / "made", card, job=None, inputs={})
    job = kernel.submit("serve", {"endpoint": "b", "cache_mib": 64}, {"model": chat.digest})
    assert job.needs.memory == MIB + chat.size + 64 * MIB
    with_adapters = {"cache_mib": 64, "adapters_mib": 32}
    job = kernel.submit("serve", {"endpoint": "c", **with_adapters, "engine": "torch"}, {"model": chat.digest})
    assert job.needs.memory == MIB + chat.size + 96 * MIB
    job = kernel.submit("serve", {"endpoint": "d", **with_adapters, "engine": "llamacpp"}, {"model": chat.digest})
    assert job.needs.memory == MIB + chat.size + 64 * MIB
    for engine, adapters in (("torch", 32), ("onnx", 0)):
        made = kernel.store.home / engine
        made.mkdir()
        (made / "weights").write_bytes(engine.encode())
        card = {"task": {"task": "text-classification"}, "engine": engine}
        topics = kernel.store.catalog.publish(Kind.MODEL, "topics", made, card, job=None, inputs={})
        job = kernel.submit("serve", {"endpoint": engine, **with_adapters}, {"model": topics.digest})
        assert job.needs.memory == MIB + topics.size + adapters * MIB


def test_memory_for_adapters_where_nothing_is_said_of_it() -> None:
    for unsaid in ({}, {"adapters_mib": None}):
        assert adapter_bytes(unsaid, generates=True) == 512 * MIB
        assert adapter_bytes(unsaid, generates=False) == 64 * MIB
    assert adapter_bytes({"adapters_mib": 0}, generates=True) == 0


def test_who_sleeps_still_sleeps_after_a_kill_and_wakes_then(tmp_path: Path) -> None:
    one = [replace(DEVICES[0], cores=1)]
    kernel = Paged(tmp_path / "home", one)
    a = kernel.up("a")
    b = kernel.up("b")
    kernel.until(lambda: kernel.job(a).waiting)
    assert kernel.states("ab") == ["asleep", "up"]
    kernel.crash()
    with Paged(tmp_path / "home", one) as again:
        service.bring_down(again.store)
        assert again.states("ab") == ["asleep", "down"]
        again.until(lambda: again.endpoint("b").state == "up")
        assert again.states("ab") == ["asleep", "up"]
        again.wake("a")
        again.until(lambda: again.job(b).waiting)
        assert again.states("ab") == ["up", "asleep"]


def test_a_kill_while_it_answers_its_last_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "_TURN_SECONDS", 0.0)
    one = [replace(DEVICES[0], cores=1)]
    kernel = Paged(tmp_path / "home", one)
    kernel.up("a")
    kernel.requests.outstanding = {"a": 1}
    b = kernel.deploy("b")
    kernel.until(lambda: kernel.endpoint("a").state == "asleep")
    kernel.crash()
    with Paged(tmp_path / "home", one) as again:
        service.bring_down(again.store)
        again.reached(b, "running")
        assert again.states("ab") == ["asleep", "up"]


def test_a_waking_endpoint_that_fails_is_down(kernel: Paged, tmp_path: Path) -> None:
    a = kernel.up("a", fail_if=str(tmp_path / "bad"))
    kernel.up("b")
    kernel.use("a", "b")
    kernel.up("c")
    kernel.until(lambda: kernel.job(a).waiting)
    (tmp_path / "bad").touch()
    kernel.store.endpoints.want("a")
    kernel.ended(a)
    assert kernel.endpoint("a").state == "down"


def test_without_a_gateway_nobody_gives_way(tmp_path: Path) -> None:
    with Kernel(tmp_path / "home") as kernel:
        for name in "ab":
            kernel.reached(kernel.submit("serve", {"endpoint": name, "cores": 1}), "running")
        third = kernel.submit("serve", {"endpoint": "c", "cores": 1})
        kernel.until(lambda: kernel.job(third).waiting)
        assert [kernel.store.endpoints.get(name).state for name in "ab"] == ["up", "up"]
