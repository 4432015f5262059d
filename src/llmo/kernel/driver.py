"""Who runs a store's jobs: the scheduler in a thread, in one process at a time."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from llmo.errors import StorageError
from llmo.kernel import service
from llmo.kernel.local import LocalExecutor
from llmo.kernel.paging import Usage
from llmo.kernel.scheduler import Holder, Scheduler, SchedulerLock
from llmo.store import Store
from llmo.types import Device, Job

LOCK_SECONDS = 0.2  # between looks at whether the process that runs this store's jobs has gone


class Driven(Protocol):
    """Whose jobs are run: its own alone if it is `embedded`, else all of the store's. `url` and `usage` are read when
    it becomes the one that runs them."""

    store: Store
    embedded: bool
    url: str | None
    usage: Usage | None

    def devices(self) -> list[Device]: ...

    def is_mine(self, job: Job) -> bool: ...


class Driver:
    """Runs the scheduler in a thread as soon as this process may: one process at a time runs a store's jobs."""

    def __init__(self, system: Driven) -> None:
        self._system = system
        self._lock = SchedulerLock(system.store.home)
        self._scheduler: Scheduler | None = None
        self._closing = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._run, name="llmo-scheduler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._take():
            if self._closing.wait(LOCK_SECONDS):
                return
        system = self._system
        scope = system.is_mine if system.embedded else None
        usage = None if system.embedded else system.usage
        scheduler = Scheduler(
            system.store, LocalExecutor(), system.devices(), scope=scope, lock=self._lock, usage=usage
        )
        self._scheduler = scheduler
        if self._closing.is_set():
            scheduler.stop()
        scheduler.run()

    def _take(self) -> bool:
        if self._lock.held:
            return True
        if not self._lock.try_acquire(self._system.url):
            return False
        # Before anybody is told that this process is up: what an earlier one left as `up` is not. It may fail
        # (a full disk) without harm: each endpoint's state is written again when its service is taken up.
        with suppress(StorageError):
            service.bring_down(self._system.store)
        return True

    @property
    def trouble(self) -> str:
        return self._scheduler.trouble if self._scheduler is not None else ""

    def wake(self) -> None:
        if self._scheduler is not None:
            self._scheduler.wake()

    def holder(self) -> Holder | None:
        """The other process that runs this store's jobs, if one does."""
        return None if self._lock.held else self._lock.holder()

    def close(self) -> None:
        self._closing.set()
        if self._scheduler is not None:
            self._scheduler.stop()
        self._thread.join()
        if self._scheduler is not None:
            self._scheduler.shutdown()
        else:
            self._lock.release()
