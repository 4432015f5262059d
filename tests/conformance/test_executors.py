"""What every executor must do, whatever it runs jobs on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmo.kernel.executor import DONE, FAILED, OUT_OF_MEMORY, STOPPED, Executor, Exit, Handle
from llmo.kernel.local import LocalExecutor
from llmo.types import Placement
from support.kernel import TESTS, alive, lay_out, until

EXECUTORS = {"local": lambda: LocalExecutor({"PYTHONPATH": TESTS})}
ONE = Placement(1, 1 << 20)


@pytest.fixture(params=sorted(EXECUTORS))
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made = EXECUTORS[request.param]()
    yield made
    made.close()


def ended(executor: Executor, handle: Handle) -> Exit:
    return until(lambda: executor.poll(handle), lambda: executor.wait(0.05), "the worker's end")


def said(folder: Path, word: str) -> bool:
    path = folder / "events.jsonl"
    return path.exists() and word in path.read_text()


def bred(folder: Path) -> list[int]:
    first = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
    return [int(word) for word in first["data"]["text"].split()]


@pytest.mark.parametrize(
    ("op", "spec", "code"),
    [
        ("write", {"text": "hello"}, DONE),
        ("fail", {"how": "refuse"}, FAILED),
        ("fail", {"how": "memory"}, OUT_OF_MEMORY),
        ("fail", {"how": "die"}, -9),
    ],
)
def test_exit_codes(executor: Executor, tmp_path: Path, op: str, spec: dict[str, str], code: int) -> None:
    handle = executor.start(lay_out(tmp_path / "7", op, spec), ONE)
    end = ended(executor, handle)
    assert (end.code, end.asked) == (code, False)
    assert executor.poll(handle) == end
    assert (tmp_path / "7" / "out" / "manifest.json").exists() == (code == DONE)


def test_stop_is_heard_by_a_worker_that_listens(executor: Executor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "wait", {})
    handle = executor.start(folder, ONE)
    until(lambda: said(folder, "waiting"), lambda: executor.wait(0.05))
    assert executor.poll(handle) is None
    executor.stop(handle, 60)
    assert ended(executor, handle) == Exit(STOPPED)


def test_stop_before_the_worker_has_begun(executor: Executor, tmp_path: Path) -> None:
    handle = executor.start(lay_out(tmp_path / "7", "wait", {}), ONE)
    executor.stop(handle, 60)
    assert ended(executor, handle).code in (STOPPED, -15)


def test_stop_kills_one_that_does_not_listen(executor: Executor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "stubborn", {})
    handle = executor.start(folder, ONE)
    until(lambda: said(folder, "begun"), lambda: executor.wait(0.05))
    executor.stop(handle, 0.05)
    assert ended(executor, handle) == Exit(-9, asked=True)


@pytest.mark.parametrize("spec", [{"stay": True}, {}, {"vanish": True}])
def test_nothing_a_worker_started_outlives_it(executor: Executor, tmp_path: Path, spec: dict[str, bool]) -> None:
    folder = lay_out(tmp_path / "7", "breed", spec)
    handle = executor.start(folder, ONE)
    until(lambda: said(folder, "note"), lambda: executor.wait(0.05))
    pids = bred(folder)
    assert len(pids) == 2
    executor.stop(handle, 60)
    ended(executor, handle)
    assert not any(alive(pid) for pid in (*pids, handle.pid))


def test_close_leaves_nothing(executor: Executor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "breed", {"stay": True})
    handle = executor.start(folder, ONE)
    until(lambda: said(folder, "note"), lambda: executor.wait(0.05))
    pids = bred(folder)
    executor.close()
    assert not any(alive(pid) for pid in (*pids, handle.pid))
    executor.close()


def test_reclaim_ends_what_another_executor_started(executor: Executor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "breed", {"stay": True})
    handle = executor.start(folder, ONE)
    until(lambda: said(folder, "note"), lambda: executor.wait(0.05))
    pids = bred(folder)
    for known in (handle.pid, handle.started), (None, None):
        executor.reclaim(folder, *known)
        assert not any(alive(pid) for pid in (*pids, handle.pid))
    assert ended(executor, handle).code == -9


def test_reclaim_spares_a_stranger_with_the_number(executor: Executor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "wait", {})
    handle = executor.start(folder, ONE)
    executor.reclaim(tmp_path / "8", handle.pid, handle.started - 100)
    executor.reclaim(tmp_path / "8", handle.pid, None)
    executor.reclaim(tmp_path / "8", os.getpid(), None)
    until(lambda: said(folder, "waiting"), lambda: executor.wait(0.05))
    assert executor.poll(handle) is None


def test_wake_ends_a_wait(executor: Executor) -> None:
    executor.wake()
    executor.wait(3600)


def test_the_worker_rings_when_it_has_something_to_say(executor: Executor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "wait", {})
    executor.start(folder, ONE)
    executor.wait(3600)
    assert said(folder, "waiting")


def test_output_goes_to_the_log_and_not_elsewhere(
    executor: Executor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = lay_out(tmp_path / "7", "write", {"text": "hello"})
    ended(executor, executor.start(folder, ONE))
    assert "wrote hello" in (folder / "output.log").read_text()
    assert capfd.readouterr() == ("", "")
