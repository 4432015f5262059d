"""What engines over a paged cache share: streams in line, what each step computes, and the tokens chosen from it.

An engine adds the computing: it says which numbers a list of pieces gives, and where keys and values are kept.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmo.engines.folder import card_precision, end_ids
from llmo.engines.generation import Delta, Finish, GenerationOptions, Prompt, TokenLogprob
from llmo.engines.grammar import Constraint, Grammars
from llmo.engines.paged.blocks import BLOCK, Blocks, salt
from llmo.engines.paged.lookup import Costs, Lookup, worth
from llmo.engines.paged.scheduler import Scheduler
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.sampling import Sampler, token_logprob
from llmo.errors import ConflictError, InputError, LLMOError, ModelError


class Batching(ABC):
    """Everything of the contract but `load`, `close` and the arithmetic. `load` ends with a call of `_start`."""

    name: ClassVar[str]
    context: int = 0
    vocabulary: int = 0

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._failed: list[tuple[int, Exception]] = []
        self._grammars: Grammars | None = None
        self._costs: Costs | None = None
        self._hits = self._drafted = self._accepted = 0
        self._running = False

    @abstractmethod
    def _compute(self, pieces: Sequence[Piece]) -> Iterable[NDArray[np.float32] | int]:
        """Compute the pieces, prompts first; give the logits `[vocabulary]` of each that is `last`, or the token
        that its sampler would choose where its stream is `plain`. What cannot be computed is a RuntimeError
        or a MemoryError."""

    @abstractmethod
    def _score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of `ids[1:]`; the streams are neither read nor disturbed."""

    def _room(self, options: GenerationOptions, positions: int, block_bytes: int, size: int = BLOCK) -> int:
        """How many blocks of `size` tokens the cache has; sets `context` to what a model of `positions` makes of them.
        Raises InputError where a cache is too small for anything, and for other options that cannot be."""
        if options.streams < 1 or options.chunk < 1:
            raise InputError("streams and chunk must be at least 1")
        count = options.cache_bytes // block_bytes
        if count < 2:
            raise InputError(
                f"the cache of {options.cache_bytes} bytes holds no {2 * size} tokens",
                hint="raise cache_bytes",
                where="cache_bytes",
            )
        self.context = min(positions, options.context or positions, (count - 1) * size)
        return count

    def _start(self, folder: Path, options: GenerationOptions, blocks: Blocks, share_answers: bool) -> None:
        """`share_answers`: an answer's keys and values are those that the same tokens have in a prompt."""
        self._folder = folder
        self._ends = end_ids(folder)
        self._blocks = blocks
        self._scheduler = Scheduler(blocks, options.streams, options.chunk, share_answers)
        self._costs = Costs() if options.lookup else None
        self._hits = self._drafted = self._accepted = 0
        self._running = True

    def _stop(self) -> None:
        self._running = False
        self._grammars = None
        self._streams.clear()
        self._failed.clear()

    def add(self, prompt: Prompt) -> None:
        self._check_open()
        if prompt.id in self._streams:
            raise ConflictError(
                f"a stream with the id {prompt.id} is running", hint="give every stream an id of its own"
            )
        ids = [int(token) for token in prompt.input_ids]
        self._check_ids(ids)
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context is {self.context} with the answer",
                hint="shorten it, or deploy with a longer context",
                where="context_length_exceeded",
            )
        sampler, constraint = Sampler(prompt.sampling, ids), self._constraint(prompt)
        adapter = self._adapter(prompt.adapter)
        stream = Stream(
            prompt=prompt,
            sampler=sampler,
            ids=ids,
            asked=len(ids),
            key=salt(prompt.tenant, adapter),
            adapter=adapter,
            constraint=constraint,
            block=self._blocks.size,
        )
        self._streams[prompt.id] = stream
        self._scheduler.add(stream)

    def cancel(self, id: int) -> None:
        if id in self._streams:
            self._forget(self._streams[id])

    def step(self) -> list[Delta]:
        self._check_open()
        deltas: list[Delta] = []
        while self._streams and not deltas:  # again only where all that it computed failed
            deltas = self._iterate(self._guessed(sorted(self._scheduler.plan(), key=_order)))
        return deltas

    def _guessed(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces, and behind the tokens of answers what may follow them, as far as it is worth its time."""
        if self._costs is None:
            return list(pieces)
        for piece in pieces:
            stream = piece.stream
            if stream.decoding and stream.lookup is None and stream.constraint is None:
                stream.lookup = Lookup(stream.ids)
        answers = sum(_order(piece) == 2 for piece in pieces)
        lookups = [piece.stream.lookup if piece.stream.decoding else None for piece in pieces]
        counts = worth([0.0 if lookup is None else lookup.chance for lookup in lookups], answers, self._costs)
        found = []
        for piece, lookup, count in zip(pieces, lookups, counts, strict=True):
            found.append(piece)
            if lookup is not None and count:
                stream = piece.stream
                left = min(self.context, stream.asked + stream.prompt.sampling.max_tokens) - len(stream.ids) - 1
                guesses = lookup.guesses(self._scheduler.spare(stream, min(count, left)))
                found += [Piece(stream, len(stream.ids) + i, 1, guess) for i, guess in enumerate(guesses)]
        return found

    def _iterate(self, pieces: Sequence[Piece]) -> list[Delta]:
        """Compute the pieces and choose the tokens that follow from them."""
        streams = [(stream, list(own)) for stream, own in groupby(pieces, key=lambda piece: piece.stream)]
        began = time.perf_counter()
        try:
            logits = iter(self._compute(pieces))
        except (RuntimeError, MemoryError) as error:  # memory, mostly; which stream it was cannot be told
            for stream, _ in streams:
                self._fail(stream, ModelError(f"the step could not be computed: {str(error)[:200]}"))
            return []
        if self._costs is not None and _order(pieces[0]) == 2:
            self._costs.saw(len(pieces), time.perf_counter() - began)
        deltas = []
        for stream, own in streams:
            try:
                deltas.append(self._advance(stream, own, list(islice(logits, sum(piece.last for piece in own)))))
            except LLMOError as error:
                self._fail(stream, error)
        return deltas

    def failed(self) -> list[tuple[int, Exception]]:
        failed, self._failed = self._failed, []
        return failed

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        self._check_open()
        found = []
        for sequence in sequences:
            ids = [int(token) for token in sequence]
            self._check_ids(ids)
            if len(ids) > self.context:
                raise InputError(f"a sequence of {len(ids)} tokens, the context is {self.context}")
            found.append(self._score(ids))
        return found

    def stats(self) -> Mapping[str, Any]:
        self._check_open()
        scheduler, blocks = self._scheduler, self._blocks
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "cache_tokens": blocks.usable * blocks.size,
            "cache_hits": self._hits,
            "free_tokens": blocks.free * blocks.size,
            "preempted": scheduler.preempted,
            "drafted": self._drafted,
            "accepted": self._accepted,
        }

    def _advance(self, stream: Stream, pieces: Sequence[Piece], logits: Sequence[NDArray[np.float32] | int]) -> Delta:
        """Choose the tokens that follow, as long as the next guess is what was chosen, and end the stream where it
        ends. A guess that was wrong is computed over at the next step."""
        if not logits:
            self._scheduler.computed(pieces[0])
            return Delta(stream.prompt.id, ())
        if len(stream.ids) == stream.asked:
            self._hits += stream.cached
        self._drafted += len(pieces) - 1
        before = len(stream.ids)
        finish: Finish | None = None
        logprobs: list[TokenLogprob] = []
        for piece, row in zip(pieces, logits, strict=True):
            if piece.guess is not None:
                if piece.guess != stream.ids[-1]:
                    break
                self._accepted += 1
            self._scheduler.computed(piece)
            finish = self._choose(stream, row, logprobs)
            if finish is not None:
                self._forget(stream)
                break
        return Delta(stream.prompt.id, stream.ids[before:], logprobs, finish, stream.cached)

    def _choose(self, stream: Stream, logits: NDArray[np.float32] | int, logprobs: list[TokenLogprob]) -> Finish | None:
        """Add the token that follows to the stream; how it ends the answer, or that it does not."""
        sampling, constraint = stream.prompt.sampling, stream.constraint
        if isinstance(logits, int):
            token = logits
            stream.sampler.chose(token)
        else:
            token = stream.sampler.choose(logits, None if constraint is None else constraint.mask())
        ended = token in self._ends and (constraint is not None or not sampling.ignore_end)
        if ended or token in sampling.stop_ids:
            return "stop"
        stream.ids.append(token)
        if stream.lookup is not None:
            stream.lookup.grew()
        if sampling.logprobs is not None and not isinstance(logits, int):
            logprobs.append(token_logprob(logits, token, sampling.logprobs))
        if constraint is not None:
            constraint.accept(token)
            if constraint.complete:
                return "stop"
        full = len(stream.ids) - stream.asked >= sampling.max_tokens or len(stream.ids) >= self.context
        return "length" if full else None

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._forget(stream)
        self._failed.append((stream.prompt.id, error))

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.prompt.id]
        self._scheduler.remove(stream)

    def _adapter(self, name: str | None) -> str | None:
        """What tells the adapter of that name from all others. Raises InputError where there is none."""
        if name is not None:
            raise InputError(f"unknown adapter '{name}'", hint=f"the {self.name} engine has none loaded")
        return None

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise InputError("the prompt has no tokens")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise InputError(
                f"a token outside the model's {self.vocabulary}", hint="the tokeniser may not belong to this model"
            )

    def _constraint(self, prompt: Prompt) -> Constraint | None:
        grammar = prompt.sampling.grammar
        if grammar is None:
            return None
        if self._grammars is None:  # reading a tokeniser for grammars takes half a second
            self._grammars = Grammars(self._folder, self.vocabulary, sorted(self._ends))
        return self._grammars.compile(grammar)

    def _check_open(self) -> None:
        if not self._running:
            raise ModelError("the engine is closed", hint="load a model first")


def pick_precision(model: Path, options: GenerationOptions, known: Collection[str], default: str) -> str:
    """What was asked for, else what the folder's card says. Raises InputError for what the engine does not know."""
    precision = options.precision or card_precision(model) or default
    if precision not in known:
        raise InputError(f"unknown precision '{precision}'", hint=f"known: {', '.join(known)}")
    return precision


def _order(piece: Piece) -> int:
    """Prompts first, then answers that are computed again, then single tokens."""
    return 0 if piece.of_prompt else 1 if piece.count > 1 else 2
