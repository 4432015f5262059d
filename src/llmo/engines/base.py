"""The contract of an engine: it runs one model in one process and knows nothing of HTTP, tasks or the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from llmo.errors import EnvironmentProblem, ModelError, NoRoomError
from llmo.types import ENCODER_ADAPTER_BYTES, Device


@dataclass(frozen=True, slots=True)
class Request:
    """One item for the model: token ids with special tokens; `id` is echoed in its chunks. `adapter` names one of the
    further models that were added; None is the model that was loaded."""

    id: int
    input_ids: Sequence[int]
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a request's answer. For encoders `data` is float32 logits, `[labels]` or `[tokens, labels]`
    without padding, or an embedding `[width]`, and the first chunk is the last."""

    id: int
    data: NDArray[np.float32]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """What a loaded encoder truly runs, found in what was built, not in what was asked for.

    `precision` (fp32, bf16 or int8) is that of most products with weights; `kernels` counts those products by the name
    that the library gives what computes them. `rest` is the precision of all between them. `instructions` are the best
    that the device has for that precision, as the kernel of the operating system (or the GPU) calls them.
    """

    precision: str
    rest: str
    kernels: Mapping[str, int]
    instructions: str
    threads: int
    streams: int
    library: str


class Engine(Protocol):
    """Load once, run many times, close. Not thread-safe: the replica owns one and calls it from one thread.

    `load` must compute on at most `device.cores` threads at once and raise ModelError for a folder it cannot run and
    EnvironmentProblem for what the machine lacks; it never falls back in silence, and `facts` says what it runs
    (ModelError once it is closed). `run` is one batch: the requests are padded together, unless an attribute `pads` of
    the engine says False; an encoder yields exactly one chunk per request, in any order.
    """

    name: ClassVar[str]
    abilities: ClassVar[frozenset[str]]

    def load(self, model: Path, device: Device) -> None: ...

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]: ...

    def facts(self) -> Facts: ...

    def close(self) -> None: ...


class Embedder(Engine, Protocol):
    """An engine whose `abilities` hold "embed": it also tells where a text lies in the encoder's own space.

    `embed` is as `run`, but each chunk's `data` is the mean of the last hidden states over all of the request's
    tokens, special ones included, at length 1. Raises ModelError for a folder without what it takes.
    """

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]: ...


class TakesAdapters(Protocol):
    """An engine, of either kind, whose `abilities` hold "adapters": it runs further models by name, mixed in one batch.

    `add_adapter` raises ConflictError for a name in use, NoRoomError where the others leave it no memory, and
    ModelError for a model that does not fit what is loaded in every module, or has no effect. After `remove_adapter`
    nothing may name it (NotFoundError where it is not loaded); what runs with it ends as it would have. Both may be
    called from any thread while another one runs the engine.
    """

    def add_adapter(self, name: str, folder: Path) -> None: ...

    def remove_adapter(self, name: str) -> None: ...


class Shared(Engine, TakesAdapters, Protocol):
    """An engine of an encoder that takes models trained on the same trunk: a folder as training leaves it, of method
    `head` or `lora`. One with another trunk is refused, and a request for one that is not loaded is InputError. All of
    them take at most `adapter_bytes`."""

    def load(self, model: Path, device: Device, *, adapter_bytes: int = ENCODER_ADAPTER_BYTES) -> None: ...


def no_room(count: int, needed: int, memory: int) -> ModelError:
    """What `add_adapter` raises when `count` loaded ones, with the new one, would need more bytes than there are: a
    NoRoomError, unless it is alone."""
    needs = "the adapter alone needs" if count == 1 else f"with this adapter the {count} loaded ones need"
    kind = ModelError if count == 1 else NoRoomError
    return kind(
        f"{needs} {-(-needed >> 20)} MiB, and {memory >> 20} MiB are set aside for adapters",
        hint=f"deploy it again with `--set adapters_mib={-(-needed >> 20)}`, or train at a lower rank",
    )


def closed() -> ModelError:
    """What an engine raises that is asked for anything while nothing is loaded."""
    return ModelError("the engine is closed", hint="load a model first")


def require_cpu(engine: str, device: Device) -> None:
    """Raises EnvironmentProblem for a device that this engine has no kernels for."""
    if device.kind != "cpu":
        raise EnvironmentProblem(
            f"the {engine} engine runs on the CPU, not on '{device.name}' ({device.kind})",
            hint="use the torch engine there",
        )
