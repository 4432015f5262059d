"""The contract of an engine: it runs one model in one process and knows nothing of HTTP, tasks or the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from llmo.types import Device


@dataclass(frozen=True, slots=True)
class Request:
    """One item for the model: token ids with special tokens; `id` is echoed in its chunks."""

    id: int
    input_ids: Sequence[int]
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a request's answer. For encoders `data` is float32 logits, `[labels]` or `[tokens, labels]`
    without padding, or an embedding `[width]`, and the first chunk is the last."""

    id: int
    data: NDArray[np.float32]
    finished: bool = True


class Engine(Protocol):
    """Load once, run many times, close. Not thread-safe: the replica owns one and calls it from one thread.

    `load` must use at most `device.cores` threads and raise ModelError for a folder it cannot run and
    EnvironmentProblem for what the machine lacks; it never falls back in silence. `run` is one batch: the
    requests are padded together; an encoder yields exactly one chunk per request, in any order.
    """

    name: ClassVar[str]
    abilities: ClassVar[frozenset[str]]

    def load(self, model: Path, device: Device) -> None: ...

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]: ...

    def close(self) -> None: ...


class Embedder(Engine, Protocol):
    """An engine whose `abilities` hold "embed": it also tells where a text lies in the encoder's own space.

    `embed` is as `run`, but each chunk's `data` is the mean of the last hidden states over all of the request's
    tokens, special ones included, at length 1. Raises ModelError for a folder without what it takes.
    """

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]: ...
