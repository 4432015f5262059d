"""The replica's end of one connection: what a gateway asks, and what it is told, over one unix socket."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from llmo.engines.generation import Sampling
from llmo.errors import InputError, LLMOError, ModelError
from llmo.serve import calls
from llmo.serve.ask import Ask, Input
from llmo.serve.pipeline import Call, check_text
from llmo.serve.protocol import VERSION, Frames, answers_frame, error_frame, frame, mark_used

_log = logging.getLogger("llmo.serve")
UNSENT_EVENTS = 20_000  # a gateway that reads nothing for so long is stuck, and is cut off
_UNREAD_BYTES = 1 << 20
_MARK_SECONDS = 0.05
_PREDICTED_TOKENS = 256  # of an answer to `predict`, which says nothing of a length


class Served(Protocol):
    """What a connection and the loop around it need of a pipeline, whatever its calls are."""

    broken: LLMOError | None

    def submit(self, call: Any) -> None: ...

    def cancel(self, call: Any) -> None: ...

    def expire(self, now: float) -> None: ...

    def drain(self, timeout: float) -> bool: ...

    def load_adapter(self, folder: str) -> None: ...

    def stats(self) -> dict[str, Any]: ...


class Session(Frames, ABC):
    """What every connection does, whatever the model: says hello, hears cancels, tells the numbers.

    A gateway that goes takes its calls with it.
    """

    def __init__(self, pipeline: Served, deadline_seconds: float, sessions: set[Session]) -> None:
        super().__init__()
        self._pipeline = pipeline
        self._deadline_seconds = deadline_seconds
        self._sessions = sessions
        self._calls: dict[int, Any] = {}
        self._loop = asyncio.get_running_loop()
        self._heard: deque[tuple[int, Any]] = deque()
        self._due = False
        self._marked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._sessions.add(self)
        self._path: str = transport.get_extra_info("sockname")
        self.transport.write(frame({"hello": VERSION, "deadline_seconds": self._deadline_seconds}))

    def connection_lost(self, exc: Exception | None) -> None:
        self._sessions.discard(self)
        for call in self._calls.values():
            self._pipeline.cancel(call)
        self._calls.clear()

    def received(self, data: bytes) -> None:
        body = json.loads(data)
        number = body["id"]
        match body["op"]:
            case "predict" | "generate" | "embed":
                self.mark()
                try:
                    call = self.call(body["op"], number, body)
                    self._calls[number] = call
                    self._pipeline.submit(call)
                except LLMOError as error:
                    self.answer(number, error_frame(number, error))
                except Exception:  # the border: one call, whatever is in it, must not end those of others
                    _log.exception("a call could not be taken")
                    self.answer(
                        number,
                        error_frame(number, LLMOError("the replica cannot take this request", hint="its log says why")),
                    )
            case "cancel":
                call = self.forget(number)
                if call is not None:
                    self._pipeline.cancel(call)
            case "stats":
                self.transport.write(frame({"id": number, "stats": self._pipeline.stats()}))
            case "adapter":
                self.load_adapter(number, body["folder"])
            case other:
                self.transport.write(error_frame(number, InputError(f"a replica does not know '{other}'")))

    @abstractmethod
    def call(self, op: str, number: int, body: Mapping[str, Any]) -> Any:
        """The pipeline's call for a frame. Raises LLMOError for one that this model cannot answer."""

    def load_adapter(self, number: int, folder: str) -> None:
        loading = self._loop.run_in_executor(None, self._pipeline.load_adapter, folder)

        def tell(done: asyncio.Future[None]) -> None:
            if done.cancelled() or self.transport.is_closing():
                return
            error = done.exception()
            if error is None:
                self.transport.write(frame({"id": number, "loaded": folder}))
                return
            known = error if isinstance(error, LLMOError) else ModelError(f"the adapter cannot be loaded: {error}")
            self.transport.write(error_frame(number, known))

        loading.add_done_callback(tell)

    def answer(self, number: int, data: bytes) -> None:
        """The last frame of a call; nothing is sent for one that was cancelled."""
        self.forget(number)
        self.mark()
        if not self.transport.is_closing():
            self.transport.write(data)

    def mark(self) -> None:
        """Say that calls come and go, some twenty times a second at most."""
        now = time.monotonic()
        if now - self._marked > _MARK_SECONDS:
            self._marked = now
            mark_used(self._path)

    def hear(self, number: int, what: Any) -> None:
        """From any thread: what the pipeline says to a call. It is gathered, and told once a turn of the loop."""
        self._heard.append((number, what))
        if not self._due:
            self._due = True
            self._loop.call_soon_threadsafe(self.tell)

    @abstractmethod
    def tell(self) -> None:
        """Write what was heard."""

    def forget(self, number: int) -> Any:
        """The call of this number, of which nothing is kept any more; None when there is none."""
        return self._calls.pop(number, None)

    def deadline(self, body: Mapping[str, Any]) -> float:
        return float(body.get("deadline") or time.time() + self._deadline_seconds)


class EncoderSession(Session):
    """Answers `predict` and `embed`: each call with one frame."""

    def call(self, op: str, number: int, body: Mapping[str, Any]) -> Call:
        if op == "generate":
            raise InputError(
                "this endpoint's model does not generate text", where="model", hint="POST /v1/endpoints/NAME/predict"
            )

        return Call(
            body["texts"],
            self.deadline(body),
            partial(self.hear, number),
            logits=body.get("logits", False),
            embed=op == "embed",
            adapter=body.get("adapter"),
            tenant=body.get("tenant", ""),
        )

    def tell(self) -> None:
        self._due = False
        frames = []
        while self._heard:
            number, outcome = self._heard.popleft()
            if self.forget(number) is not None:
                frames.append(_outcome_frame(number, outcome))
        if frames and not self.transport.is_closing():
            self.transport.write(b"".join(frames))
            self.mark()


def _outcome_frame(number: int, outcome: bytes | LLMOError) -> bytes:
    try:
        return error_frame(number, outcome) if isinstance(outcome, LLMOError) else answers_frame(number, outcome)
    except LLMOError as error:
        return error_frame(number, error)


class GenerationSession(Session):
    """Answers `generate` with `delta` frames and a `done`, and `predict` with whole answers in one frame.

    While the gateway does not read, what was heard waits here, bounded by what the calls in flight can say and by
    UNSENT_EVENTS.
    """

    def __init__(self, pipeline: Served, deadline_seconds: float, sessions: set[Session]) -> None:
        super().__init__(pipeline, deadline_seconds, sessions)
        self._paused = False
        self._whole: dict[int, list[calls.Part]] = {}  # of calls to `predict`

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=_UNREAD_BYTES)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.tell()

    def call(self, op: str, number: int, body: Mapping[str, Any]) -> calls.Call:
        if op == "embed":
            raise InputError(
                "this endpoint's model generates text and gives no embeddings",
                where="model",
                hint="name an endpoint over an encoder",
                code="unsupported_model",
            )

        ask = _predicting(body) if op == "predict" else Ask.from_json(body["ask"])
        if op == "predict":
            self._whole[number] = []
        return calls.Call(
            ask,
            partial(self.hear, number),
            self.deadline(body),
            strict=body.get("deadline") is not None,
            tenant=body.get("tenant", ""),
            adapter=body.get("adapter"),
        )

    def forget(self, number: int) -> Any:
        self._whole.pop(number, None)
        return super().forget(number)

    def tell(self) -> None:
        self._due = False
        if self._paused and len(self._heard) > UNSENT_EVENTS:
            self.transport.abort()
        while self._heard and not self._paused:
            number, what = self._heard.popleft()
            if number not in self._calls or self.transport.is_closing():
                continue
            try:
                self._say(number, what)
            except LLMOError as error:
                self._pipeline.cancel(self._calls[number])
                self.answer(number, error_frame(number, error))

    def _say(self, number: int, what: calls.Heard) -> None:
        whole = self._whole.get(number)
        if isinstance(what, LLMOError):
            self.answer(number, error_frame(number, what))
        elif isinstance(what, calls.Usage):
            call: calls.Call = self._calls[number]
            data = frame({"id": number, "done": what.to_json()})
            self.answer(number, data if whole is None else answers_frame(number, _answers(call, whole)))
        elif whole is None:
            self.transport.write(frame({"id": number, "delta": [part.to_json() for part in what]}))
        else:
            whole += what


def _predicting(body: Mapping[str, Any]) -> Ask:
    """`predict` on a model that generates: each text is a user's message, answered greedily."""
    for index, text in enumerate(body["texts"]):
        check_text(text, f"texts[{index}]")
    evidence = bool(body.get("logits"))
    return Ask(
        inputs=[Input(messages=[{"role": "user", "content": text}]) for text in body["texts"]],
        sampling=Sampling(temperature=0.0, logprobs=0 if evidence else None),
        max_tokens=_PREDICTED_TOKENS,
        token_ids=True,
    )


def _answers(call: calls.Call, parts: list[calls.Part]) -> bytes:
    """One object a text: `text`, `finish_reason` and token counts; with `logits`, the tokens and their
    log-probabilities as well."""
    found = []
    for part in sorted(parts, key=lambda part: part.choice):
        prompt, written = list(call.prompts[part.choice]), list(part.token_ids or ())
        one: dict[str, Any] = {
            "text": part.text,
            "finish_reason": part.finish,
            "tokens": len(prompt),
            "completion_tokens": len(written),
        }
        if part.logprobs is not None:
            one |= {"input_ids": prompt, "output_ids": written, "logprobs": [p["logprob"] for p in part.logprobs]}
        found.append(one)
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
