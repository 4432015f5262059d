"""What a worker process is given, and that it runs in a session of its own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmo.errors import EnvironmentProblem
from llmo.kernel import processes
from llmo.kernel.executor import Handle
from llmo.kernel.local import LocalExecutor
from llmo.types import Placement
from support.kernel import TESTS, lay_out, until


@pytest.fixture
def executor() -> Iterator[LocalExecutor]:
    made = LocalExecutor({"PYTHONPATH": TESTS})
    yield made
    made.close()


def waiting(executor: LocalExecutor, folder: Path, placement: Placement) -> Handle:
    handle = executor.start(lay_out(folder, "wait", {}), placement)
    until(
        lambda: (folder / "events.jsonl").exists() and (folder / "events.jsonl").read_text(),
        lambda: executor.wait(0.05),
    )
    return handle


def count(folder: str) -> int:
    return sum(1 for _ in os.scandir(folder))


def waits_for_a_lock(pid: int) -> bool:
    return any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_environment_of_a_worker(executor: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMO_KEY", "llmo_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    executor._extra["PYTHONPATH"] = os.pathsep.join((os.path.relpath(TESTS), ""))
    given = environment(waiting(executor, tmp_path / "7", Placement(3, 0, ("cuda:1", "cuda:3"))).pid)
    assert "LLMO_KEY" not in given
    assert {given[name] for name in given if name.endswith(("NUM_THREADS", "MAX_THREADS"))} == {"3"}
    assert given["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert given["PYTHONPATH"] == TESTS
    none = environment(waiting(executor, tmp_path / "8", Placement(0, 0)).pid)
    assert (none["OMP_NUM_THREADS"], none["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def test_a_worker_is_out_of_reach_of_the_terminal(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = waiting(executor, tmp_path / "7", Placement(1, 0))
    assert os.getsid(handle.pid) == os.getpgid(handle.pid) == handle.pid
    assert Path(f"/proc/{handle.pid}/fd/0").resolve() == Path("/dev/null")
    assert Path(f"/proc/{handle.pid}/cwd").resolve() == handle.job_dir


def test_descriptors_are_given_back(executor: LocalExecutor, tmp_path: Path) -> None:
    before = count("/proc/self/fd")
    for number in range(5):
        handle = executor.start(lay_out(tmp_path / str(number), "write", {"text": "x"}), Placement(1, 0))
        until(lambda h=handle: executor.poll(h), lambda: executor.wait(0.05))
    assert count("/proc/self/fd") == before


def test_a_worker_that_cannot_be_started(executor: LocalExecutor, tmp_path: Path) -> None:
    before = count("/proc/self/fd")
    with pytest.raises(EnvironmentProblem, match="cannot start"):
        executor.start(tmp_path / "nowhere", Placement(1, 0))
    assert count("/proc/self/fd") == before


def test_two_attempts_of_one_job_never_run_side_by_side(executor: LocalExecutor, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "7", "wait", {})
    with open(folder / "lock", "wb") as other_attempt:
        fcntl.flock(other_attempt, fcntl.LOCK_EX)
        handle = executor.start(folder, Placement(1, 0))
        until(lambda: waits_for_a_lock(handle.pid), lambda: executor.wait(0.01), "it to wait")
        assert not (folder / "events.jsonl").exists()
    until((folder / "events.jsonl").exists, lambda: executor.wait(0.05))


def test_processes_are_told_apart_by_their_start() -> None:
    me = processes.read(os.getpid())
    assert me is not None
    assert me.alive
    assert me.group == os.getpgid(0)
    assert processes.read(2**22 + 1) is None
    assert processes.members(Path("/no/such/job")) == []
    processes.kill([processes.Process(me.pid, me.state, me.group, me.session, me.started - 1)])
