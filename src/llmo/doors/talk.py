"""Asks an endpoint that generates, over OpenAI's streaming protocol; closing the stream cancels the answer."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from llmo.errors import (
    BusyError,
    DeadlineError,
    ForbiddenError,
    InputError,
    LLMOError,
    NotFoundError,
    TooLargeError,
    UnauthorizedError,
    UnreachableError,
    from_json,
)

TIMEOUT = httpx.Timeout(None, connect=5.0)  # how long a model may think is the endpoint's to say
_BY_STATUS: Mapping[int, type[LLMOError]] = {
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    413: TooLargeError,
    429: BusyError,
    503: UnreachableError,
    504: DeadlineError,
}

Message = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """What has come of an answer so far: `model` is the version that writes it, `usage` the server's count, `finish`
    why it ended; None until then."""

    model: str = ""
    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


def ask(
    url: str, key: str, endpoint: str, messages: Sequence[Message], settings: Mapping[str, Any], answer: Answer
) -> Generator[str, None, None]:
    """The pieces of the answer as they come; `answer` grows with them. Raises what the server refused, as our errors.

    Left early (a break, an exception), the connection is closed, and the server stops writing.
    """
    body = {"model": endpoint, "messages": list(messages), **settings, "stream": True}
    body["stream_options"] = {"include_usage": True}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    # ASCII: half a surrogate pair is refused by the server in words, not by our encoder.
    content = json.dumps(body).encode()
    try:
        with (
            httpx.Client(timeout=TIMEOUT, trust_env=False) as http,
            http.stream("POST", f"{url}/v1/chat/completions", content=content, headers=headers) as reply,
        ):
            if not reply.is_success:
                reply.read()
                raise refusal(reply.status_code, _told(reply))
            yield from _pieces(reply, answer)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise UnreachableError(
            f"the server at {url} cannot be reached, or went away ({type(error).__name__})", hint="see: llmo endpoints"
        ) from None


def _pieces(reply: httpx.Response, answer: Answer) -> Iterator[str]:
    for line in reply.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk = _decoded(data)
        if "error" in chunk:
            raise refusal(500, chunk["error"])
        answer.model = chunk.get("system_fingerprint") or answer.model
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk.get("choices", []):
            answer.finish = choice.get("finish_reason") or answer.finish
            piece = choice.get("delta", {}).get("content")
            if piece:
                answer.text += piece
                yield piece
    if answer.finish is None:
        raise UnreachableError("the answer broke off", hint="see: llmo endpoints")


def _decoded(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise UnreachableError("what answers there does not speak this protocol", hint="see LLMO_URL")
    return chunk


def _told(reply: httpx.Response) -> Mapping[str, Any]:
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {"message": f"it said {reply.status_code} {reply.reason_phrase}"}
    return error if isinstance(error, dict) else {"message": str(error)}


def refusal(status: int, error: Mapping[str, Any]) -> LLMOError:
    """The server's own errors come as they are, those in OpenAI's shape by their status."""
    if "what" in error:
        return from_json(dict(error))
    what, where = str(error.get("message", "the server gave no reason")), str(error.get("param") or "")
    kind = _BY_STATUS.get(status, InputError if 400 <= status < 500 else None)
    return kind(what, where=where) if kind else from_json({"code": error.get("code"), "what": what, "where": where})
