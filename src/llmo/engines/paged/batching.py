"""What engines over a paged cache share: streams in line, what each step computes, and the tokens chosen from it.

An engine adds the computing: it says which numbers a list of pieces gives, and where keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmo.engines.folder import end_ids
from llmo.engines.generation import Delta, Finish, GenerationOptions, Prompt, TokenLogprob
from llmo.engines.grammar import Constraint, Grammars
from llmo.engines.paged.blocks import Blocks, salt
from llmo.engines.paged.scheduler import Scheduler
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.sampling import Sampler, token_logprob
from llmo.errors import ConflictError, InputError, LLMOError, ModelError


class Batching:
    """Everything of the contract but `load`, `close` and the arithmetic. `load` ends with a call of `_start`."""

    name: ClassVar[str]
    context: int = 0
    vocabulary: int = 0

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._failed: list[tuple[int, Exception]] = []
        self._grammars: Grammars | None = None
        self._hits = 0
        self._running = False

    def _compute(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """Compute the pieces, prompts first; give the logits of those that are `last`, `[streams, vocabulary]`. What
        cannot be computed is a RuntimeError."""
        raise NotImplementedError

    def _score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of `ids[1:]`; the streams are neither read nor disturbed."""
        raise NotImplementedError

    def _start(self, folder: Path, options: GenerationOptions, blocks: Blocks, share_answers: bool) -> None:
        """`share_answers`: an answer's keys and values are those that the same tokens have in a prompt."""
        self._folder = folder
        self._ends = end_ids(folder)
        self._blocks = blocks
        self._scheduler = Scheduler(blocks, options.streams, options.chunk, share_answers)
        self._hits = 0
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
        adapter = self._adapter(prompt.adapter)
        stream = Stream(
            prompt=prompt,
            sampler=Sampler(prompt.sampling, ids),
            ids=ids,
            asked=len(ids),
            key=salt(prompt.tenant, adapter),
            adapter=adapter,
            constraint=self._constraint(prompt),
            block=self._blocks.size,
        )
        self._streams[prompt.id] = stream
        self._scheduler.add(stream)

    def cancel(self, id: int) -> None:
        stream = self._streams.pop(id, None)
        if stream is not None:
            self._scheduler.remove(stream)

    def step(self) -> list[Delta]:
        self._check_open()
        deltas: list[Delta] = []
        while self._streams and not deltas:  # again only where all that it computed failed
            deltas = self._iterate(sorted(self._scheduler.plan(), key=_order))
        return deltas

    def _iterate(self, pieces: Sequence[Piece]) -> list[Delta]:
        """Compute the pieces and choose the tokens that follow from them."""
        try:
            logits = iter(self._compute(pieces))
        except RuntimeError as error:  # memory, mostly; which stream it was cannot be told
            for piece in pieces:
                self._fail(piece.stream, ModelError(f"the step could not be computed: {str(error)[:200]}"))
            return []
        deltas = []
        for piece in pieces:
            self._scheduler.computed(piece)
        for piece in pieces:
            try:
                last = piece.last
                deltas.append(self._next(piece.stream, next(logits)) if last else Delta(piece.stream.prompt.id, ()))
            except LLMOError as error:
                self._fail(piece.stream, error)
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
        }

    def _next(self, stream: Stream, logits: NDArray[np.float32]) -> Delta:
        """Choose the token that follows, and end the stream where it ends."""
        sampling, constraint = stream.prompt.sampling, stream.constraint
        if len(stream.ids) == stream.asked:
            self._hits += stream.cached
        token = stream.sampler.choose(logits, None if constraint is None else constraint.mask())
        finish: Finish | None = None
        tokens: list[int] = []
        ended = token in self._ends and (constraint is not None or not sampling.ignore_end)
        if ended or token in sampling.stop_ids:
            finish = "stop"
        else:
            tokens = [token]
            stream.ids.append(token)
            if constraint is not None:
                constraint.accept(token)
                finish = "stop" if constraint.complete else None
            full = len(stream.ids) - stream.asked >= sampling.max_tokens or len(stream.ids) >= self.context
            if finish is None and full:
                finish = "length"
        logprobs: list[TokenLogprob] = []
        if tokens and sampling.logprobs is not None:
            logprobs = [token_logprob(logits, token, sampling.logprobs)]
        if finish is not None:
            self._streams.pop(stream.prompt.id)
            self._scheduler.remove(stream)
        return Delta(stream.prompt.id, tokens, logprobs, finish, stream.cached)

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._streams.pop(stream.prompt.id)
        self._scheduler.remove(stream)
        self._failed.append((stream.prompt.id, error))

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


def check_options(options: GenerationOptions) -> None:
    if options.streams < 1 or options.chunk < 1:
        raise InputError("streams and chunk must be at least 1")


def _order(piece: Piece) -> int:
    """Prompts first, then answers that are computed again, then single tokens."""
    return 0 if piece.of_prompt else 1 if piece.count > 1 else 2
