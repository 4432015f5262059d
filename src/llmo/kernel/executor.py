"""The contract of an executor: it starts a job's directory somewhere, says when it ended, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmo.types import Placement

# Exit codes of a worker; any other code, or a signal, means that the worker was lost.
DONE, FAILED, STOPPED, OUT_OF_MEMORY, LOST = 0, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Handle:
    """One started attempt. `started` (seconds after boot) tells it from a process that gets its number later."""

    job_dir: Path
    pid: int
    started: float


@dataclass(frozen=True, slots=True)
class Exit:
    """How an attempt ended: `code` as in `subprocess` (negative: a signal).

    `asked`: this executor killed it; `out_of_memory`: the machine's kernel says that it killed for memory meanwhile.
    """

    code: int
    asked: bool = False
    out_of_memory: bool = False


class Executor(Protocol):
    """Runs job directories. Used from one thread, but for `wake`."""

    def start(self, job_dir: Path, placement: Placement) -> Handle:
        """Start the worker of a prepared job directory and return at once.

        Raises EnvironmentProblem when no process can be started. The worker dies with this executor's process.
        """

    def poll(self, handle: Handle) -> Exit | None:
        """None while anything of the attempt lives; then how its worker ended, the same at every call."""

    def stop(self, handle: Handle, grace: float) -> None:
        """Ask it to stop and return at once; after `grace` seconds `poll` kills everything it started."""

    def reclaim(self, job_dir: Path, pid: int | None, started: float | None) -> None:
        """Make sure that nothing of an attempt which an earlier executor started is alive any more.

        Raises EnvironmentProblem when something of it cannot be killed.
        """

    def wait(self, seconds: float) -> None:
        """Return when an attempt may have ended or has something to say, at the latest after `seconds`."""

    def wake(self) -> None:
        """End a `wait` in another thread."""

    def close(self) -> None:
        """Kill what is still running and let go of everything."""
