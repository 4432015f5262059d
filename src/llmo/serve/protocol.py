"""What a gateway and a replica say to each other over a unix socket: frames of a 4-byte length and JSON.

On connection the replica says hello: `{"hello": 1, "deadline_seconds": s}`. Then, multiplexed by `id`:
`{"id", "op": "predict", "texts" (strings or objects of texts by name), "deadline" (unix seconds or null), "logits",
"tenant"}` is answered
`{"id", "answers": [...]}`, and so is `{"id", "op": "embed", "texts" (strings or lists of token ids), "deadline",
"tenant"}`; `{"id", "op": "generate", "ask": Ask.to_json(), "deadline", "tenant"}` is answered
`{"id", "delta": [Part.to_json(), ...]}` any number of times and then `{"id", "done": Usage.to_json()}`; all may name
what answers instead of the model, as `"adapter": folder`, and may be answered `{"id", "error": LLMOError.to_json()}`,
which ends them. `{"op": "cancel", "id"}` has no answer; `{"id", "op": "stats"}` is answered `{"id", "stats": {...}}`,
and `{"id", "op": "adapter", "folder"}`, which loads one, `{"id", "loaded": folder}` or an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, cast

from llmo.errors import DeadlineError, LLMOError, TooLargeError, UnreachableError, from_json
from llmo.serve.stream import Stream
from llmo.types import Asked

VERSION = 1
MAX_FRAME = 64 << 20
SCHEME = "unix:"
_ANSWERS = b',"answers":'
_ID = b'{"id":'


def frame(body: Mapping[str, Any]) -> bytes:
    """One frame. Lone surrogates pass, so that the replica can say which text holds one."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return _measured(data)


def answers_frame(call: int, answers: bytes) -> bytes:
    """The frame that answers a predict; `answers` is a JSON list, sent as it is: nobody on the way parses it."""
    return _measured(b"%s%d%s%s}" % (_ID, call, _ANSWERS, answers))


def error_frame(call: int, error: LLMOError) -> bytes:
    return frame({"id": call, "error": error.to_json()})


def socket_path(address: str) -> str:
    """The path in `unix:/path`; raises UnreachableError for another kind of address."""
    if not address.startswith(SCHEME):
        raise UnreachableError(f"'{address}' is not the address of a replica", hint="it looks like unix:/path")
    return address.removeprefix(SCHEME)


def mark_used(path: str) -> None:
    """A call came to the replica that listens there, or left it: its socket's time says so to every process."""
    with suppress(OSError):  # it is leaving, and its socket is gone
        os.utime(path)


def last_used(address: str) -> float:
    """When a call last came to a replica or left it, in seconds of the monotonic clock; 0 when it is gone."""
    try:
        return time.monotonic() - max(0.0, time.time() - Path(socket_path(address)).stat().st_mtime)
    except OSError:
        return 0.0


def _measured(data: bytes) -> bytes:
    if len(data) > MAX_FRAME:
        raise TooLargeError(
            f"an answer of {len(data) >> 20} MiB is over the limit of {MAX_FRAME >> 20} MiB",
            hint="send fewer texts at once, or do not ask for logits",
        )
    return len(data).to_bytes(4, "big") + data


class Frames(asyncio.Protocol):
    """Cuts a stream into frames and hands each one's bytes to `received`. Closes on a frame over MAX_FRAME."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class does not inherit from it

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "big")
            if end - start > MAX_FRAME + 4:
                self.transport.abort()
                return
            if len(buffer) < end:
                break
            self.received(bytes(buffer[start + 4 : end]))
            start = end
        if start:
            del buffer[:start]

    def received(self, data: bytes) -> None:
        raise RuntimeError("a subclass takes the frames")


class ReplicaGone(Exception):
    """The connection ended, or the replica is leaving, before an answer came: it is safe to ask another one."""


class Link(Frames):
    """The gateway's end of one connection: many calls at once, answered in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, Stream] = {}
        self._ids = count(1)
        self.hello: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.deadline_seconds = 0.0
        self.closed = False

    @classmethod
    async def connect(cls, address: str, timeout: float = 5.0) -> Link:
        """Connect and hear the hello. Raises ReplicaGone when nobody answers there."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, link = await loop.create_unix_connection(cls, socket_path(address))
                try:
                    hello = await link.hello
                except BaseException:
                    link.close()
                    raise
        except (OSError, TimeoutError) as error:
            raise ReplicaGone(f"nothing answers at {address}: {error}") from None
        link.deadline_seconds = float(hello["deadline_seconds"])
        return link

    @property
    def outstanding(self) -> int:
        return len(self._calls) + len(self._streams)

    async def call(self, body: Mapping[str, Any]) -> Any:
        """Send a call and wait for its answer: a predict's is the raw JSON list of answers, others' an object.

        A caller that is cancelled takes the call back from the replica. Raises the replica's LLMOError, or
        ReplicaGone when the connection ends first.
        """
        if self.closed:
            raise ReplicaGone("the connection is closed")
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self.transport.write(frame({"id": number, **body}))
        try:
            return await answer
        except asyncio.CancelledError:
            if not self.closed:
                self.transport.write(frame({"op": "cancel", "id": number}))
            raise
        finally:
            self._calls.pop(number, None)

    def open(self, body: Mapping[str, Any], over: Callable[[], None]) -> Stream:
        """Send a generation; its frames come through the stream, which calls `over` when there are no more.

        Raises ReplicaGone when the connection has ended; if it ends later, the stream does.
        """
        if self.closed:
            raise ReplicaGone("the connection is closed")
        number = next(self._ids)

        def take_back() -> None:
            if not self.closed:
                self.transport.write(frame({"op": "cancel", "id": number}))

        def ended() -> None:
            self._streams.pop(number, None)
            over()

        stream = self._streams[number] = Stream(take_back, ended)
        self.transport.write(frame({"id": number, **body}))
        return stream

    def close(self) -> None:
        self.closed = True
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        gone = ReplicaGone("the replica closed the connection")
        for waiting in [*self._calls.values(), self.hello]:
            if not waiting.done():
                waiting.set_exception(gone)
        for stream in list(self._streams.values()):
            stream.fail(gone)
        if not self.hello.cancelled():
            self.hello.exception()  # heard here, so that a connection nobody waits for does not warn

    def received(self, data: bytes) -> None:
        if data.startswith(_ID):
            comma = data.find(b",", len(_ID))
            if data.startswith(_ANSWERS, comma):
                self._finish(int(data[len(_ID) : comma]), data[comma + len(_ANSWERS) : -1])
                return
        body = json.loads(data)
        if "hello" in body:
            if not self.hello.done():
                self.hello.set_result(body)
        elif "error" in body:
            self._fail(body["id"], body["error"])
        elif "delta" in body or "done" in body:
            stream = self._streams.get(body["id"])
            if stream is not None:
                stream.put(body, len(data))
        else:
            self._finish(body["id"], body)

    def _finish(self, number: int, result: Any) -> None:
        waiting = self._calls.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def _fail(self, number: int, body: dict[str, Any]) -> None:
        known = from_json(body)
        error = ReplicaGone(known.what) if isinstance(known, UnreachableError) else known
        waiting, stream = self._calls.get(number), self._streams.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        if stream is not None:
            stream.fail(error)


def predict_once(
    address: str, texts: Sequence[Asked], *, logits: bool = False, adapter: str | None = None, timeout: float = 300.0
) -> list[dict[str, Any]]:
    """Ask a replica without a gateway and without an event loop: one connection, one call, its answers; `adapter` is
    the folder of what answers instead of its model.

    Raises UnreachableError when it is not there or goes away, DeadlineError after `timeout` seconds, and what
    the replica raises.
    """
    body: dict[str, Any] = {"op": "predict", "texts": list(texts), "deadline": time.time() + timeout, "logits": logits}
    body["adapter"] = adapter
    answers: list[dict[str, Any]] = _once(address, body, timeout)["answers"]
    return answers


def load_adapter(address: str, folder: str, *, timeout: float = 60.0) -> None:
    """Have a replica load the adapter in `folder`. Raises as `predict_once`, and what the replica says against it."""
    _once(address, {"op": "adapter", "folder": folder}, timeout)


def _once(address: str, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(socket_path(address))
            with connection.makefile("rwb") as stream:
                _read_frame(stream.read)  # the hello
                stream.write(frame({"id": 1, **body}))
                stream.flush()
                answer = _read_frame(stream.read)
    except TimeoutError:
        raise DeadlineError("the replica did not answer in time", hint="ask for less at once") from None
    except OSError as error:
        raise UnreachableError(f"no replica answers at {address}: {error}", hint="see `llmo endpoints`") from None
    if "error" in answer:
        raise from_json(answer["error"])
    return answer


def _read_frame(read: Callable[[int], bytes]) -> dict[str, Any]:
    head = read(4)
    data = read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    if not data:
        raise ConnectionResetError("it closed the connection")
    body: dict[str, Any] = json.loads(data)
    return body
