"""The contract of an engine that generates: prompts are added and cancelled while it steps, so batches never stop.

An encoder's `Engine` runs one batch and is done with it. Here every `step` moves all streams on by at least a token,
and prompts come and go in between; that is why this is a contract of its own, and not one more ability of `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from llmo.engines.base import TakesAdapters
from llmo.types import GENERATOR_ADAPTER_BYTES, Device

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the answer must look like: `text` is a JSON schema (as JSON) or a regular expression."""

    kind: Literal["json_schema", "regex"]
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Penalties see the prompt (`repetition`) or only the answer (the other two), as elsewhere.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch each filter off. With a `seed` the answer
    depends on nothing but the prompt, these settings and the seed. `logprobs` asks for that many alternatives a token
    (0: only the chosen one's). `stop_ids` end the answer as the model's own end tokens do, and are not part of it.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_end: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One stream. `tenant` bounds who shares its cached prefixes; `adapter` names one of the loaded adapters."""

    id: int
    input_ids: Sequence[int]
    sampling: Sampling = Sampling()
    tenant: str = ""
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of the token's probability before filters and temperature; `top` holds the likeliest, best
    first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one stream: no `tokens` while its prompt is still being computed, then one or several. The
    last one says how it `finish`ed: "stop" at an end token (which is not among `tokens`) or where a grammar is
    fulfilled, "length" at `max_tokens` or the end of the context. `cached` prompt tokens were not computed."""

    id: int
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()
    finish: Finish | None = None
    cached: int = 0


class GenerationEngine(Protocol):
    """Load once; then add, step, cancel. Not thread-safe: the replica owns one and calls it from one thread.

    `load` must use at most `device.cores` threads and raise ModelError for a folder it cannot run (naming the
    engines that can) and EnvironmentProblem for what the machine lacks; it never falls back in silence. `options`
    are `GenerationOptions` as the deployment resolved them.

    `add` puts a prompt in line and raises InputError for one that can never run (longer than `context`, an unknown
    adapter, a grammar that cannot be compiled); it never blocks. `step` runs one iteration over what is in line and
    running and returns its deltas, an empty list when nothing is left to do. A stream that is cancelled is forgotten
    at once: its memory is free before the next step, and no delta of it follows. What goes wrong with one stream
    during a step must not end the others: the engine drops it and reports it through `failed`.

    Greedy answers are the same alone and in any batch, and a seeded answer likewise, if `deterministic` is True; an
    engine that cannot promise it says False, and the card carries that.

    `score` gives the natural log-probabilities of `ids[1:]` given what stands before each, one float32 array
    `[len(ids) - 1]` a sequence: what perplexity, verification and logprobs of a prompt are made of.
    """

    name: ClassVar[str]
    abilities: ClassVar[frozenset[str]]  # holds "generate"
    deterministic: ClassVar[bool]
    context: int  # tokens of prompt and answer together, once loaded
    vocabulary: int

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None: ...

    def add(self, prompt: Prompt) -> None: ...

    def cancel(self, id: int) -> None: ...

    def step(self) -> list[Delta]: ...

    def failed(self) -> list[tuple[int, Exception]]:
        """Streams that ended in an error since the last call, with the error; empty nearly always."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]: ...

    def stats(self) -> Mapping[str, Any]:
        """Numbers for metrics: `running`, `waiting`, `cache_tokens`, `cache_hits` (tokens), `free_tokens`; where tokens
        are guessed, `drafted` and how many of them were `accepted`."""

    def close(self) -> None: ...


class AdapterEngine(GenerationEngine, TakesAdapters, Protocol):
    """An engine that takes LoRA adapters of its base; each in a folder as peft saves it."""


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How much an engine may take: `streams` at once, `cache_bytes` for keys and values, `adapter_bytes` for adapters
    (if it takes any), `context` tokens (None: the model's own), `chunk` prompt tokens computed in one step beside the
    running streams, and `precision` (fp32, bf16 or int8; None: as the model folder's card says). `lookup` allows it to
    compute several tokens of an answer in one step, guessed from the text so far, where that is faster; answers are the
    same."""

    streams: int = 16
    cache_bytes: int = 1 << 30
    adapter_bytes: int = GENERATOR_ADAPTER_BYTES
    context: int | None = None
    chunk: int = 256
    precision: str | None = None
    lookup: bool = True
