"""Between a job's row and its directory: lays out what the worker reads, and publishes what it wrote."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.files import publish_json, storage_errors
from llmo.kernel import jobdir
from llmo.plugins import Operation
from llmo.store import Store
from llmo.types import Device, Job, JobState, Result, to_json

_OF_ONE_ATTEMPT = (
    jobdir.EVENTS,
    jobdir.RESULT,
    jobdir.ERROR,
    jobdir.CARD,
    jobdir.HEARTBEAT,
    jobdir.STOP,
)
_CARDS = ("llmo.json", "dataset.json")


def inputs_of(store: Store, job: Job) -> dict[str, str]:
    """The paths of a job's inputs. Raises NotFoundError or StorageError for one that is not in the store."""
    return {name: str(store.catalog.path(digest)) for name, digest in job.inputs.items()}


def prepare(store: Store, job: Job, operation: Operation, inputs: Mapping[str, str], device: Device) -> Path:
    """Lay out a job's directory for its present attempt; its checkpoint and its log stay.

    Nothing of an earlier attempt may be alive. Raises StorageError when the disk is full.
    """
    folder = jobdir.job_dir(store.home, job.id)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in _OF_ONE_ATTEMPT:
            (folder / name).unlink(missing_ok=True)
        for name in (jobdir.OUT, jobdir.CHILDREN):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir()
        _inherit(store, job, folder / jobdir.CHECKPOINT)
    spec = {
        "job": job.id,
        "attempt": job.attempt,
        "after": (job.reason or "") if job.attempt > 1 else "",
        "op": job.op,
        "name": job.name,
        "target": operation.target,
        "spec": job.spec,
        "inputs": inputs,
        "device": device,
    }
    publish_json(folder / jobdir.SPEC, to_json(spec))
    return folder


def _inherit(store: Store, job: Job, checkpoint: Path) -> None:
    """Go on from the checkpoint of the same work, when a job that had it was stopped or failed."""
    if job.cache_key is None or job.service or checkpoint.exists():
        return
    for other in store.jobs.find_broken_off(job.cache_key):
        left = jobdir.job_dir(store.home, other.id) / jobdir.CHECKPOINT
        if left.is_dir():
            left.rename(checkpoint)
            return


def publish(store: Store, job: Job, operation: Operation) -> tuple[str | None, dict[str, Any]]:
    """The digest of what a finished job made (None if it makes nothing), now in the catalog, and its result.

    May be repeated after a crash until the job is marked done.
    """
    folder = jobdir.job_dir(store.home, job.id)
    result = jobdir.read_json(folder / jobdir.RESULT) or {}
    if operation.produces is None:
        return None, result
    card = _card(folder, result)
    artifact = store.catalog.publish(
        operation.produces, job.name or job.op, folder / jobdir.OUT, card, job=job.id, inputs=job.inputs
    )
    return artifact.digest, result


def tidy(store: Store, job: Job) -> None:
    """Drop what a done job needs no more: its checkpoint can be as large as the model."""
    shutil.rmtree(jobdir.job_dir(store.home, job.id) / jobdir.CHECKPOINT, ignore_errors=True)


def clear(store: Store, job: Job) -> None:
    """Drop what a job that ended without a result had written: a killed one could not do so itself."""
    shutil.rmtree(jobdir.job_dir(store.home, job.id) / jobdir.OUT, ignore_errors=True)


def result_of(store: Store, job: Job) -> Result:
    """What the parent of an ended (or, for a service, ready) job hears of it."""
    ref = None
    if job.output is not None:
        names = [a.ref for a in store.catalog.list(name=job.name or job.op) if a.digest == job.output]
        artifact = store.catalog.find(job.output)
        ref = names[0] if names else artifact.ref if artifact else None
    return Result(
        state=job.state,
        job=job.id,
        cached=job.reason == "cached",
        output=job.output,
        ref=ref,
        result=job.result or ({"endpoint": job.spec.get("endpoint")} if job.service else {}),
        error=job.error,
        reason=job.reason,
    )


def deliver(store: Store, parent: int, key: str, result: Result) -> None:
    """Put a child's result where `ctx.result(key)` of its parent looks."""
    path = jobdir.child_file(jobdir.job_dir(store.home, parent), key)
    publish_json(path, to_json(result))


def is_due(job: Job) -> bool:
    """Whether a parent may hear of this child: it ended, or it is a service that answers."""
    return job.state.ended or (job.service and job.state is JobState.RUNNING and job.address is not None)


def _card(folder: Path, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the catalog says of the artifact; kept beside `out/`, whose files publishing moves away."""
    kept = jobdir.read_json(folder / jobdir.CARD)
    if isinstance(kept, dict):
        return kept
    found = [jobdir.read_json(folder / jobdir.OUT / name) for name in _CARDS]
    card = next((c for c in found if isinstance(c, dict)), dict(result))
    publish_json(folder / jobdir.CARD, card)
    return card
