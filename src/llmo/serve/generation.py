"""A replica that generates, without its socket: one thread makes prompts, one steps the engine, one writes answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, Protocol

from tokenizers import Tokenizer

from llmo.engines.generation import Delta, GenerationEngine, Prompt
from llmo.errors import InputError, LLMOError, ModelError
from llmo.serve.answer import AnswerText, TokenPieces
from llmo.serve.ask import Ask, Input, Message
from llmo.serve.calls import Call, Part, Stream, Usage
from llmo.serve.lifecycle import Lifecycle
from llmo.serve.loaded import LoadedAdapters
from llmo.serve.paces import Paces
from llmo.serve.waiting import PromptQueue

_BYTES_A_TOKEN = 4  # an estimate, until the prompt is made
_STATS_SECONDS = 0.1
_SEEDS = 1 << 63

_log = logging.getLogger("llmo.serve")


class Speaks(Protocol):
    """What a replica needs of the task `generation`."""

    def prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation as the model's template writes it; raises InputError."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step of the engine gave, for the thread that writes."""

    deltas: Sequence[tuple[Stream, Delta]]
    failed: Sequence[tuple[Stream, Exception]] = ()


class GenerationPipeline(Lifecycle[Call, _Step]):
    """Bounded, fair between tenants, and fair to each call: what is wrong with one fails that one only.

    `queue` bounds what waits (see PromptQueue), `streams` what the engine works on; `takes_tools` says whether the
    model's template prints tools. `submit`, `cancel`, `expire`, `load_adapter` and `stats` may be called from any
    thread.
    """

    def __init__(
        self,
        task: Speaks,
        tokenizer: Tokenizer,
        engine: GenerationEngine,
        load: Callable[[], None],
        *,
        streams: int = 16,
        queue: int = 1024,
        takes_tools: bool = True,
    ) -> None:
        super().__init__(load, engine, LoadedAdapters(engine), {"prompts": self._make_prompts, "answers": self._write})
        self._task = task
        self._tokenizer = tokenizer
        self._engine = engine
        self._most = streams
        self._takes_tools = takes_tools
        self.paces = Paces()
        self.context = 0  # once started
        self._pieces = TokenPieces(tokenizer)
        self._longest = self._pieces.longest()
        self._queue = PromptQueue(queue, self.paces.seconds_for)
        self._running: dict[int, Stream] = {}  # what the engine has; its thread alone changes it
        self._cancelled: list[Stream] = []
        self._ids = count(1)
        self._engine_stats: Mapping[str, Any] = {}
        self._stats_at = 0.0

    def submit(self, call: Call) -> None:
        """Accept a call, or raise: InputError for a prompt that is longer than any context or for more choices than
        the queue holds, BusyError when the queue is full, UnreachableError when this replica is leaving."""
        ask = call.ask
        tokens = sum(self._estimate(one) for one in ask.inputs) * ask.n
        if ask.choices > self._queue.places:
            raise InputError(
                f"{ask.choices} answers in one request; this endpoint's queue holds {self._queue.places}",
                where="n",
                hint="ask for fewer at once, or deploy with a larger `queue`",
            )
        with self._changed:
            self._check_accepting()
            call.left = ask.choices
            call.arrived = time.monotonic()
            self._queue.add(call, tokens)
            self._calls.add(call)
            self._changed.notify_all()

    def _late(self, call: Call, now: float) -> bool:
        """One that has begun is in time, unless it is strict."""
        return super()._late(call, now) and (call.strict or not call.begun)

    def stats(self) -> dict[str, Any]:
        """Numbers for metrics: places taken in the queue, streams, the engine's own numbers and the paces."""
        with self._changed:
            now = {
                "queue": len(self._queue),
                "queue_limit": self._queue.places,
                "queue_tokens": self._queue.tokens,
                "in_flight": len(self._calls),
                "streams": len(self._running),
                "streams_limit": self._most,
            }
            engine = {f"engine_{name}": value for name, value in self._engine_stats.items()}
        return now | engine | self.paces.snapshot()

    def _estimate(self, one: Input) -> int:
        """Tokens this will be, roughly. Raises InputError when it is more than any context, however it is cut."""
        size = one.size()
        least = size if one.ids is not None else size // self._longest
        if least >= self.context:
            raise too_long(least, self.context, one, at_least=one.ids is None)
        return max(1, size if one.ids is not None else size // _BYTES_A_TOKEN)

    # The thread that makes prompts: a template may take long, so nothing else waits for it.

    def _make_prompts(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._queue.unmade)
                if self._stopping:
                    return
                call = self._queue.take_call()
            if not self._at_hand(call, partial(self._ask_again, call)):
                continue
            try:
                prompts = [self._ids_of(one, call.ask) for one in call.ask.inputs]
            except LLMOError as error:
                self._end(call, error)
                continue
            except Exception as error:  # a task is a plugin: what it raises fails this call and no other
                _log.exception("a prompt could not be made")
                self._end(call, InputError(f"the prompt cannot be made: {error}", hint="check it for unusual text"))
                continue
            streams = [self._stream(call, choice, prompts[choice // call.ask.n]) for choice in range(call.ask.choices)]
            with self._changed:
                call.prompts = prompts
                if not call.over:
                    self._queue.stand(call, streams)
                    self._changed.notify_all()

    def _ask_again(self, call: Call) -> None:
        with self._changed:
            if not call.over:
                self._queue.wait_again(call)
                self._changed.notify_all()

    def _ids_of(self, one: Input, ask: Ask) -> list[int]:
        if one.ids is not None:
            ids = list(one.ids)
            wrong = next((i for i in ids if not 0 <= i < self._engine.vocabulary), None)
            if wrong is not None:
                raise InputError(f"{wrong} is no token of this model", where="prompt")
        elif one.text is not None:
            ids = list(self._tokenizer.encode(one.text).ids)
        else:
            ids = self._task.prompt(self._tokenizer, one.messages or [], self._tools(one, ask))
        if not ids:
            raise InputError("the prompt is empty", hint="send some words")
        if len(ids) >= self.context:
            raise too_long(len(ids), self.context, one)
        return ids

    def _tools(self, one: Input, ask: Ask) -> Sequence[Mapping[str, Any]] | None:
        """The tools as the template takes them. A grammar that forces a call does without a template that does."""
        if not one.tools or self._takes_tools:
            return one.tools
        if ask.sampling.grammar is None:
            raise InputError(
                "the model's chat template takes no tools, so it would not hear of them",
                where="tools",
                hint='force a call with "tool_choice": "required", or take a model that was trained with tools',
            )
        return None

    def _stream(self, call: Call, choice: int, ids: Sequence[int]) -> Stream:
        pieces = self._pieces if call.ask.sampling.logprobs is not None else None
        return Stream(next(self._ids), call, choice, ids, AnswerText(self._tokenizer, call.ask.stop, pieces))

    # The thread that owns the engine: it does nothing else, so that the engine rarely waits.

    def _loaded_engine(self) -> None:
        self.context = self._queue.least_tokens = self._engine.context

    def _use_engine(self) -> None:
        while self._wait_for_work():
            self._admit()
            if self._running:
                self._step()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do, and forget what was cancelled; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._running or self._queue.ready or self._cancelled)
            cancelled, self._cancelled = self._cancelled, []
            stopping = self._stopping
        for stream in cancelled:
            if self._running.pop(stream.id, None) is not None:
                self._engine.cancel(stream.id)
        if cancelled:
            self._look_at_engine(0.0)
        return not stopping

    def _admit(self) -> None:
        """Hand prompts over while streams are free and the engine has memory for them: what is in the engine has
        left the line, so only what can run soon may go, or turns would mean nothing."""
        if not self._queue.ready or len(self._running) >= self._most:
            return
        numbers = self._engine.stats()
        free = numbers["free_tokens"]
        if self._running and numbers["waiting"]:
            return
        while len(self._running) < self._most:
            with self._changed:
                first = self._queue.peek()
                if first is None or (self._running and len(first.ids) > free):
                    return
                stream = self._queue.take()
                self._running[stream.id] = stream
            free -= len(stream.ids)
            try:
                self._engine.add(self._prompt(stream))
            except Exception as error:  # an engine is a plugin, and its library raises what it likes
                del self._running[stream.id]
                self._work.put(_Step((), [(stream, error)]))

    def _prompt(self, stream: Stream) -> Prompt:
        ask: Ask = stream.call.ask
        room = self.context - len(stream.ids)
        seed = None if ask.sampling.seed is None else (ask.sampling.seed + stream.choice % ask.n) % _SEEDS
        most = room if ask.max_tokens is None else min(room, ask.max_tokens)
        sampling = replace(ask.sampling, max_tokens=most, seed=seed)
        return Prompt(stream.id, stream.ids, sampling, tenant=stream.call.tenant, adapter=stream.call.adapter)

    def _step(self) -> None:
        began = time.monotonic()
        try:
            deltas = self._engine.step()
            failed = self._engine.failed()
            self._ran(True, "at every step")
        except Exception as error:  # of the engine as a whole: every stream in it is lost, those that wait are not
            _log.exception("a step of the engine failed")
            failed, deltas = [(id, error) for id in self._running], []
            self._forget_all()
        known = [(self._running[d.id], d) for d in deltas if d.id in self._running]
        lost = [(self._running[id], error) for id, error in failed if id in self._running]
        finished = [stream.id for stream, delta in known if delta.finish is not None]
        for id in (*finished, *(stream.id for stream, _ in lost)):
            self._running.pop(id, None)
        self.paces.stepped(sum(len(d.tokens) for _, d in known), len(finished), time.monotonic() - began)
        self._look_at_engine(_STATS_SECONDS if self._running else 0.0)
        if known or lost:
            self._work.put(_Step(known, lost))

    def _forget_all(self) -> None:
        self._ran(False, "at every step")
        try:
            for id in self._running:
                self._engine.cancel(id)
        except Exception as error:  # it may be beyond that as well; the next steps will tell
            _log.warning("the engine could not forget its streams: %s", error)

    def _look_at_engine(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._stats_at >= seconds:
            self._engine_stats, self._stats_at = dict(self._engine.stats()), now

    # The thread that writes answers.

    def _write(self) -> None:
        while (step := self._work.get()) is not None:
            parts: dict[Call, list[Part]] = {}
            for stream, delta in step.deltas:
                if stream.over or stream.call.over:
                    continue
                try:
                    part = self._part(stream, delta)
                except Exception as error:  # the Rust library raises what it likes; only the answer at fault suffers
                    self._end(stream.call, _explained(error))
                    continue
                if part is not None:
                    parts.setdefault(stream.call, []).append(part)
            for call, found in parts.items():
                if not call.over:
                    call.hear(found)
                if call.left == 0:
                    self._end(call, call.usage())
            for stream, failure in step.failed:
                self._end(stream.call, _explained(failure))

    def _part(self, stream: Stream, delta: Delta) -> Part | None:
        """What the call hears of a delta; None when there is nothing to say yet."""
        call, answer = stream.call, stream.text
        if not stream.begun and (delta.tokens or delta.finish is not None):  # else its prompt is still being computed
            self._begin(stream, delta)
        text = answer.add(delta.tokens, delta.logprobs)
        if delta.finish is not None:
            text += answer.end()
        finish = "stop" if answer.stopped else delta.finish
        if finish is not None:
            self._finish(stream, runs_on=delta.finish is None)
        if not call.ask.stream:
            stream.held.append(text)
            if finish is None:
                return None
            text = "".join(stream.held)
        elif not text and finish is None and not answer.logprobs:
            return None
        logprobs, answer.logprobs = answer.logprobs, []
        return Part(
            stream.choice,
            text,
            finish,
            logprobs if call.ask.sampling.logprobs is not None else None,
            answer.tokens if call.ask.token_ids and finish is not None else None,
        )

    def _begin(self, stream: Stream, delta: Delta) -> None:
        call = stream.call
        stream.begun = call.begun = True
        self.paces.began(len(stream.ids), delta.cached, time.monotonic() - call.arrived)
        if stream.choice % call.ask.n == 0:
            call.cached += delta.cached

    def _finish(self, stream: Stream, *, runs_on: bool) -> None:
        """A choice is complete; one that a stop string ended still runs, so the engine is told to forget it."""
        stream.over = True
        stream.call.left -= 1
        stream.call.completion += len(stream.text.tokens)
        if runs_on:
            with self._changed:
                self._cancelled.append(stream)
                self._changed.notify_all()

    def _end(self, call: Call, outcome: Usage | LLMOError | None) -> None:
        """Close a call once: free its places and its streams, then tell the one who asked."""
        with self._changed:
            if call.over:
                return
            call.over = True
            self._calls.discard(call)
            self._cancelled += [stream for stream in self._queue.drop(call) if not stream.over]
            self._changed.notify_all()
        self.paces.ended("cancelled" if outcome is None else "answered" if isinstance(outcome, Usage) else "failed")
        if outcome is not None:
            call.hear(outcome)


def too_long(tokens: int, context: int, one: Input, *, at_least: bool = False) -> InputError:
    """The refusal of a prompt that leaves no room for an answer."""
    return InputError(
        f"this model's maximum context length is {context} tokens, and the prompt alone has "
        f"{'at least ' if at_least else ''}{tokens}",
        where="prompt" if one.messages is None else "messages",
        hint="shorten it, or drop the oldest messages",
        code="context_length_exceeded",
    )


def _explained(error: Exception) -> LLMOError:
    if isinstance(error, LLMOError):
        return error
    _log.error("an answer failed", exc_info=error)
    return ModelError(f"the model could not go on with this answer: {error}", hint="see the log of the replica")
