"""Parents and children: submits what a job spawns, and lets each parent hear of the children that ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmo.errors import LLMOError, StorageError
from llmo.kernel import staging
from llmo.kernel.submit import Lookup, submit
from llmo.store import Store
from llmo.types import Device, Job, JobState, Needs, Reason, from_json

# Children change state in this process, which says so; only a stop of a queued one comes from elsewhere.
_LOOK_SECONDS = 0.5


class Family:
    """What running parents wait for. `adopted` are the jobs that run here because a parent here waits for them."""

    def __init__(self, store: Store, devices: Sequence[Device], lookup: Lookup) -> None:
        self.adopted: set[int] = set()
        self.changed = False
        self._store = store
        self._devices = devices
        self._lookup = lookup
        self._awaited: dict[int, dict[str, int]] = {}  # parent -> key -> child
        self._looked = 0.0

    def begin(self, parent: Job) -> None:
        """A parent starts (again): it is to hear of every child it has, those of earlier attempts too."""
        children = self._store.jobs.list(parent=parent.id, limit=None)
        self._awaited[parent.id] = {job.child_key: job.id for job in children if job.child_key is not None}
        self.adopted |= {job.id for job in children}
        self.changed = True

    def spawn(self, parent: Job, data: Mapping[str, Any]) -> None:
        """A child for a `spawn` event; one that cannot be submitted is a child that failed."""
        child = self._submit(parent, data)
        self._awaited.setdefault(parent.id, {})[data["key"]] = child.id
        self.adopted.add(child.id)
        self.changed = True

    def stop(self, parent: Job, key: str) -> None:
        """A parent wants no more of a child that it still waits for."""
        child = self._awaited.get(parent.id, {}).get(key)
        if child is not None:
            self._store.jobs.request_stop(child)
            self.changed = True

    def end(self, job: Job, *, stop: bool) -> None:
        """An attempt of a job ended, and its own parent may hear of it; `stop`: nobody waits for its children now."""
        self.changed = True
        self._awaited.pop(job.id, None)
        if not stop:
            return
        for child in self._store.jobs.list(parent=job.id, service=False, limit=None):
            if not child.state.ended:
                self._store.jobs.request_stop(child.id)

    def deliver(self) -> None:
        """Tell running parents of the children that came to their end since the last time."""
        now = time.monotonic()
        if not self.changed and now - self._looked < _LOOK_SECONDS:
            return
        self.changed, self._looked = False, now
        for parent, awaited in self._awaited.items():
            for key, id in list(awaited.items()):
                child = self._store.jobs.get(id)
                if staging.is_due(child):
                    staging.deliver(self._store, parent, key, staging.result_of(self._store, child))
                    del awaited[key]

    def _submit(self, parent: Job, data: Mapping[str, Any]) -> Job:
        inputs = {name: _own(parent, value) for name, value in data["inputs"].items()}
        asked: dict[str, Any] = {"op": data["op"], "spec": data["spec"], "inputs": inputs, "name": data["name"]}
        kin: dict[str, Any] = {"parent": parent.id, "child_key": data["key"], "owner": parent.owner}
        try:
            needs = from_json(Needs, data["needs"]) if data.get("needs") else None
            made: dict[str, Any] = {"needs": needs, "fresh": self._fresh(parent), "lookup": self._lookup}
            return submit(self._store, self._devices, **asked, **kin, **made)
        except StorageError:
            raise  # the disk's fault, not the child's: the event is read again
        except LLMOError as error:
            ended: dict[str, Any] = {"state": JobState.FAILED, "reason": Reason.ERROR}
            child = self._store.jobs.insert(**asked, **kin, needs=Needs(cores=0, memory=0), **ended)
            self._store.jobs.update(child.id, child.attempt, error=error.to_json())
            return self._store.jobs.get(child.id)

    def _fresh(self, parent: Job) -> bool:
        """Whether what the whole family belongs to was asked to do everything again."""
        root = parent if parent.root is None else self._store.jobs.get(parent.root)
        return bool(root.spec.get("fresh"))


def _own(parent: Job, value: Any) -> Any:
    """`input:NAME` is what the parent itself was given by that name."""
    given = isinstance(value, str) and value.startswith("input:")
    return parent.inputs.get(value.removeprefix("input:"), value) if given else value
