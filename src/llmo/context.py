"""What a job may say to, and hear from, the system; `NullContext` lets any operation run without one."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llmo.types import Device, Needs, Result


class Context(Protocol):
    """The only door between an operation and the system.

    `device` is what was granted: its `cores` is the number of threads to use, and no more. `after` is why the attempt
    before this one ended (a `Reason`), empty for the first.
    """

    device: Device
    attempt: int
    after: str

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        """Progress: `step` of `total`, with metrics. Cheap; the newest line is what a progress bar shows."""

    def note(self, message: str) -> None:
        """One line the user should read (what was found, what was chosen and why)."""

    def should_stop(self) -> bool:
        """True once the job was asked to stop: save a checkpoint and return or raise soon."""

    def checkpoint(self) -> Path:
        """A folder that survives attempts of this job."""

    def cache(self) -> Path:
        """A folder that the jobs of this store share, for what can be computed again; it may vanish between jobs."""

    def ready(self, address: str) -> None:
        """Services only: the replica answers at `address` now."""

    def spawn(
        self,
        key: str,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        name: str = "",
        needs: Needs | None = None,
    ) -> None:
        """Ask for a child job; asking again with the same key changes nothing.

        `inputs` maps names to artifact digests, or to `input:NAME` for what this job was given by that name; `name` is
        what its output is called; `needs` is what it asks of the machine, where that is not what its operation usually
        does.
        """

    def stop(self, key: str) -> None:
        """Ask a child to stop; it ends as `stopped`, unless it ended before."""

    def result(self, key: str) -> Result | None:
        """The child's result once it has ended (or, for a service, once it is ready); else None."""


class Stopped(Exception):
    """Raised by an operation that leaves early because `should_stop()` said so. Not an error."""


class NullContext:
    """A context with no system behind it: for notebooks, tests and the SDK's in-process calls."""

    def __init__(
        self,
        cores: int = 1,
        folder: Path | None = None,
        on_report: Callable[[int, int | None, dict[str, Any]], None] | None = None,
    ) -> None:
        self.device = Device(name="cpu", kind="cpu", memory=0, free=0, cores=cores)
        self.attempt = 1
        self.after = ""
        self._folder = folder
        self._on_report = on_report

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        if self._on_report is not None:
            self._on_report(step, total, dict(metrics))

    def cache(self) -> Path:
        folder = self.checkpoint() / "cache"
        folder.mkdir(exist_ok=True)
        return folder

    def note(self, message: str) -> None:
        return

    def should_stop(self) -> bool:
        return False

    def checkpoint(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="llmo-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def ready(self, address: str) -> None:
        return

    def spawn(
        self,
        key: str,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        name: str = "",
        needs: Needs | None = None,
    ) -> None:
        raise RuntimeError("a NullContext has no system behind it, so it cannot start child jobs")

    def stop(self, key: str) -> None:
        return

    def result(self, key: str) -> Result | None:
        return None
