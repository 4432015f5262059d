"""The nouns of the system as frozen records: what every floor says to the others."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

# What a model is asked: a text, or texts by name (`question` and `context`), as its task takes them.
Asked = str | Mapping[str, str]
TEXT_NAMES = ("text", "pair", "question", "context")  # of the texts in a request, whatever the task


class JobState(enum.StrEnum):
    """queued -> starting -> running -> done | failed | stopped."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.STOPPED)


class Reason(enum.StrEnum):
    """Why a job reached its state."""

    FINISHED = "finished"
    CACHED = "cached"
    ERROR = "error"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    USER = "user"
    LOST = "lost"
    PREEMPTED = "preempted"
    NO_DEVICE = "no_device"


class Kind(enum.StrEnum):
    """What an artifact is."""

    DATASET = "dataset"
    MODEL = "model"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Device:
    """A place that computes. `memory` and `free` are bytes, `cores` the threads a job may use there.

    `reason` says how it was detected, or why it cannot be used.
    """

    name: str
    kind: str  # "cpu" | "cuda"
    memory: int
    free: int
    cores: int
    usable: bool = True
    reason: str = ""
    features: tuple[str, ...] = ()
    serve_memory: int = 0  # bytes that endpoints may take together; 0: all of `memory`


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job asks of the machine: `cores` at least, `cores_max` at most (None: all that is free)."""

    cores: int = 1
    cores_max: int | None = None
    memory: int = 512 << 20
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """What the scheduler granted: cores on the CPU, bytes of memory, names of GPUs."""

    cores: int
    memory: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the job table. `spec` is the operation's own; `inputs` maps a name to an artifact digest."""

    id: int
    op: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    needs: Needs
    state: JobState
    name: str = ""
    reason: Reason | None = None
    error: Mapping[str, Any] | None = None  # LLMOError.to_json()
    waiting: str = ""
    parent: int | None = None
    root: int | None = None
    child_key: str | None = None
    attempt: int = 1
    max_attempts: int = 3
    cache_key: str | None = None
    service: bool = False
    stop_requested: bool = False
    owner: str = ""
    placement: Placement | None = None
    pid: int | None = None
    pid_started: float | None = None
    address: str | None = None
    output: str | None = None  # digest of the artifact it published
    result: Mapping[str, Any] | None = None
    created_at: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None

    def evolve(self, **changes: Any) -> Job:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Artifact:
    """An immutable version of a data set, model or report: `name@version`, named by `digest` (sha256:...)."""

    kind: Kind
    name: str
    version: int
    digest: str
    size: int
    card: Mapping[str, Any]
    job: int | None
    created_at: float
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Event:
    """One appended line of a job: kind is progress | note | spawn | ready | metric | state | error."""

    id: int
    job: int
    attempt: int
    at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A public name and the service job behind it. `state` is up | starting | down | asleep | waking.

    `deploy` is the section it was deployed with; `waiting` says why its service does not run now, and `since` (unix
    seconds) from when on it is asleep.
    """

    name: str
    state: str
    model: str  # digest
    model_ref: str
    job: int | None
    task: str = ""
    engine: str = ""
    precision: str = ""
    address: str | None = None
    created_at: float = 0.0
    deploy: Mapping[str, Any] = field(default_factory=dict)
    waiting: str = ""
    since: float | None = None

    @property
    def rests(self) -> bool:
        """Whether it gave way to another and comes back when it is asked: requests wait for it."""
        return self.state in ("asleep", "waking")


# What all adapters of one endpoint take at most, where nothing is said.
GENERATOR_ADAPTER_BYTES, ENCODER_ADAPTER_BYTES = 512 << 20, 64 << 20
MAX_BATCH_TOKENS = 4096  # padded ones of one batch, where a deployment does not say


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA, or a model of an encoder's trunk, that an endpoint also answers with as the model `ENDPOINT:NAME`; `base`
    is the model whose weights lie beneath. One of another base than is served now `answers` only when its own is served
    again."""

    endpoint: str
    name: str
    model: str  # digest of the version that holds it
    model_ref: str
    base: str  # digest
    created_at: float = 0.0
    answers: bool = True


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as it is kept: never the secret, only its SHA-256."""

    id: str
    owner: str
    role: str  # "admin" | "member" | "predict"
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody said of one answer, or of two beside each other, to `messages` (OpenAI's, up to the question).

    `kind` is rating (good | bad), comparison (first | second | tie) or correction. Each answer is `{"endpoint",
    "model" (ref), "digest", "content"}`; `endpoint`, `model` (digest) and `model_ref` are the first one's, `against`
    is the second one's endpoint.
    """

    id: int
    at: float
    endpoint: str
    kind: str
    messages: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    model: str = ""
    model_ref: str = ""
    against: str | None = None
    rating: str | None = None
    correction: str | None = None
    comment: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What a parent hears of its child: its state, its output's digest and its result."""

    state: JobState
    job: int
    cached: bool
    output: str | None
    ref: str | None
    result: Mapping[str, Any]
    error: Mapping[str, Any] | None = None
    reason: Reason | None = None


def to_json(value: Any) -> Any:
    """Any record here as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(v) for v in value]
    return value


def from_json(cls: type[T], body: Mapping[str, Any]) -> T:
    """The inverse of `to_json` for the records of this module; keys it does not know are ignored."""
    hints = _hints_of(cls)
    values = {
        f.name: _revive(hints[f.name], body[f.name])
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name in body
    }
    return cls(**values)


_HINTS: dict[type, dict[str, Any]] = {}  # evaluating annotations takes longer than all the rest


def _hints_of(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _revive(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return _revive(inner, value)
    if origin is tuple:
        return tuple(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    return value


def canonical(value: Any) -> str:
    """JSON with one spelling per value: what digests are taken of."""
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
