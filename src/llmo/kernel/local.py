"""Runs jobs on this machine: one process group each, which dies with this process and leaves no orphan."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmo.errors import EnvironmentProblem
from llmo.kernel import processes
from llmo.kernel.devices import oom_kills
from llmo.kernel.executor import Exit, Handle
from llmo.types import Placement

LIFELINE = "LLMO_LIFELINE"
DOORBELL = "LLMO_DOORBELL"
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
# Threads that spin while they wait take the cores that others compute on.
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
_DEATH_SECONDS = 10.0
_REMEMBERED = 1000


@dataclass(slots=True)
class _Running:
    popen: subprocess.Popen[bytes]
    lifeline: int
    pidfd: int
    oom_kills: int
    kill_at: float | None = None
    asked: bool = False
    watched: bool = True


class LocalExecutor:
    """An `Executor` of local processes.

    A worker holds the reading end of its lifeline; when this process ends in any way the kernel closes the
    writing end, and the worker kills its own group. `environment` is added to what workers inherit.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._extra = dict(environment or {})
        self._running: dict[Handle, _Running] = {}
        self._ended: dict[Handle, Exit] = {}
        self._bell, self._ring = os.pipe()
        for end in (self._bell, self._ring):
            os.set_blocking(end, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)

    def start(self, job_dir: Path, placement: Placement) -> Handle:
        reading, lifeline = os.pipe()
        log = None
        kills = oom_kills()
        try:
            log = os.open(job_dir / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "llmo.kernel.worker", str(job_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=job_dir,
                env=self._environment(job_dir, placement, reading),
                pass_fds=(reading, self._ring),
                start_new_session=True,
            )
        except OSError as error:
            os.close(lifeline)
            raise EnvironmentProblem(
                f"the machine cannot start another process: {error.strerror}",
                hint="close other programs, or raise the limits on processes and memory (see `llmo doctor`)",
            ) from error
        finally:
            os.close(reading)
            if log is not None:
                os.close(log)
        process = processes.read(popen.pid)
        handle = Handle(job_dir, popen.pid, process.started if process else 0.0)
        pidfd = os.pidfd_open(popen.pid)
        self._running[handle] = _Running(popen, lifeline, pidfd, kills)
        self._selector.register(pidfd, selectors.EVENT_READ)
        return handle

    def poll(self, handle: Handle) -> Exit | None:
        if handle in self._ended:
            return self._ended[handle]
        running = self._running[handle]
        late = running.kill_at is not None and time.monotonic() >= running.kill_at
        if late:
            running.asked = True
            self._kill(handle)
        # Not reaped before its group is dead: until then its number cannot pass to a stranger.
        if os.waitid(os.P_PID, handle.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        if running.watched:
            # Its end is known: it rings no more while what it started dies.
            running.watched = False
            self._selector.unregister(running.pidfd)
        if self._survivors(handle):
            return None
        return self._reap(handle, running)

    def stop(self, handle: Handle, grace: float) -> None:
        running = self._running.get(handle)
        if running is None:
            return
        deadline = time.monotonic() + grace
        if running.kill_at is None:
            (handle.job_dir / "stop").touch()
            # To the worker alone: its helpers must outlive the checkpoint that it now writes.
            os.kill(handle.pid, signal.SIGTERM)
        running.kill_at = deadline if running.kill_at is None else min(running.kill_at, deadline)

    def reclaim(self, job_dir: Path, pid: int | None, started: float | None) -> None:
        deadline = time.monotonic() + _DEATH_SECONDS
        while left := processes.members(job_dir, pid, started):
            processes.kill(left)
            if time.monotonic() > deadline:
                names = ", ".join(str(process.pid) for process in left)
                raise EnvironmentProblem(
                    f"process {names} of an earlier attempt does not die",
                    hint="it hangs inside the operating system (a dead disk or driver): restart the machine",
                )
            time.sleep(0.005)

    def wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(max(0.0, seconds)):
            if key.fd == self._bell:
                _drain(self._bell)

    def wake(self) -> None:
        try:
            os.write(self._ring, b"w")
        except (BlockingIOError, OSError):
            return  # full, so it rings already; or closed, so nobody waits

    def close(self) -> None:
        for handle in list(self._running):
            self._kill(handle)
            self._running[handle].popen.wait()
            self.reclaim(handle.job_dir, None, None)
            self._reap(handle, self._running[handle])
        if self._bell >= 0:
            self._selector.close()
            os.close(self._bell)
            os.close(self._ring)
            self._bell = self._ring = -1

    def _environment(self, job_dir: Path, placement: Placement, lifeline: int) -> dict[str, str]:
        env = {**_PASSIVE, **os.environ, **self._extra}
        env.pop("LLMO_KEY", None)
        if env.get("PYTHONPATH"):
            # The worker starts in another folder.
            env["PYTHONPATH"] = os.pathsep.join(
                str(Path(p).absolute()) for p in env["PYTHONPATH"].split(os.pathsep) if p
            )
        env |= dict.fromkeys(_THREADS, str(max(1, placement.cores)))
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONUNBUFFERED": "1"}
        env["CUDA_VISIBLE_DEVICES"] = ",".join(name.partition(":")[2] for name in placement.gpus)
        return env | {processes.MARKER: str(job_dir), LIFELINE: str(lifeline), DOORBELL: str(self._ring)}

    def _kill(self, handle: Handle) -> None:
        # Safe while the worker is not reaped: its number, and with it the group's, is still its own.
        try:
            os.killpg(handle.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _survivors(self, handle: Handle) -> bool:
        """Whether anything the worker started outlives it; what does is killed."""
        self._kill(handle)
        left = [p for p in processes.members(handle.job_dir, handle.pid, handle.started) if p.pid != handle.pid]
        processes.kill(left)
        return bool(left)

    def _reap(self, handle: Handle, running: _Running) -> Exit:
        code = running.popen.wait()
        if running.watched:
            self._selector.unregister(running.pidfd)
        os.close(running.pidfd)
        os.close(running.lifeline)
        del self._running[handle]
        killed = code == -signal.SIGKILL and not running.asked
        ended = Exit(code, running.asked, killed and oom_kills() > running.oom_kills)
        self._ended[handle] = ended
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        return ended


def _drain(pipe: int) -> None:
    try:
        while os.read(pipe, 4096):
            pass
    except BlockingIOError:
        return
