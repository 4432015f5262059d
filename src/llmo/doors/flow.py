"""What every door does with a job: wait for it, hear its events, take its result or raise its error."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmo import naming, pipeline, scratch, sources
from llmo.api import Api
from llmo.errors import InputError, JobFailed, NotFoundError, from_json
from llmo.settings import Settings
from llmo.types import Artifact, Event, Job, JobState, Kind

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class News:
    """What is new of a tree of jobs: the root, its children by id, and the events since the last news."""

    root: Job
    children: dict[int, Job]
    events: list[Event]


def connect(settings: Settings | None = None) -> Api:
    """The server that LLMO_URL names, else this process."""
    settings = settings or Settings.from_environment()
    if settings.url:
        from llmo.doors.client import Client  # each way in costs start-up time that the other should not pay

        return Client(settings.url, settings.key)
    from llmo.system import System

    return System(settings)


def wait(api: Api, job: Job, hear: Callable[[News], None] | None = None, *, until_ready: bool = False) -> Job:
    """Block until a job has ended (or, a service, answers), passing on what happens; returns the ended job.

    Raises the job's own error when it failed.
    """
    last = 0
    while True:
        now = api.job(job.id)
        events = api.events(last, root=job.id) if hear else []
        last = events[-1].id if events else last
        if hear is not None:
            hear(News(now, {child.id: child for child in api.jobs(parent=job.id)}, events))
        if now.state.ended or (until_ready and now.address):
            return finished(now)
        if not events:
            time.sleep(POLL_SECONDS)


def finished(job: Job) -> Job:
    """The job when it ended well; otherwise raises what ended it."""
    if job.state is JobState.FAILED and job.error:
        raise from_json(dict(job.error))
    if job.state in (JobState.FAILED, JobState.STOPPED):
        reason = job.reason.value.replace("_", " ") if job.reason else "no reason given"
        raise JobFailed(
            f"job {job.id} ({job.op}) {job.state.value}: {reason}",
            hint=f"see: llmo logs {job.id}; the same command continues from the last checkpoint",
        )
    return job


def result(job: Job) -> dict[str, Any]:
    """A finished job's result."""
    return dict(job.result or {})


def output(api: Api, job: Job) -> Artifact:
    """The artifact a finished job published."""
    if job.output is None:
        raise JobFailed(f"job {job.id} ({job.op}) published nothing", hint=f"see: llmo logs {job.id}")
    named = (a for a in api.artifacts(name=job.name) if a.digest == job.output) if job.name else iter(())
    return next(named, None) or api.artifact(job.output)


def report(api: Api, model: Artifact) -> dict[str, Any] | None:
    """What was measured of a trained model; None where no rows were held out."""
    try:
        return api.report(model.digest)
    except NotFoundError:
        return None


def check(op: str, spec: Mapping[str, Any]) -> None:
    """Raises SpecError for a specification that `op` will not take, before anything is done for it."""
    from llmo.jobspecs import OPERATIONS
    from llmo.specfile import validate  # the client alone needs neither

    validate(dict(spec), OPERATIONS[op])


def ensure_model(
    api: Api,
    model: str,
    hear: Callable[[News], None] | None = None,
    *,
    data: Artifact | None = None,
    seed: int | None = None,
) -> str:
    """The ref of a base model: what the store calls so, else what is fetched from the source that is named, or made
    for `data` from scratch."""
    source = _source(api, model)
    if source is not None and scratch.is_scratch(source):
        if data is None:
            raise scratch.needs_data(source)
        made = scratch.parse(source, str(data.card["task"]), seed)
        job = api.submit("scratch-model", made.plain(), {"data": data.digest}, name=scratch.name_of(source))
        return output(api, wait(api, job, hear)).digest
    if source is None:
        return model
    job = api.submit("base-model", {"source": source}, name=pipeline.base_name(source))
    return output(api, wait(api, job, hear)).digest


def servable(api: Api, model: str, hear: Callable[[News], None] | None = None) -> Artifact:
    """The stored model that is named. A base, or a source of one (package:NAME, hf:NAME, a folder, a GGUF file), is
    taken as it is, with the card and the evidence that serving and compressing need. Raises NotFoundError."""
    source = _source(api, model)
    fetched = source is not None and _names_source(source)
    artifact = api.artifact(ensure_model(api, model, hear) if fetched else model, Kind.MODEL)
    if "engine" in artifact.card:
        return artifact
    name = f"{artifact.name}-plain"
    return output(api, wait(api, api.submit("plain", {}, {"model": artifact.digest}, name=name), hear))


def adapter(api: Api, endpoint: str, name: str, model: str) -> str:
    """The ref of the model that holds an adapter for an endpoint; a folder as peft saved it is stored as `name` first.

    Raises ModelError for a folder whose adapter does not fit what the endpoint serves.
    """
    source = _source(api, model)
    served = next((known.model for known in api.endpoints() if known.name == endpoint), None)
    if source is None or served is None or not _names_source(source):
        return model
    artifact = api.artifact(served, Kind.MODEL)
    base = reference(artifact).get("reference", artifact.digest)
    return output(api, wait(api, api.submit("adapter", {"source": source}, {"model": base}, name=name))).digest


def asked(api: Api, name: str) -> naming.Meaning:
    """The endpoint, and its adapter if it is one, that a name means, as the gateway has it; what nobody serves is taken
    apart as it is written."""
    endpoints = api.endpoints()
    adapters = (adapter for endpoint in endpoints for adapter in api.adapters(endpoint.name))
    return naming.meanings(endpoints, adapters).get(name) or naming.split(name)


def data_of(api: Api, model: Artifact) -> str:
    """The digest of the data set a model was trained on, found through its lineage."""
    for artifact in reversed(api.lineage(model.digest)):
        if "data" in artifact.inputs:
            return artifact.inputs["data"]
    raise InputError(f"the lineage of {model.ref} names no data set", hint="say which one: --data NAME")


def absolute(source: str, base: Path) -> str:
    """A local path as the user meant it, relative to `base`; what names no path, or none that exists, as it is."""
    if not source.strip() or not sources.is_local_path(source):
        return source
    try:
        inside = base / Path(source).expanduser()
        if not inside.exists():
            return source
        return str(inside.resolve() if ".." in inside.parts else inside.absolute())
    except (OSError, ValueError, RuntimeError):  # no path at all: whoever reads it says so
        return source


def _source(api: Api, model: str) -> str | None:
    """Where a model is to come from; None for one that the store has, by name, version or digest."""
    if any(model in (known.name, known.ref) for known in api.artifacts(Kind.MODEL)):
        return None
    source = absolute(model, Path())
    return None if source == model and sources.is_stored(model) else source


def _names_source(source: str) -> bool:
    """Whether it is a path where something is, or a source of another kind."""
    try:
        return not sources.is_local_path(source) or Path(source).exists()
    except (OSError, ValueError):  # no path at all
        return False


def located(source: str, base: Path) -> str:
    """A source written in a file of the folder `base`: a path means one beside that file, whether it exists or not."""
    found = absolute(source, base)
    if found != source or not source.strip() or not sources.is_local_path(source) or sources.is_stored(source):
        return found
    try:
        return os.path.normpath(base.absolute() / Path(source).expanduser())
    except (ValueError, RuntimeError):
        return source


def goes_on(api: Api) -> bool:
    """Whether what was asked for goes on when this process ends, because a server runs it."""
    asked = getattr(api, "held_elsewhere", None)
    if asked is None:
        return True
    holder = asked()
    return holder is not None and holder.url is not None


def page(api: Api, search: str) -> str | None:
    """Where the report of a search can be opened, when its store is this process's own."""
    found = getattr(api, "path", None)
    return None if found is None else f"{found(search)}/report.html"


def export(api: Api, model: str, out: Path | None = None, *, target: str = "edge", **asked: Any) -> Job:
    """Begin to write a model into a folder of this machine, by default MODEL-TARGET; see `System.export`. Raises
    InputError where the models may be on another one."""
    begin = getattr(api, "export", None)
    if begin is None:
        raise InputError(
            "an export writes a folder on the machine that has the store, and LLMO_URL names a server",
            hint="run it on the server's machine, without LLMO_URL",
        )
    artifact = api.artifact(model, Kind.MODEL)
    job: Job = begin(artifact.digest, out or Path(f"{artifact.name}-{target}"), target=target, **asked)
    return job


def reference(model: Artifact) -> dict[str, str]:
    """The input `reference` of a verification: the model a compressed one was made from."""
    return {"reference": model.inputs["model"]} if "reference" in model.card and "model" in model.inputs else {}
