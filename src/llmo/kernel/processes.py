"""Reads `/proc`: which processes belong to a job, told apart from strangers that got a recycled number."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil

# In the environment of every worker and of all it starts, whatever group or session they move to.
MARKER = "LLMO_JOB_DIR"


@dataclass(frozen=True, slots=True)
class Process:
    """One line of `/proc/PID/stat`; `started` is in seconds after boot."""

    pid: int
    state: str
    group: int
    session: int
    started: float

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def read(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in brackets may itself hold spaces and brackets.
    fields = text.rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return Process(pid, fields[0], int(fields[2]), int(fields[3]), started)


def members(job_dir: Path, pid: int | None = None, started: float | None = None) -> list[Process]:
    """The living processes of a job: those that carry its mark, and the group and session of its worker.

    The group counts only while the process `pid` is the one that began at `started`: a number is used again.
    """
    mark = f"{MARKER}={job_dir}".encode()
    leader = read(pid) if pid is not None else None
    ours = leader is not None and started is not None and abs(leader.started - started) < 0.02
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        process = read(int(entry.name))
        if process is None or not process.alive:
            continue
        if (ours and pid in (process.group, process.session)) or _carries(process.pid, mark):
            found.append(process)
    return found


def kill(processes: list[Process]) -> None:
    """SIGKILL each of them that is still the same process."""
    for process in processes:
        try:
            handle = os.pidfd_open(process.pid)
        except OSError:
            continue  # gone
        try:
            now = read(process.pid)
            # With the handle open the number cannot pass to another process unseen.
            if now is not None and now.started == process.started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except OSError:
            continue  # gone, or not ours to kill: `members` will tell
        finally:
            os.close(handle)


def memory(pid: int, *, children: bool = True) -> int | None:
    """Bytes that a process holds, with all that it started unless told otherwise; memory that processes share is
    divided among them (proportional set size). None when it is gone, or another user's."""
    try:
        process = psutil.Process(pid)
        family = [process, *(process.children(recursive=True) if children else ())]
        return sum(int(one.memory_full_info().pss) for one in family)
    except psutil.Error:
        return None


def _carries(pid: int, mark: bytes) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False  # another user's, or gone
    return mark in environment.split(b"\0")
