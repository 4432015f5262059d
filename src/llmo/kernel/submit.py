"""Turns a request for work into a job row: refused, found done, found running, or queued."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmo import __version__, hardware, plugins
from llmo.errors import NotFoundError, SpecError
from llmo.files import digest_of_value
from llmo.kernel import service
from llmo.kernel.placement import for_endpoints, for_processes, refuse
from llmo.plugins import Operation
from llmo.store import Store
from llmo.types import Device, Job, JobState, Needs, Reason

Lookup = Callable[[str], Operation]

_NAME = re.compile(r"\w[\w.-]{0,99}")


def submit(
    store: Store,
    devices: Sequence[Device],
    op: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, str],
    *,
    name: str = "",
    parent: int | None = None,
    child_key: str | None = None,
    owner: str = "",
    needs: Needs | None = None,
    fresh: bool = False,
    max_attempts: int = 3,
    lookup: Lookup = plugins.operation,
) -> Job:
    """One job of operation `op`; committed when this returns. `inputs` maps names to artifact digests.

    Returns a done job (reason `cached`) when the same work is done already, unless `fresh`; and the job itself
    when the same work was asked for and has not ended. Of one parent, the same `child_key` is the same job.
    Raises NeedsError when the machine could never run it, SpecError and NotFoundError for what is wrong in it.
    """
    operation = lookup(op)
    _check(store, operation, spec, inputs, name)
    wanted = for_processes(devices, _needs(store, operation, spec, inputs, needs), spec.get("devices"))
    refuse(for_endpoints(devices) if operation.service else devices, wanted)
    key = cache_key(operation, spec, inputs)
    made: dict[str, Any] = {
        "op": op,
        "spec": spec,
        "inputs": inputs,
        "needs": wanted,
        "name": name,
        "parent": parent,
        "child_key": child_key,
        "cache_key": key,
        "service": operation.service,
        "max_attempts": max_attempts,
        "owner": owner,
    }
    done = None if fresh or operation.service or not operation.cached else store.jobs.find_done(key)
    if done is not None:
        register(store, operation, done.output, name or op)
        made |= {"state": JobState.DONE, "reason": Reason.CACHED, "output": done.output, "result": done.result}
        return store.jobs.insert(**made)
    active = store.jobs.find_active(key)
    if active is not None and _same(active, operation, parent, name):
        service.wake(store, active)
        return active
    return store.jobs.insert(**made)


def cache_key(operation: Operation, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What names a piece of work: equal keys give equal results. The name of the output is not part of it; where the
    result was measured, the processor is."""
    place = [hardware.described(os.cpu_count() or 1)] if operation.measured else []
    return digest_of_value([operation.name, operation.revision, __version__, spec, inputs, *place])


def register(store: Store, operation: Operation, output: str | None, name: str) -> None:
    """Let an output that is already stored be known under `name` as well."""
    if output is not None and operation.produces is not None:
        store.catalog.also(output, name)


def _same(active: Job, operation: Operation, parent: int | None, name: str) -> bool:
    """Whether the active job stands for the new request, so that no row of its own is needed.

    A child that is not a service keeps a row of its own, so that stopping another parent does not stop it; the
    scheduler still lets it wait for its twin. So does a job whose output is to have another name.
    """
    if operation.service:
        return True
    return parent is None and active.parent is None and (operation.produces is None or active.name == name)


def _needs(
    store: Store, operation: Operation, spec: Mapping[str, Any], inputs: Mapping[str, str], needs: Needs | None
) -> Needs:
    if needs is not None or not operation.service:
        return needs or operation.needs
    wanted = replace(operation.needs, memory=operation.needs.memory + service.memory_of(store, spec, inputs))
    cores, gpus = spec.get("cores"), spec.get("gpus")
    if isinstance(gpus, int):
        wanted = replace(wanted, gpus=gpus)
    return replace(wanted, cores=cores, cores_max=cores) if isinstance(cores, int) else wanted


def _check(store: Store, operation: Operation, spec: Mapping[str, Any], inputs: Mapping[str, str], name: str) -> None:
    if operation.produces is not None and name and not _NAME.fullmatch(name):
        raise SpecError(f"'{name}' cannot be a name", hint="use letters, digits, '.', '_' and '-', at most 100 of them")
    try:
        json.dumps(spec, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"the specification of '{operation.name}' is not plain JSON: {error}") from error
    for label, digest in inputs.items():
        if store.catalog.find(digest) is None:
            raise NotFoundError(f"the input '{label}' is not in the store: {digest}", hint="see `llmo models`")
