"""Everything a user can do, as methods of one object; the only module that knows every floor below it."""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmo import exports, naming, pipeline, scratch, searches, sources
from llmo.errors import InputError, ModelError, NotFoundError, SpecError, UnreachableError
from llmo.jobspecs import ALSO, INPUTS, OPERATIONS
from llmo.kernel import service
from llmo.kernel.devices import detect
from llmo.kernel.driver import Driver
from llmo.kernel.paging import Usage
from llmo.kernel.placement import for_processes
from llmo.kernel.scheduler import Holder, SchedulerLock
from llmo.kernel.submit import submit
from llmo.plugins import operation
from llmo.serve.adapters import AdapterTable, Ready, bases, check_base, folder_of, missing, trained
from llmo.serve.protocol import load_adapter, predict_once
from llmo.settings import Settings
from llmo.specfile import validate
from llmo.specs import BASE_TASKS, AdapterSpec, DeploySpec, ProjectSpec
from llmo.store import Store
from llmo.store.adapters import taken
from llmo.store.feedback import parse as parse_feedback
from llmo.types import (
    Adapter,
    Artifact,
    Asked,
    Device,
    Endpoint,
    Event,
    Feedback,
    Job,
    JobState,
    Key,
    Kind,
    Needs,
    Reason,
    to_json,
)

INPUT_KINDS = {"data": Kind.DATASET, "model": Kind.MODEL, "reference": Kind.MODEL, "against": Kind.MODEL}
HISTORY = 100  # finished trainings that the memory forecast is corrected by
ACTIVE = [state for state in JobState if not state.ended]


class System:
    """One machine's LLMO: store, devices and, unless another process holds it, the scheduler.

    An `embedded` system runs only what was asked of it and stops that at `close`; a server (`embedded=False`)
    runs everything in the store.
    """

    def __init__(self, settings: Settings | None = None, *, embedded: bool = True) -> None:
        self.settings = settings or Settings.from_environment()
        self.embedded = embedded
        self.store = Store.open(self.settings.home, self.settings.database)
        self._devices = detect(self.settings)
        self._adapters = AdapterTable(self.store)
        self.url: str | None = None  # where this process answers over HTTP, when it does
        self.usage: Usage | None = None  # how endpoints are used; a server's scheduler lets idle ones give way
        self._mine: set[int] = set()
        self._made: set[int] = set()  # those of mine that were new, so that nobody else waits for them
        self._scheduler: Driver | None = None
        self._starting = threading.Lock()
        atexit.register(self.close)

    # -- projects and jobs

    def check(self, project: Mapping[str, Any]) -> Job:
        spec = validate(dict(project), ProjectSpec)
        found = self._sources(spec)
        inputs = {name: value["artifact"] for name, value in found.items() if "artifact" in value}
        known = {"project": spec.plain(), "sources": found, **self._room(), "history": self._peaks()}
        return self._start("check", known, inputs, name=f"{spec.name}-check")

    def plan(self, project: Mapping[str, Any]) -> list[dict[str, Any]]:
        shown = []
        steps = self._steps(validate(dict(project), ProjectSpec))
        found = searches.known(self.store, steps)
        for step in steps:
            done = found.get(step.key)
            ref = self._ref(done.output) if done else None
            state = "done" if done else "to do"
            shown.append({"key": step.key, "op": step.op, "title": step.title, "state": state, "ref": ref})
        return shown

    def run(self, project: Mapping[str, Any], *, fresh: bool = False) -> Job:
        spec = validate(dict(project), ProjectSpec)
        for_processes(self._devices, operation("train").needs, spec.train.devices)
        steps = [to_json(step) for step in self._steps(spec)]
        return self._start("pipeline", {"steps": steps} | ({"fresh": True} if fresh else {}), {}, name=spec.name)

    def submit(
        self,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        *,
        name: str = "",
        needs: Needs | None = None,
        fresh: bool = False,
    ) -> Job:
        if op not in OPERATIONS:
            raise SpecError(f"'{op}' cannot be submitted", hint=f"one of: {', '.join(sorted(OPERATIONS))}")
        parsed = validate(dict(spec), OPERATIONS[op])
        _check_inputs(op, inputs or {})
        digests = {key: self.artifact(ref, _kind(key)).digest for key, ref in (inputs or {}).items()}
        if isinstance(parsed, DeploySpec):
            return self._deploy(parsed, digests["model"])
        plain = parsed.plain()
        if op == "tune":
            plain, digests = searches.complete(self.store, self._devices, plain, digests)
        if "source_digest" in plain:
            plain |= self._fingerprint(plain["source"])
        return self._start(op, plain, digests, name=name or op, needs=needs, fresh=fresh)

    def job(self, id: int) -> Job:
        return self._held_up(self.store.jobs.get(id))

    def jobs(self, *, all: bool = False, parent: int | None = None, limit: int = 50) -> list[Job]:
        found = self.store.jobs.list(parent=parent, limit=limit)
        if SchedulerLock(self.settings.home).holder() is None:
            found = [_left(job) for job in found]
        found = [self._held_up(job) for job in found]
        if all or parent is not None:
            return found
        return [job for job in found if job.parent is None or not job.state.ended]

    def events(self, after: int = 0, *, root: int | None = None) -> list[Event]:
        return self.store.events.after(after, root=root)

    def log(self, id: int, offset: int = 0) -> tuple[str, int]:
        self.store.jobs.get(id)
        path = self.settings.home / "jobs" / str(id) / "output.log"
        if not path.exists() or offset >= path.stat().st_size:
            return "", offset
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(1 << 20)
        return data.decode("utf-8", "replace"), offset + len(data)

    def kill(self, id: int) -> Job:
        self.store.jobs.request_stop(id)
        job = self.store.jobs.get(id)
        if job.service and job.state.ended:  # it was asleep, so no worker ends that the scheduler would hear of
            service.leave(self.store, job, "down", ended=True)
        return job

    # -- data sets and models

    def artifacts(self, kind: Kind | None = None, name: str | None = None) -> list[Artifact]:
        return self.store.catalog.list(kind, name)

    def artifact(self, ref: str, kind: Kind | None = None) -> Artifact:
        return self.store.catalog.get(ref, kind)

    def lineage(self, ref: str) -> list[Artifact]:
        return self.store.catalog.lineage(self.artifact(ref).digest)

    def path(self, ref: str) -> Path:
        """The read-only folder of an artifact on this machine (never sent over HTTP)."""
        return self.store.catalog.path(self.artifact(ref).digest)

    def rows(self, ref: str, split: str = "train", *, offset: int = 0, limit: int = 20) -> list[dict[str, Any]]:
        from llmo.data.dataset import Dataset  # pyarrow takes a third of a second, and only this verb needs it

        if offset < 0 or limit < 0:
            raise InputError(f"rows {offset} to {offset + limit} cannot be shown", hint="count them from 0")
        data = Dataset.open(self.store.catalog.path(self.artifact(ref, Kind.DATASET).digest))
        rows = data.dropped() if split == "dropped" else data.split(split)
        return [dict(row) for row in rows[offset : offset + limit]]

    def golden(self, ref: str) -> list[dict[str, Any]]:
        from llmo.tasks.card import read_golden  # as `rows`: NumPy is for those who ask

        return read_golden(self.store.catalog.path(self.artifact(ref, Kind.MODEL).digest))

    def report(self, ref: str) -> dict[str, Any]:
        return dict(json.loads(self._report(ref, "report.json").read_text(encoding="utf-8")))

    def report_page(self, ref: str) -> str:
        return self._report(ref, "report.html").read_text(encoding="utf-8")

    def save(self, folder: Path, name: str, card: Mapping[str, Any], kind: Kind = Kind.MODEL) -> Artifact:
        """Store a folder made outside a job (a user's own training loop); its files are moved, not copied."""
        return self.store.catalog.publish(kind, name, folder, card, job=None, inputs={})

    def export(
        self,
        model: str,
        out: Path,
        *,
        target: str = "edge",
        precision: str | None = None,
        max_mb: float | None = None,
    ) -> Job:
        """Write a model into a new folder of this machine that runs without LLMO (never asked for over HTTP); the job's
        result is the folder's manifest. `target` is edge, onnx or openvino; `max_mb` are millions of bytes."""
        artifact = self.artifact(model, Kind.MODEL)
        compressed_from = artifact.inputs.get("model") if "reference" in artifact.card else None
        original = self._ref(compressed_from)
        asked = {"target": target, "precision": precision, "max_mb": max_mb}
        spec = exports.order(artifact, out, asked, original)
        inputs = {"model": artifact.digest} | ({"reference": compressed_from} if original and compressed_from else {})
        return self._start("export", spec, inputs, name=f"{artifact.name}-{target}")

    # -- the machine and the endpoints

    def devices(self) -> list[Device]:
        return self._devices

    def endpoints(self) -> list[Endpoint]:
        found = self.store.endpoints.list()
        if SchedulerLock(self.settings.home).holder() is None:  # as with jobs that were left
            return [replace(endpoint, state="down", address=None) for endpoint in found]
        return [self._dated(endpoint) for endpoint in found]

    def remove_endpoint(self, name: str) -> None:
        jobs = self.store.jobs.list(op="serve", states=ACTIVE, limit=None)
        serving = [job.id for job in jobs if job.spec.get("endpoint") == name]
        for id in serving:
            self.store.jobs.request_stop(id)
        if not serving or any(endpoint.name == name for endpoint in self.store.endpoints.list()):
            self.store.endpoints.remove(name)  # one that only waits to start has no row yet

    def adapters(self, endpoint: str) -> list[Adapter]:
        found = self.store.endpoints.get(endpoint)
        served = bases(self.store, found.model)
        return [replace(known, answers=known.base in served) for known in self.store.adapters.list(found.name)]

    def add_adapter(self, endpoint: str, name: str, model: str) -> Adapter:
        if any(known.name == name for known in self.adapters(endpoint)):
            raise taken(endpoint, name)
        validate({"name": name, "model": model}, AdapterSpec)
        artifact = trained(self.store, self.artifact(model, Kind.MODEL))
        folder = folder_of(self.store, artifact)
        up = next((known.address for known in self.endpoints() if known.name == endpoint), None)
        addresses = up or self._replica(endpoint)
        base = check_base(self.store, artifact, self.store.endpoints.get(endpoint).model, endpoint)
        for address in addresses.split(","):
            load_adapter(address, folder)
        return self.store.adapters.add(endpoint, name, model=artifact.digest, model_ref=artifact.ref, base=base)

    def remove_adapter(self, endpoint: str, name: str) -> None:
        self.store.endpoints.get(endpoint)
        self.store.adapters.remove(endpoint, name)

    def predict(self, endpoint: str, texts: Sequence[Asked], *, logits: bool = False) -> list[dict[str, Any]]:
        if not texts:
            raise InputError("there is no text to answer", hint="give one text at least")
        name, ready = self._named(endpoint)
        folder = ready.folder if ready is not None else None
        return predict_once(self._replica(name), list(texts), logits=logits, adapter=folder)

    def awake(self, endpoint: str) -> Endpoint:
        """The endpoint that is asked by this name, once it answers; its service starts here when no process runs it.
        Raises UnreachableError and NotFoundError."""
        name, _ = self._named(endpoint)
        self._replica(name)
        return self.store.endpoints.get(name)

    # -- feedback

    def give_feedback(self, feedback: Mapping[str, Any], *, owner: str = "") -> Feedback:
        entry = parse_feedback(feedback)
        for answer in entry["answers"]:
            found = self.store.endpoints.get(answer["endpoint"])
            if answer["model"] in ("", found.name):  # the endpoint's name says no version
                answer["model"] = found.model_ref
            answer["digest"] = self._digest_of(answer["model"], found)
        return self.store.feedback.append(entry, owner=owner)

    def feedback(self, endpoint: str | None = None, *, after: int = 0, limit: int = 100) -> list[Feedback]:
        if limit < 0:
            raise InputError(f"{limit} entries cannot be shown", hint="ask for one at least")
        return self.store.feedback.after(after, endpoint=endpoint, limit=limit)

    # -- keys

    def make_key(self, owner: str, role: str) -> tuple[Key, str]:
        """A new key and its secret, which is kept nowhere. Raises InputError for an unknown role."""
        return self.store.keys.create(owner, role)

    def api_keys(self) -> list[Key]:
        return self.store.keys.list()

    def revoke_key(self, id: str) -> None:
        """Raises NotFoundError for an id that is none."""
        self.store.keys.revoke(id)

    # -- life

    def start(self) -> None:
        """Begin to run jobs; waits in the background while another process runs this store's jobs."""
        with self._starting:
            if self._scheduler is None:
                self._scheduler = Driver(self)

    def adopt(self, id: int) -> None:
        """Run this job here too (embedded systems run only their own)."""
        self._mine.add(id)
        self.start()
        if self._scheduler is not None:
            self._scheduler.wake()

    def is_mine(self, job: Job) -> bool:
        """Whether an embedded system was asked for this job, or for the job it belongs to."""
        return job.id in self._mine or job.root in self._mine

    def held_elsewhere(self) -> Holder | None:
        """The other process that runs this store's jobs, if one does."""
        return self._scheduler.holder() if self._scheduler else None

    def close(self) -> None:
        """Stop what this process runs; endpoints stay declared and come back with the next server."""
        atexit.unregister(self.close)
        if self._scheduler is None:
            self.store.close()
            return
        elsewhere = self.held_elsewhere()
        if self.embedded and (elsewhere is None or elsewhere.url is None):
            # Of another command's jobs, joined because they are the same work, nothing is stopped.
            for id in self._mine if elsewhere is None else self._made:
                job = self.store.jobs.get(id)
                if not job.state.ended and not job.service:
                    self.store.jobs.request_stop(id)
        self._scheduler.close()
        self._scheduler = None
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- within

    def _start(
        self,
        op: str,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        name: str,
        needs: Needs | None = None,
        fresh: bool = False,
    ) -> Job:
        began = time.time()
        job = submit(self.store, self._devices, op, spec, inputs, name=name, needs=needs, fresh=fresh)
        if job.created_at >= began:
            self._made.add(job.id)
        if not job.state.ended:
            self.adopt(job.id)
        return job

    def _deploy(self, spec: DeploySpec, model: str) -> Job:
        artifact = self.artifact(model)
        if "engine" not in artifact.card:
            raise ModelError(
                f"{artifact.ref} is a base model, which has no card and no evidence of what it answers",
                hint="train it, or let `llmo deploy` (the operation `plain`) make it one that is served as it is",
            )
        if artifact.card.get("task", {}).get("task") in BASE_TASKS:
            raise ModelError(
                f"{artifact.ref} answers nothing: it is a base for other tasks",
                hint=f"train one on it: llmo train --model {artifact.ref}, and deploy that",
            )
        if spec.slo is not None and artifact.card.get("task", {}).get("task") == "generation":
            raise SpecError(
                "an objective (deploy.slo) is for models that answer in one pass, and this one writes",
                hint="leave it out: streams and threads of what writes are measured by `llmo compress`",
            )
        reference = artifact.inputs.get("model") if "reference" in artifact.card else None
        steps = [to_json(step) for step in pipeline.deployment(model, reference, spec.plain())]
        return self._start("pipeline", {"steps": steps}, {}, name=spec.endpoint)

    def _room(self) -> dict[str, Any]:
        """What a training may take of this machine, and whether it computes bf16 there."""
        cpu = next(device for device in self._devices if device.kind == "cpu")
        return {"memory": cpu.memory, "bf16": any(feature.endswith("bf16") for feature in cpu.features)}

    def _peaks(self) -> list[dict[str, Any]]:
        """What the last trainings of this store were thought to need, and needed."""
        found = []
        for job in self.store.jobs.list(op="train", states=[JobState.DONE], limit=HISTORY):
            memory = (job.result or {}).get("memory", {})
            if job.reason is Reason.FINISHED and "forecast_bytes" in memory:
                known = {"method": job.spec["method"], "parameters": (job.result or {})["parameters"]}
                found.append({**known, **{name: memory[name] for name in ("forecast_bytes", "peak_bytes")}})
        return found

    def _steps(self, project: ProjectSpec) -> list[pipeline.Step]:
        return searches.settle(self.store, self._devices, pipeline.plan(project.plain(), self._sources(project)))

    def _sources(self, project: ProjectSpec) -> dict[str, dict[str, Any]]:
        found = {"data": self._source("data", project.data.source)}
        found |= {f"{ALSO}{also.name}": self._source("data", also.data.source) for also in project.also}
        if scratch.is_scratch(project.model):
            made = scratch.parse(project.model, project.task.name, project.train.seed)
            return {**found, "model": {"scratch": made.plain()}}
        return {**found, "model": self._source("model", project.model)}

    def _source(self, name: str, source: str) -> dict[str, Any]:
        if sources.is_stored(source) and not Path(source).exists():
            return {"artifact": self.artifact(source, INPUT_KINDS[name]).digest}
        found = self._fingerprint(source)
        return {"source": found["source"], "digest": found["source_digest"], "uploads": found.get("uploads")}

    def _fingerprint(self, source: str) -> dict[str, Any]:
        """The source as jobs carry it: absolute, and named by its content now."""
        if source.startswith("hf:"):
            return {"source": source, "source_digest": None}
        uploads = self.settings.home / "uploads"
        path = sources.resolve(source, uploads)
        absolute = str(path.absolute()) if sources.is_local_path(source) else source
        found = {"source": absolute, "source_digest": sources.fingerprint(path)}
        return found | ({"uploads": str(uploads)} if source.startswith("upload:") else {})

    def _held_up(self, job: Job) -> Job:
        """With what keeps its scheduler from going on, when that runs here; a full store cannot take it down."""
        trouble = self._scheduler.trouble if self._scheduler is not None and not job.state.ended else ""
        return job.evolve(waiting=f"{trouble}; it goes on by itself once that is mended") if trouble else job

    def _report(self, ref: str, name: str) -> Path:
        """A file of the report beside a model, or of one that `evaluate` made; a data set may have the same name."""
        try:
            artifact = self.artifact(ref, Kind.MODEL)
        except NotFoundError:
            artifact = self.artifact(ref, Kind.REPORT)
        folder = self.store.catalog.path(artifact.digest)
        for path in (folder / "report" / name, folder / name):
            if path.is_file():
                return path
        raise NotFoundError(
            f"{artifact.ref} has no report",
            hint=f"make one: llmo evaluate {artifact.ref}" if artifact.kind is Kind.MODEL else "see `llmo models`",
        )

    def _ref(self, digest: str | None) -> str | None:
        found = self.store.catalog.find(digest) if digest else None
        return found.ref if found else None

    def _dated(self, endpoint: Endpoint) -> Endpoint:
        """With the time from which on it is asleep."""
        if endpoint.state != "asleep" or endpoint.job is None or not endpoint.waiting:
            return endpoint
        slept = self.store.events.last(endpoint.job, "state")
        return replace(endpoint, since=slept.at if slept else None)

    def _digest_of(self, ref: str, endpoint: Endpoint) -> str:
        """The digest of the version that answered, which may not be the one of now; empty when it is none of ours."""
        if ref == endpoint.model_ref:
            return endpoint.model
        try:
            return self.store.catalog.get(ref, Kind.MODEL).digest
        except NotFoundError:
            return ""

    def _named(self, asked: str) -> tuple[str, Ready | None]:
        """The endpoint that is asked by this name, and its adapter if it is one. Raises NotFoundError."""
        endpoints = self.store.endpoints.list()
        adapters = self._adapters.load(endpoints)
        of_all = (ready.adapter for found in adapters.values() for ready in found.values())
        found = naming.meanings(endpoints, of_all).get(asked)
        if found is None:
            endpoint, adapter = naming.split(asked)
            self.store.endpoints.get(endpoint)
            raise missing(endpoint, adapter or "", adapters.get(endpoint, {}))
        endpoint, adapter = found
        return endpoint, None if adapter is None else adapters[endpoint][adapter]

    def _replica(self, endpoint: str) -> str:
        """The address of an endpoint's service, which is started here first when no process runs it, and woken."""
        found = self.store.endpoints.get(endpoint)
        if found.job is None:
            raise UnreachableError(
                f"the endpoint '{endpoint}' is down", hint=f"llmo deploy MODEL --endpoint {endpoint}"
            )
        self.adopt(found.job)
        return wait_up(self, endpoint)


def _kind(name: str) -> Kind | None:
    """What an input of this name is."""
    return INPUT_KINDS.get("data" if name.startswith(ALSO) else name)


def _check_inputs(op: str, inputs: Mapping[str, str]) -> None:
    needed, more = INPUTS.get(op, ((), ()))
    for name in needed:
        if name not in inputs:
            raise SpecError(f"'{op}' needs the input '{name}'", hint=f"say which: inputs: {{{name}: NAME@VERSION}}")
    for name in inputs:
        if name not in (*needed, *more) and not (op == "train" and name.startswith(ALSO)):
            known = ", ".join((*needed, *more)) or "none"
            raise SpecError(f"'{op}' has no input '{name}'", hint=f"its inputs: {known}")


def _left(job: Job) -> Job:
    """As it is after who ran it was killed, and could not write that down: it waits for the next to run it."""
    if job.state.ended or job.state is JobState.QUEUED:
        return job
    return job.evolve(state=JobState.QUEUED, waiting="who ran it has ended; the next run or `llmo up` goes on with it")


def wait_up(system: System, endpoint: str, seconds: float = 120.0) -> str:
    """The address of an endpoint once it is up; one that is asleep, or falls asleep meanwhile, is woken. Raises
    UnreachableError when its service ends or the time is over."""
    pause = threading.Event()
    waited = 0.0
    while True:
        found = system.store.endpoints.get(endpoint)
        if found.state == "up" and found.address:
            return found.address
        if found.state == "asleep":
            system.store.endpoints.want(endpoint)
        job = system.job(found.job) if found.job is not None else None
        if job is None or job.state.ended or waited >= seconds:
            break
        pause.wait(0.05)
        waited += 0.05
    what = f"job {job.id}, its service, is {job.state.value}" if job else "no service stands behind it"
    hint = f"see: llmo logs {job.id}" if job else f"llmo deploy MODEL --endpoint {endpoint}"
    raise UnreachableError(f"the endpoint '{endpoint}' does not answer: {what}", hint=hint)
