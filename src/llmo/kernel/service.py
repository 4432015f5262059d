"""Moves endpoints: a service that answers takes over its endpoint's name, and what it replaces is asked to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmo import plugins
from llmo.errors import NotFoundError
from llmo.specs import adapter_bytes
from llmo.store import Store
from llmo.types import Endpoint, Job, JobState

_ACTIVE = [state for state in JobState if not state.ended]
_BACKOFF_SECONDS, _LONGEST_SECONDS = 0.5, 30.0


def endpoint_of(job: Job) -> str | None:
    """The public name a job serves under, if it does."""
    name = job.spec.get("endpoint") if job.service else None
    return name if isinstance(name, str) else None


def replaces(job: Job, other: Job) -> bool:
    """Whether a job takes over the endpoint that the other serves."""
    name = endpoint_of(job)
    return name is not None and endpoint_of(other) == name


def pinned(job: Job) -> bool:
    """Whether its endpoint never gives way to another."""
    return bool(job.spec.get("pinned"))


def memory_of(store: Store, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> int:
    """Bytes that a service needs for its model: the weights, what its adapters may take and the cache it may fill."""
    artifact = store.catalog.find(inputs.get("model", ""))
    if artifact is None:
        return 0
    card = artifact.card
    generates = task_of(card) == "generation"
    taking = plugins.takes_adapters("llmo.generators" if generates else "llmo.engines")
    adapters = adapter_bytes(spec, generates=generates) if engine_of(card, spec) in taking else 0
    return artifact.size + adapters + (int(spec.get("cache_mib" if generates else "repeats_mib", 0)) << 20)


def announce(store: Store, job: Job) -> None:
    """A service begins: an endpoint that is new, or whose service this is, says `starting` (`waking` if it slept)."""
    name = endpoint_of(job)
    if name is None:
        return
    known = find(store, name)
    if known is None or known.job == job.id:
        state = "waking" if known is not None and known.rests else "starting"
        store.endpoints.set(name, state=state, address=None, **_described(store, job))


def take_over(store: Store, job: Job, address: str) -> None:
    """The service answers: the endpoint points to it from now on, and older services of that name drain.

    When a newer service has the name already, this one is the older and is asked to stop.
    """
    name = endpoint_of(job)
    if name is None:
        return
    known = find(store, name)
    if known is not None and known.job is not None and known.job > job.id and known.state == "up":
        store.jobs.request_stop(job.id)
        return
    store.endpoints.set(name, state="up", address=address, **_described(store, job))
    for other in store.jobs.list(states=_ACTIVE, service=True, limit=None):
        if endpoint_of(other) == name and other.id < job.id:
            store.jobs.request_stop(other.id)


def sleep(store: Store, job: Job) -> None:
    """The service gives way: requests are to wait for its endpoint from now on, and wake it."""
    name = endpoint_of(job)
    known = find(store, name) if name is not None else None
    if known is not None and known.job == job.id:
        store.endpoints.point(known.name, job.id, state="asleep", address=None)


def wake(store: Store, job: Job) -> None:
    """Whoever deploys an endpoint that is asleep asks for it, as a request does."""
    name = endpoint_of(job)
    known = find(store, name) if name is not None else None
    if known is not None and known.job == job.id:
        store.endpoints.want(known.name)


def leave(store: Store, job: Job, state: str, *, ended: bool) -> None:
    """The service answers no more; its endpoint, unless another service has it, is `down` or `starting`.

    One that is asleep or waking stays so until its service answers or has `ended`.
    """
    name = endpoint_of(job)
    known = find(store, name) if name is not None else None
    if known is not None and known.job == job.id and (ended or not known.rests):
        store.endpoints.point(known.name, job.id, state=state, address=None)


def bring_down(store: Store) -> None:
    """No service runs any more, because the process that ran them ended: no endpoint is up."""
    for known in store.endpoints.list():
        if known.state != "down" and not known.rests:
            store.endpoints.point(known.name, known.job, state="down", address=None)


def find(store: Store, name: str) -> Endpoint | None:
    try:
        return store.endpoints.get(name)
    except NotFoundError:
        return None


def backoff(failures: int) -> float:
    """Seconds to wait before a service that died `failures` times in a row is started again."""
    return float(min(_LONGEST_SECONDS, _BACKOFF_SECONDS * 2 ** min(failures - 1, 10)))


def _described(store: Store, job: Job) -> dict[str, Any]:
    digest = job.inputs.get("model", "")
    artifact = store.catalog.find(digest) if digest else None
    card: Mapping[str, Any] = artifact.card if artifact is not None else {}
    return {
        "job": job.id,
        "model": digest,
        "model_ref": artifact.ref if artifact is not None else "",
        "task": task_of(card),
        "engine": engine_of(card, job.spec),
        "precision": str(card.get("precision", "")),
    }


def engine_of(card: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """The engine that a deployment runs: where a model generates it may be chosen."""
    chosen = spec.get("engine") if task_of(card) == "generation" else None
    return str(chosen or card.get("engine", ""))


def task_of(card: Mapping[str, Any]) -> str:
    """The name of a model's task; empty for a base, which has none."""
    task = card.get("task")
    return str(task.get("task", "")) if isinstance(task, Mapping) else str(task or "")
