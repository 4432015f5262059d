"""A replica without its socket: one thread tokenises and answers, one runs the engine, and they overlap."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty
from typing import Any, cast

from tokenizers import Tokenizer

from llmo.engines.base import Embedder, Engine, Request
from llmo.engines.batcher import Batcher, Item
from llmo.errors import (
    BusyError,
    InputError,
    LLMOError,
    ModelError,
    TooLargeError,
)
from llmo.serve import embedding
from llmo.serve.embedding import Input
from llmo.serve.gauge import Gauge
from llmo.serve.lifecycle import Lifecycle, too_late
from llmo.serve.loaded import LoadedAdapters
from llmo.serve.repeats import Repeats
from llmo.tasks.base import Encoding, Logits, Task, gathered, sequences
from llmo.tasks.card import load_task
from llmo.types import MAX_BATCH_TOKENS, Asked

LONGEST_TEXT = 1 << 20  # bytes of UTF-8
_CHUNK = 32  # texts tokenised at once: enough for the tokeniser, few enough that the engine starts early
_SHORTEST_WAIT = 0.05  # seconds a refused client is told to stay away at least

Done = Callable[[bytes | LLMOError], None]
_log = logging.getLogger("llmo.serve")


@dataclass(eq=False, slots=True)
class Call:
    """One predict call. `done` hears once: the JSON list of answers, or the error; in the thread that knows it.

    `deadline` is in unix seconds. What `tenant` asked before is not computed again. A call whose answer nobody wants
    any more is `over`. With `embed` the answers are embeddings, and a text may be token ids as well. `adapter` is the
    folder of the model on the same trunk that answers instead. A `test` is the replica's own, for which the queue is
    never full.
    """

    texts: Sequence[Input]
    deadline: float
    done: Done
    logits: bool = False
    embed: bool = False
    adapter: str | None = None
    test: bool = False
    tenant: str = ""
    over: bool = False
    arrived: float = 0.0
    left: int = 0
    items: list[Item | None] = field(default_factory=list)  # None: not encoded yet
    answers: list[bytes] = field(default_factory=list)

    def where(self, index: int) -> str:
        """What a text is called in the request."""
        return f"{'input' if self.embed else 'texts'}[{index}]"

    def meaning(self, index: int) -> tuple[Hashable, ...]:
        """What the answer to a text depends on, and who asks."""
        text = self.texts[index]
        asked: Hashable = text
        if isinstance(text, Mapping):
            asked = tuple(sorted(text.items()))
        elif not isinstance(text, str):
            asked = tuple(text)
        return self.tenant, self.adapter, self.embed, self.logits, asked


@dataclass(frozen=True, slots=True)
class _Text:
    """What an Item carries: which text of which call, and how it was encoded."""

    call: Call
    index: int
    encoding: Encoding
    task: Task


@dataclass(frozen=True, slots=True)
class _Ran:
    """A batch the engine has run; `logits` are in the order of `items`, and an error stands where there are none."""

    items: Sequence[Item]
    logits: Sequence[Logits | LLMOError]


class Pipeline(Lifecycle[Call, tuple[Call, int] | _Ran]):
    """Bounded, and fair to each call: what is wrong with one fails that one only.

    `queue` bounds the texts that wait (encoded or not); a text that runs does not wait. `repeats` bytes keep answers to
    texts that may be asked again. `submit`, `cancel`,
    `expire` and `stats` may be called from any thread.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        engine: Engine,
        load: Callable[[], None],
        *,
        queue: int = 1024,
        repeats: int = 0,
        batcher: Batcher | None = None,
        check_adapter: Callable[[Path], None] = lambda _: None,
    ) -> None:
        adapters = LoadedAdapters(engine, "llmo.engines", check=check_adapter)
        super().__init__(load, engine, adapters, {"texts": self._encode_and_answer})
        self._task = task
        self._tokenizer = tokenizer
        self._engine = engine
        self.queue = queue
        self.gauge = Gauge()
        self._repeats = Repeats(repeats)
        self._batcher = batcher or Batcher(MAX_BATCH_TOKENS)
        self._waiting = 0

    def submit(self, call: Call) -> None:
        """Accept a call, or raise: InputError or TooLargeError for its texts, BusyError when the queue is full,
        UnreachableError when this replica is leaving."""
        self._check(call)
        count = len(call.texts)
        if count > self.queue:
            raise TooLargeError(
                f"{count} texts in one request; this endpoint's queue holds {self.queue}",
                hint="send fewer at once, or deploy with a larger `queue`",
            )
        call.items = [None] * count
        call.answers = [b""] * count
        left = [i for i in range(count) if not self._repeated(call, i)]
        with self._changed:
            self._check_accepting()
            if self._waiting + len(left) > self.queue and not call.test:
                wanted = max(self._waiting + len(left) - self.queue, self._waiting // 2)
                wait = max(_SHORTEST_WAIT, self.gauge.seconds_for(wanted))
                raise BusyError(
                    f"the queue is full ({self._waiting} texts wait)",
                    hint=f"send it again in {wait:.1f} s",
                    retry_after=round(wait, 3),
                )
            self._waiting += len(left)
            self._calls.add(call)
        call.arrived = time.monotonic()
        call.left = len(left)
        if not left:
            self._end(call, _listed(call.answers))
        for start in dict.fromkeys(i // _CHUNK * _CHUNK for i in left):
            self._work.put((call, start))

    @property
    def max_batch_tokens(self) -> int:
        """What one run of the engine holds at most; to be set while nothing waits."""
        return self._batcher.max_batch_tokens

    @max_batch_tokens.setter
    def max_batch_tokens(self, tokens: int) -> None:
        self._batcher.max_batch_tokens = tokens

    def _repeated(self, call: Call, index: int) -> bool:
        """Answer a text that was asked before, if it is known."""
        if not self._repeats or call.test:
            return False
        answer = self._repeats.get(call.meaning(index))
        if answer is None:
            return False
        call.answers[index], call.items[index] = answer, Item(0)  # one that does not wait
        return True

    def _check(self, call: Call) -> None:
        if call.embed and "embed" not in self._engine.abilities:
            raise InputError(
                f"the engine {self._engine.name} gives no embeddings",
                where="model",
                hint="deploy the model on the engine torch or onnx",
                code="unsupported_model",
            )
        for index, text in enumerate(call.texts):
            if call.embed and not isinstance(text, str | Mapping):
                embedding.check_ids(text, call.where(index), self._tokenizer.get_vocab_size())
            elif isinstance(text, Mapping):
                for name, part in text.items():
                    check_text(part, f"{call.where(index)}.{name}")
            else:
                check_text(text, call.where(index))

    def stats(self) -> dict[str, Any]:
        """Numbers for metrics: texts waiting, calls in flight, and the gauge's counters."""
        with self._changed:
            now = {"queue": self._waiting, "queue_limit": self.queue, "in_flight": len(self._calls)}
        return now | self.gauge.snapshot() | self._repeats.snapshot()

    # The thread that tokenises and answers. Both release the GIL little or shortly, so the engine's thread is
    # rarely held up; what is done is sent before more is taken in.

    def _encode_and_answer(self) -> None:
        while True:
            work = [self._work.get()]
            try:
                while len(work) < _CHUNK:
                    work.append(self._work.get_nowait())
            except Empty:
                pass
            for ran in work:
                if isinstance(ran, _Ran):
                    self._answer(ran)
            fresh: list[tuple[Call, int]] = []
            for item in work:
                if isinstance(item, tuple) and self._at_hand(item[0], partial(self._work.put, item)):
                    call, start = item
                    fresh += [
                        (call, i) for i in range(start, min(start + _CHUNK, len(call.texts))) if not call.answers[i]
                    ]
            for start in range(0, len(fresh), _CHUNK):
                self._encode([(call, i) for call, i in fresh[start : start + _CHUNK] if not call.over])
            if None in work:
                return

    def _encode(self, places: Sequence[tuple[Call, int]]) -> None:
        """Let the texts stand in line, each as the model that answers it sees it."""
        ready: list[Item] = []
        for adapter, embed in dict.fromkeys((call.adapter, call.embed) for call, _ in places):
            wanted = [(call, i) for call, i in places if (call.adapter, call.embed) == (adapter, embed)]
            try:
                task = self._task if adapter is None else _further_task(adapter)
            except LLMOError as error:
                for call, _ in wanted:
                    self._end(call, error)
                continue
            encode = partial(embedding.encode, task) if embed else task.encode
            texts = [call.texts[i] for call, i in wanted]
            for (call, i), found in zip(wanted, self._encodings(encode, texts), strict=True):
                encoding = embedding.whole(found, task.max_length) if embed else found
                if isinstance(encoding, LLMOError):
                    encoding.where = call.where(i)
                    self._end(call, encoding)
                else:
                    ready.append(Item(len(encoding.input_ids), call.deadline, _Text(call, i, encoding, task)))
        with self._changed:
            for item in ready:
                text: _Text = item.payload
                if not text.call.over:
                    text.call.items[text.index] = item
                    self._batcher.add(item)
            self._changed.notify_all()

    def _encodings(self, encode: Callable[..., list[Encoding]], texts: Sequence[Input]) -> list[Encoding | LLMOError]:
        try:
            return [*encode(self._tokenizer, texts)]
        except Exception as error:  # the Rust library raises what it likes; only the text at fault may suffer
            if len(texts) > 1:
                return [encoding for text in texts for encoding in self._encodings(encode, [text])]
            if isinstance(error, LLMOError):
                return [error]
            _log.warning("a text could not be tokenised: %s", error)
            return [InputError("the text cannot be tokenised", hint="check it for unusual characters")]

    def _answer(self, ran: _Ran) -> None:
        for item, logits in zip(ran.items, ran.logits, strict=True):
            text: _Text = item.payload
            call = text.call
            if call.over:
                continue
            if isinstance(logits, LLMOError):
                self._end(call, logits)
                continue
            try:
                call.answers[text.index] = self._answer_one(text, logits)
            except Exception as error:  # a task is a plugin: what it raises fails this call and no other
                _log.exception("the task could not answer")
                self._end(call, error if isinstance(error, LLMOError) else ModelError(f"no answer: {error}"))
                continue
            if self._repeats and not call.test:
                self._repeats.put(call.meaning(text.index), call.answers[text.index])
            call.left -= 1
            if call.left == 0:
                self._end(call, _listed(call.answers))

    def _answer_one(self, text: _Text, logits: Logits) -> bytes:
        if text.call.embed:
            return embedding.answer(logits, text.encoding)
        answer = text.task.answer(logits, text.encoding, cast(Asked, text.call.texts[text.index]))
        answer["tokens"] = text.encoding.length
        if text.call.logits:
            answer |= {"logits": logits.tolist(), "input_ids": list(text.encoding.input_ids)}
        try:
            return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except ValueError:
            raise ModelError(
                "the model's answer is not a finite number", hint="its weights are damaged: run `llmo verify` on it"
            ) from None

    # The thread that owns the engine: it does nothing else, so that the engine rarely waits.

    def _use_engine(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._batcher))
                if self._stopping:
                    return
                batch, expired = self._batcher.take(time.time())
                self._waiting -= len(batch) + len(expired)
            for item in expired:
                self._end(item.payload.call, too_late())
            for alike in _alike(batch):
                began = time.monotonic()
                ran = _Ran(alike, self._run(alike))
                pads = getattr(self._engine, "pads", True)
                self.gauge.ran([i.tokens for i in alike], time.monotonic() - began, pads=pads)
                self._ran(any(not isinstance(logits, LLMOError) for logits in ran.logits), "on every text")
                self._work.put(ran)

    def _run(self, items: Sequence[Item]) -> Sequence[Logits | LLMOError]:
        texts: list[_Text] = [item.payload for item in items]
        encodings = [text.encoding for text in texts]
        adapters = [text.call.adapter for text in texts for _ in text.encoding.apart()]
        requests = [Request(n, ids, adapters[n]) for n, ids in enumerate(sequences(encodings))]
        run = cast(Embedder, self._engine).embed if texts[0].call.embed else self._engine.run
        try:
            found = {chunk.id: chunk.data for part in self._portions(requests) for chunk in run(part)}
        except Exception as error:  # an engine is a plugin, and its library raises what it likes
            if len(items) > 1:
                return [self._run([item])[0] for item in items]
            _log.warning("a text could not be run: %s", error)
            if isinstance(error, LLMOError):
                return [error]
            return [ModelError(f"the model could not run this text: {error}", hint="see the log of the replica")]
        return [*gathered([found[n] for n in range(len(requests))], encodings)]

    def _portions(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """What the engine runs at once: all of a batch, but of a text of many sequences a batch's worth at a time."""
        start = longest = 0
        for n, request in enumerate(requests):
            longest = max(longest, len(request.input_ids))
            if n > start and (n + 1 - start) * longest > self._batcher.max_batch_tokens:
                yield requests[start:n]
                start, longest = n, len(request.input_ids)
        yield requests[start:]

    def _end(self, call: Call, outcome: bytes | LLMOError | None) -> None:
        """Close a call once: free the places its texts still hold, then tell the one who asked."""
        with self._changed:
            if call.over:
                return
            call.over = True
            self._calls.discard(call)
            for item in call.items:
                if item is None or item.waiting:
                    self._waiting -= 1
                if item is not None:
                    self._batcher.cancel(item)
            if not self._calls or call.adapter is not None:
                self._changed.notify_all()
        self.gauge.ended(time.monotonic() - call.arrived, isinstance(outcome, bytes))
        if outcome is not None:
            call.done(outcome)


def _listed(answers: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(answers) + b"]"


def _alike(batch: Sequence[Item]) -> list[list[Item]]:
    """Logits and embeddings are different outputs of the engine: a batch of both is run as two."""
    kinds = [[item for item in batch if item.payload.call.embed is embed] for embed in (False, True)]
    return [items for items in kinds if items]


@lru_cache(1024)
def _further_task(folder: str) -> Task:
    return load_task(Path(folder))


def check_text(text: object, where: str) -> None:
    """Raise InputError or TooLargeError for a text no model can read."""
    if not isinstance(text, str):
        raise InputError(f"a text is a string, not {type(text).__name__}", where=where)
    if not text or text.isspace():
        raise InputError("the text is empty", where=where, hint="leave it out, or send some words")
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds half of a surrogate pair at character {error.start}",
            where=where,
            hint="it was cut in the middle of an emoji or similar: send the whole character",
        ) from None
    if size > LONGEST_TEXT:
        raise TooLargeError(
            f"a text of {size} bytes is over the limit of {LONGEST_TEXT}", where=where, hint="send a part of it"
        )
