"""Steps streams through llama.cpp: who computes how many tokens in the next call, and what becomes of the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmo.engines.base import require_cpu
from llmo.engines.folder import end_ids, require
from llmo.engines.generation import Delta, Finish, GenerationOptions, Prompt
from llmo.engines.llamacpp.chooser import Chooser, log_total
from llmo.engines.llamacpp.constraint import Grammars
from llmo.engines.llamacpp.header import Header, read_header
from llmo.engines.llamacpp.library import complaint
from llmo.engines.llamacpp.prefixes import Ids, Prefixes, common
from llmo.engines.llamacpp.runtime import BATCH, MOST_STREAMS, Cache, Weights
from llmo.engines.llamacpp.stream import Part, Stream
from llmo.errors import BusyError, ConflictError, EnvironmentProblem, InputError, LLMOError, ModelError
from llmo.types import Device

NAME = "model.gguf"
SCORED = 128  # positions whose logits are held at once: 25 MB at a vocabulary of 49,152
WORTH_WAITING = 32  # tokens of another's beginning; below it, computing them again costs less than waiting
SMALLEST_CACHE = 256  # tokens; llama.cpp rounds up to a multiple of it


class LlamaCppEngine:
    """fp32, bf16, fp16 or int8 as the GGUF file is. Prefixes are shared among the prompts of a tenant, never across.

    It is not deterministic in the contract's sense: how llama.cpp adds depends on what shares the call, so a near tie
    may fall otherwise beside other streams than alone. No adapters.
    """

    name: ClassVar[str] = "llamacpp"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate"})
    deterministic: ClassVar[bool] = False

    def __init__(self) -> None:
        self.context = 0
        self.vocabulary = 0
        self._weights: Weights | None = None
        self._cache: Cache | None = None
        self._reset(0, 0, frozenset(), None)

    def _reset(self, streams: int, chunk: int, ends: frozenset[int], grammars: Grammars | None) -> None:
        self._chunk, self._ends, self._grammars = chunk, ends, grammars
        self._waiting: deque[Stream] = deque()
        self._running: list[Stream] = []
        self._failed: list[tuple[int, Exception]] = []
        self._prefixes = Prefixes(streams)
        self._free = list(range(2 * streams))  # stream numbers of the cache; the one after them is for scoring
        self._scoring, self._most, self._hits = 2 * streams, streams, 0

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None:
        require_cpu(self.name, device)
        self.close()
        path = require(model, NAME)
        header = read_header(path)
        if options.precision and header.precision != options.precision:
            raise ModelError(
                f"{NAME} is {header.precision or 'of another precision'}, not {options.precision}",
                where=str(path),
                hint=f"write it at {options.precision} with `llmo compress`",
            )
        try:
            self._open(path, header, device, options)
        except LLMOError:
            self.close()
            raise
        ends = end_ids(model) or frozenset({header.end} if header.end is not None else ())
        self._reset(self._most, options.chunk, ends, Grammars(model, self.vocabulary, ends))
        self.score([[0, 0]])  # touches every weight once, so that the first prompt does not pay for it

    def _open(self, path: Path, header: Header, device: Device, options: GenerationOptions) -> None:
        exact = header.precision == "fp32"
        self._most = streams = max(1, min(options.streams, (MOST_STREAMS - 1) // 2))
        self._weights = Weights(path)
        context = min(self._weights.context, options.context or self._weights.context)
        cells = min(options.cache_bytes // (header.cell * (4 if exact else 2)), (streams + 1) * context)
        if cells < min(context, SMALLEST_CACHE):
            raise EnvironmentProblem(
                f"{options.cache_bytes} bytes hold the keys and values of {cells} tokens only",
                hint=f"give the cache room for {min(context, SMALLEST_CACHE)} tokens at least",
            )
        self._cache = Cache(
            self._weights,
            cells=max(cells // SMALLEST_CACHE, 1) * SMALLEST_CACHE,
            streams=2 * streams + 1,
            outputs=max(SCORED, 2 * streams + 1),
            threads=max(1, device.cores),
            exact=exact,
        )
        self.vocabulary = self._weights.vocabulary
        self.context = min(context, self._cache.cells)

    def add(self, prompt: Prompt) -> None:
        if self._grammars is None:
            raise ModelError("the engine is closed", hint="load a model first")
        if prompt.adapter is not None:
            raise InputError(
                f"no adapter '{prompt.adapter}': the llamacpp engine runs merged models only",
                hint="merge the adapter, or serve it with the torch engine",
            )
        ids = self._checked(prompt.input_ids)
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context {self.context} for prompt and answer together",
                hint="shorten the prompt, or deploy with a longer context",
            )
        if any(prompt.id == stream.id for stream in (*self._running, *self._waiting)):
            raise ConflictError(f"a stream {prompt.id} is already there", hint="give every prompt its own id")
        wanted = prompt.sampling
        constraint = self._grammars.compile(wanted.grammar) if wanted.grammar else None
        ends = wanted.stop_ids if wanted.ignore_end and not constraint else wanted.stop_ids | self._ends
        self._waiting.append(
            Stream(
                id=prompt.id,
                tenant=prompt.tenant,
                prompt=ids,
                limit=min(wanted.max_tokens, self.context - len(ids)),
                chooser=Chooser(wanted, ids, constraint),
                ends=frozenset(i for i in ends if 0 <= i < self.vocabulary),
            )
        )

    def cancel(self, id: int) -> None:
        self._waiting = deque(stream for stream in self._waiting if stream.id != id)
        for stream in [stream for stream in self._running if stream.id == id]:
            self._drop(stream)

    def step(self) -> list[Delta]:
        self._admit()
        parts = self._plan()
        if not parts:
            return []
        if self._compute(parts):
            return self._advance(parts)
        deltas = []
        for part in parts:  # one of them is at fault: the others must not pay for it
            if self._compute([part]):
                deltas += self._advance([part])
            else:
                self._fail(part.stream, ModelError(f"llama.cpp cannot compute this stream: {complaint()}"))
        return deltas

    def failed(self) -> list[tuple[int, Exception]]:
        failed, self._failed = self._failed, []
        return failed

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return [self._score(self._checked(ids)) for ids in sequences]

    def stats(self) -> Mapping[str, Any]:
        cells = self._cache.cells if self._cache else 0
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "cache_tokens": self._prefixes.tokens + sum(stream.computed for stream in self._running),
            "cache_hits": self._hits,
            "free_tokens": cells - sum(stream.need for stream in self._running),
        }

    def close(self) -> None:
        for part in (self._cache, self._weights):  # in this order: the cache points into the weights
            if part is not None:
                part.close()
        self._cache = self._weights = None
        self._reset(0, 0, frozenset(), None)

    def _checked(self, ids: Sequence[int]) -> Ids:
        """The library would end the process on a token that the model does not have."""
        if self._cache is None:
            raise ModelError("the engine is closed", hint="load a model first")
        try:
            tokens = np.asarray(ids, dtype=np.int32)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError("the prompt is not a list of token ids") from error
        if tokens.ndim != 1 or not tokens.size:
            raise InputError("the prompt has no tokens")
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise InputError(f"the prompt has a token outside of the model's {self.vocabulary}")
        return tokens

    def _admit(self) -> None:
        for stream in list(self._waiting):
            if len(self._running) >= self._most or not self._room(stream.need):
                return
            source, length = self._prefixes.best(stream.tenant, stream.prompt[:-1], (r.held() for r in self._running))
            if self._worth_waiting(stream, length):
                continue
            self._waiting.remove(stream)
            stream.number = self._free.pop()
            if length:
                self._loaded.share(source, stream.number, length)
                stream.computed = stream.cached = length
                self._hits += length
            self._make_room(stream.need)
            self._running.append(stream)

    def _worth_waiting(self, stream: Stream, length: int) -> bool:
        """Another prompt of the tenant is just computing a beginning that this one can have from it soon."""
        return any(
            other.tenant == stream.tenant
            and other.computed < (alike := common(other.prompt, stream.prompt[:-1]))
            and alike >= length + WORTH_WAITING
            for other in self._running
        )

    def _plan(self) -> list[Part]:
        """A token for every stream that answers, then as much of the prompts as the step may take."""
        parts = [Part(stream, stream.answer[-1:]) for stream in self._running if stream.prompted]
        left = min(self._chunk, BATCH - len(parts)) if parts else BATCH
        for stream in self._running:
            if not stream.prompted and left:
                parts.append(Part(stream, stream.prompt[stream.computed : stream.computed + left]))
                left -= len(parts[-1].tokens)
        return parts

    def _compute(self, parts: list[Part]) -> bool:
        cache, entry = self._loaded, 0
        for part in parts:
            first, size = part.stream.computed, len(part.tokens)
            place = slice(entry, entry + size)
            cache.tokens[place], cache.owners[place], cache.wanted[place] = part.tokens, part.stream.number, 0
            cache.positions[place] = np.arange(first, first + size)
            entry += size
            part.last = entry - 1
            cache.wanted[part.last] = first + size >= len(part.stream.prompt)
        if not cache.decode(entry):
            for part in parts:
                cache.cut(part.stream.number, part.stream.computed)
            return False
        for part in parts:
            part.stream.computed += len(part.tokens)
        return True

    def _advance(self, parts: list[Part]) -> list[Delta]:
        deltas = []
        for stream, last in ((part.stream, part.last) for part in parts if part.stream.prompted):
            try:
                deltas.append(self._chosen(stream, self._loaded.logits(last)))
            except LLMOError as error:
                self._fail(stream, error)
        return deltas

    def _chosen(self, stream: Stream, logits: NDArray[np.float32]) -> Delta:
        token = stream.chooser.choose(logits, stream.ends)
        cached = 0 if stream.answer else stream.cached
        if token in stream.ends:
            self._keep(stream)
            return Delta(stream.id, (), finish="stop", cached=cached)
        logprob = stream.chooser.logprob(logits, token)
        stream.answer.append(token)
        finish: Finish | None = "length" if len(stream.answer) >= stream.limit else None
        if stream.chooser.complete:
            finish = "stop"
        if finish:
            self._keep(stream)
        return Delta(stream.id, (token,), () if logprob is None else (logprob,), finish, cached)

    def _score(self, ids: Ids) -> NDArray[np.float32]:
        if len(ids) > self.context:
            raise InputError(f"{len(ids)} tokens are longer than the context of {self.context}")
        if not self._room(len(ids)):
            raise BusyError("the running streams leave no room to score this", retry_after=1)
        self._make_room(len(ids))
        cache, found = self._loaded, np.empty(len(ids) - 1, np.float32)
        try:
            for start in range(0, len(ids), SCORED):
                part = ids[start : start + SCORED]
                place = slice(0, len(part))
                cache.tokens[place], cache.owners[place], cache.wanted[place] = part, self._scoring, 1
                cache.positions[place] = np.arange(start, start + len(part))
                if not cache.decode(len(part)):
                    raise ModelError(f"llama.cpp cannot score this: {complaint()}")
                for i in range(min(len(part), len(ids) - 1 - start)):
                    logits = cache.logits(i)
                    found[start + i] = float(logits[ids[start + i + 1]]) - log_total(logits)
        finally:
            cache.cut(self._scoring)
        return found

    def _room(self, tokens: int) -> bool:
        return sum(stream.need for stream in self._running) + tokens <= self._loaded.cells

    def _make_room(self, tokens: int) -> None:
        """Let go of kept prefixes until so many more fit beside the running streams, counted at their longest."""
        spare = self._loaded.cells - sum(stream.need for stream in self._running) - tokens
        while self._prefixes.tokens > spare:
            self._release(self._prefixes.oldest())

    def _keep(self, stream: Stream) -> None:
        self._running.remove(stream)
        for number in self._prefixes.keep(stream.held()):
            self._release(number)

    def _drop(self, stream: Stream) -> None:
        self._running.remove(stream)
        self._release(stream.number)

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._drop(stream)
        self._failed.append((stream.id, error))

    def _release(self, number: int) -> None:
        self._loaded.cut(number)
        self._free.append(number)

    @property
    def _loaded(self) -> Cache:
        if self._cache is None:
            raise ModelError("the engine is closed", hint="load a model first")
        return self._cache
