"""An endpoint under load, over its real door, beside the plain pipeline of its model: what `llmo bench` measures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.api import Api
from llmo.doors import flow
from llmo.doors.client import Client
from llmo.doors.gateway import Door, gateway
from llmo.doors.load import WARM, Load, Target, Window, joined
from llmo.doors.plain import PIPELINES, plain
from llmo.doors.server import running_server
from llmo.engines.native.peak import measure
from llmo.engines.work import Work, nominal_work
from llmo.errors import DataError, EnvironmentProblem, InputError, LLMOError, ModelError, NotFoundError, nearest
from llmo.kernel import processes
from llmo.settings import Settings
from llmo.system import System
from llmo.tasks.base import Task
from llmo.types import Artifact, Asked, Endpoint, Kind

WINDOWS = 2  # of each side at each number of clients, in turns: first, second, second, first
MOST_TEXTS, PAGE, AT_ONCE = 1000, 500, 64
HELD_OUT = ("test", "dev")

Hear = Callable[[str, float, float], None]  # what is done, seconds of load done, and of all


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: for each number of clients, `seconds` of load a side; with the plain `pipeline` or without."""

    clients: Sequence[int] = (1, 16, 64)
    seconds: float = 10.0
    pipeline: bool = True


@dataclass(frozen=True, slots=True)
class Subject:
    """An endpoint that answers in one pass, or a further model of it, as it is asked by `name`."""

    name: str
    endpoint: Endpoint
    model: Artifact
    task: Task


@dataclass(slots=True)
class Side:
    """One that is loaded. `memory` tells the bytes that its processes on this machine hold, by their names."""

    target: Target
    cold_seconds: float | None = None
    memory: Mapping[str, Callable[[], int | None]] = field(default_factory=dict)
    windows: dict[int, list[Window]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        return {
            "levels": [{"clients": level, **joined(found).figures()} for level, found in self.windows.items()],
            "memory_bytes": {name: held() for name, held in self.memory.items()},
            "cold_start_seconds": self.cold_seconds,
        }


def subject(api: Api, name: str) -> Subject:
    """Raises NotFoundError for an endpoint that is none, InputError for one that writes text."""
    served, adapter = flow.asked(api, name)
    known = {endpoint.name: endpoint for endpoint in api.endpoints()}
    endpoint = known.get(served)
    if endpoint is None:
        hint = "see: llmo endpoints" if known else "deploy a model first: llmo deploy MODEL"
        raise NotFoundError(f"no endpoint '{served}'{nearest(served, sorted(known))}", hint=hint)
    ref = endpoint.model
    if adapter is not None:
        further = {one.name: one.model for one in api.adapters(served)}
        if adapter not in further:
            raise NotFoundError(
                f"'{served}' has no further model '{adapter}'{nearest(adapter, sorted(further))}",
                hint=f"see: llmo adapters {served}",
            )
        ref = further[adapter]
    model = api.artifact(ref, Kind.MODEL)
    card = model.card["task"]
    kind: type[Task] = plugins.load("llmo.tasks", card["task"])
    if kind.generates:
        raise InputError(
            f"'{name}' writes text, and what it does in a second depends on how much it writes",
            hint="ask it with OpenAI's clients; its tokens a second are in /metrics: llmo_generated_tokens_per_second",
        )
    return Subject(name, endpoint, model, kind.from_card(card))


def texts_of(api: Api, found: Subject, data: str | None = None) -> tuple[str, list[Asked]]:
    """Inputs of the test split, else of dev, of `data` (default: what the model was trained on), evenly spread; and
    which split of what they are. Raises DataError when there are none."""
    try:
        dataset = api.artifact(data or flow.data_of(api, found.model), Kind.DATASET)
    except InputError as error:
        if data is not None and isinstance(error, NotFoundError):
            error.what = f"there is no file '{data}', and {error.what}"
        error.hint = "give texts: --texts FILE, or a stored data set (see: llmo data list)"
        raise
    for split in HELD_OUT:
        rows: list[dict[str, Any]] = []
        while page := api.rows(dataset.digest, split, offset=len(rows), limit=PAGE):
            rows += page
            if len(page) < PAGE or len(rows) >= 10 * MOST_TEXTS:
                break
        if rows:
            step = max(1.0, len(rows) / MOST_TEXTS)
            picked = [rows[int(i * step)] for i in range(min(len(rows), MOST_TEXTS))]
            try:
                return f"{dataset.ref} {split}", [found.task.asked(row) for row in picked]
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"the rows of {dataset.ref} are no inputs of a model for {found.task.name}",
                    hint="another data set, or a file: --texts FILE",
                ) from None
    raise DataError(f"{dataset.ref} holds out no rows", hint="give texts: --texts FILE, or another data set")


def bench(
    api: Api,
    found: Subject,
    texts: Sequence[Asked],
    plan: Plan,
    hear: Hear = lambda what, done, total: None,
) -> dict[str, Any]:
    """Load the endpoint, and the plain pipeline of its model, window by window in turns; what both did.

    One that is asleep is woken. What cannot be measured from here is left out and named in `left_out`. Raises what the
    endpoint raises when a text is refused, and UnreachableError when it does not come up.
    """
    left_out: dict[str, str] = {}
    with gateway(api) as door, _home(api) as home, ExitStack() as stack:
        hear("waking", 0.0, 1.0)
        if isinstance(api, System):
            api.awake(found.name)  # one that only starts is waited for; over HTTP, the first request wakes it
        lengths = _lengths(door, found, texts)
        endpoint = next(one for one in api.endpoints() if one.name == found.endpoint.name)
        cores = _cores(api, endpoint)
        work = _work(home, found.model, left_out)
        peak = None if work is None else _peak(cores, endpoint.precision, left_out)
        cold, memory = replica_of(api, endpoint, home)
        sides = {"endpoint": Side(Target(door.endpoint(found.name), door.key, _bodies(texts)), cold, memory)}
        folder = _pipeline_folder(home, found, left_out) if plan.pipeline else None
        if folder is not None:
            hear("loading the plain pipeline", 0.0, 1.0)
            usual = stack.enter_context(plain(found.task.name, folder, found.task.max_length, cores))
            held = {"pipeline": partial(processes.memory, usual.pid)}
            sides["pipeline"] = Side(Target(usual.url, "", _bodies(texts)), usual.cold_seconds, held)
        _load(stack.enter_context(Load()), sides, plan, hear)
        measured = {name: side.figures() for name, side in sides.items()}
    return {
        "endpoint": found.name,
        "model": found.model.ref,
        "engine": endpoint.engine,
        "precision": endpoint.precision,
        "cores": cores,
        "texts": {"count": len(texts), "mean_tokens": round(statistics.fmean(lengths), 1), "longest": max(lengths)},
        "sides": measured,
        "times": _times(sides),
        "peak": None if work is None or peak is None else share(sides["endpoint"], work, lengths, peak),
        "left_out": left_out,
    }


def _load(load: Load, sides: Mapping[str, Side], plan: Plan, hear: Hear) -> None:
    part, order = plan.seconds / WINDOWS, list(sides)
    total, done = len(plan.clients) * len(sides) * WINDOWS * (part + WARM), 0.0
    for clients in plan.clients:
        for number in range(WINDOWS):
            for name in order if number % 2 == 0 else order[::-1]:
                began, before, what = time.monotonic(), done, f"{clients} clients, {name}"
                window = load.window(
                    sides[name].target, clients, part,
                    lambda began=began, before=before, what=what: hear(  # type: ignore[misc]
                        what, before + min(part + WARM, time.monotonic() - began), total
                    ),
                )  # fmt: skip
                if not window.latencies and window.failed:
                    raise _all_failed(name, window)
                sides[name].windows.setdefault(clients, []).append(window)
                done += part + WARM


def _all_failed(name: str, window: Window) -> LLMOError:
    try:
        said = json.loads(window.said)["error"]["what"]
    except (ValueError, KeyError, TypeError):
        said = window.said[:200]
    how = ", ".join(f"{count} times {why}" for why, count in window.failed.items())
    return LLMOError(f"the {name} answered none of the requests ({how}): {said}", hint="see: llmo endpoints, llmo ps")


def _bodies(texts: Sequence[Asked]) -> list[str]:
    return [json.dumps({"text": text} if isinstance(text, str) else text) for text in texts]


def _lengths(door: Door, found: Subject, texts: Sequence[Asked]) -> list[int]:
    """Tokens of each text as the model reads it, asked of the endpoint itself, which refuses here what it refuses."""
    lengths = []
    size = min(AT_ONCE, int(found.endpoint.deploy.get("queue") or AT_ONCE))
    with Client(door.url, door.key) as client:
        for start in range(0, len(texts), size):
            answers = client.predict(found.name, texts[start : start + size])
            lengths += [min(int(answer["tokens"]), found.task.max_length) for answer in answers]
    return lengths


@contextmanager
def _home(api: Api) -> Iterator[System | None]:
    """The store behind `api`, where it is on this machine: model folders and processes are looked at there."""
    if isinstance(api, System):
        yield api
        return
    settings = Settings.from_environment()
    server = running_server(settings.home)
    if server is None or server.url != getattr(api, "url", None):
        yield None
        return
    with System(settings) as system:
        yield system


def _cores(api: Api, endpoint: Endpoint) -> int:
    job = api.job(endpoint.job) if endpoint.job is not None else None
    granted = job.placement.cores if job is not None and job.placement is not None else 0
    asked = int(endpoint.deploy.get("cores") or 0)
    return min(granted or asked, asked or granted) or 1


def replica_of(
    api: Api, endpoint: Endpoint, home: System | None
) -> tuple[float | None, dict[str, Callable[[], int | None]]]:
    """Seconds from the last start of its replica until it answered, and what tells the memory of who serves it."""
    job = api.job(endpoint.job) if endpoint.job is not None else None
    if job is None or job.started_at is None:
        return None, {}
    events = api.events(root=job.root or job.id)
    ready = [e.at for e in events if (e.job, e.kind, e.attempt) == (job.id, "ready", job.attempt)]
    memory: dict[str, Callable[[], int | None]] = {}
    there = processes.read(job.pid) if job.pid is not None else None
    if there is not None and job.pid_started is not None and abs(there.started - job.pid_started) < 0.02:
        memory["replica"] = partial(processes.memory, there.pid)
    server = running_server(home.settings.home) if home is not None else None
    if server is not None and memory:
        memory["server"] = partial(processes.memory, server.pid, children=False)  # replicas are its children
    return (ready[-1] - job.started_at if ready else None), memory


def _pipeline_folder(home: System | None, found: Subject, left_out: dict[str, str]) -> Path | None:
    """The model as it was trained, in fp32, in the Hugging Face layout."""
    if found.task.name not in PIPELINES:
        left_out["pipeline"] = f"transformers has no plain pipeline for {found.task.name}"
    elif home is None:
        left_out["pipeline"] = "the store of the endpoint is on another machine"
    else:
        folder = home.path(flow.reference(found.model).get("reference", found.model.digest))
        if (folder / "model.safetensors").is_file():
            return folder
        left_out["pipeline"] = f"{found.model.ref} has no weights that transformers opens"
    return None


def _work(home: System | None, model: Artifact, left_out: dict[str, str]) -> Work | None:
    if home is None:
        left_out["peak"] = "the store of the endpoint is on another machine"
        return None
    try:
        config = json.loads((home.path(model.digest) / "config.json").read_text(encoding="utf-8"))
        return nominal_work(config)
    except (OSError, ValueError, ModelError) as error:
        left_out["peak"] = str(error)
        return None


def _peak(cores: int, precision: str, left_out: dict[str, str]) -> float | None:
    """Operations a second that this machine's `cores` do in `precision`, measured now."""
    try:
        peaks = measure(cores)
    except EnvironmentProblem as error:
        left_out["peak"] = str(error)
        return None
    if precision not in peaks:
        left_out["peak"] = f"no peak is measured for {precision}"
    return peaks.get(precision)


def share(side: Side, work: Work, lengths: Sequence[int], peak: float) -> dict[str, Any]:
    """How much of the machine's peak the best level used; a multiply-add is two operations."""
    best = max(joined(windows).requests_per_second for windows in side.windows.values())
    operations = 2 * work.of(lengths) / len(lengths)
    return {
        "operations_per_second": peak,
        "operations_per_text": round(operations),
        "share": round(best * operations / peak, 3),
    }


def _times(sides: Mapping[str, Side]) -> list[dict[str, Any]]:
    """How many times the pipeline's requests a second the endpoint answered, at each number of clients."""
    if "pipeline" not in sides:
        return []
    ours, theirs = (
        {n: joined(windows).requests_per_second for n, windows in sides[name].windows.items()}
        for name in ("endpoint", "pipeline")
    )
    return [{"clients": n, "times": round(ours[n] / theirs[n], 2)} for n in ours if theirs[n]]
