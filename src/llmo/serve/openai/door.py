"""The door that OpenAI's clients know: /v1/chat/completions, /completions, /responses, /embeddings and /models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llmo.errors import ForbiddenError, LLMOError, NotFoundError, UnauthorizedError, UnreachableError
from llmo.guard.access import Access, require
from llmo.guard.limits import Quotas
from llmo.serve.http import CLIENT_GONE, UNKNOWN, Handled, gone, read_body, send_json
from llmo.serve.openai import chat, completions, embeddings, responses
from llmo.serve.openai.errors import body_of, headers_of, status_of
from llmo.serve.openai.request import Shape, Wanted
from llmo.serve.protocol import ReplicaGone
from llmo.serve.router import Router
from llmo.serve.stream import Stream
from llmo.types import Adapter, Endpoint, Key
from llmo.watch.metrics import Metrics

BODY_LIMIT = 8 << 20  # bytes: a long conversation with its history; what no model can read is refused by the replica
_MODELS = "/v1/models"
_PARSERS: Mapping[str, Callable[[bytes], Wanted]] = {
    "/v1/chat/completions": chat.parse,
    "/v1/completions": completions.parse,
    "/v1/responses": responses.parse,
}
_EMBEDDINGS = "/v1/embeddings"
_STREAM_HEAD = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies would gather the events otherwise
]
_log = logging.getLogger("llmo.serve")


class Door:
    """Answers over one Router; every outcome is counted, and every error has OpenAI's shape."""

    def __init__(self, router: Router, access: Access, metrics: Metrics, quotas: Quotas) -> None:
        self._router = router
        self._access = access
        self._metrics = metrics
        self._quotas = quotas

    def find(self, method: str, path: str) -> ASGIApp | None:
        """What answers this request, if it is one of ours."""
        if method == "POST" and path in _PARSERS:
            return partial(self._counted, partial(self._generate, _PARSERS[path]))
        if method == "POST" and path == _EMBEDDINGS:
            return partial(self._counted, self._embed)
        if method == "GET" and path == _MODELS:
            return partial(self._counted, self._models)
        if method == "GET" and path.startswith(f"{_MODELS}/"):
            return partial(self._counted, partial(self._model, unquote(path[len(_MODELS) + 1 :])))
        return None

    async def _counted(self, work: Callable[..., Any], scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work of one request; whatever becomes of it, the client hears it in the form it expects."""
        began = time.perf_counter()
        self._metrics.began()
        out = _Out(send)
        try:
            await work(scope, receive, out)
        except LLMOError as error:
            if isinstance(error, UnauthorizedError | ForbiddenError):
                self._access.audit.denied(scope, error)
            await out.fail(error)
        except Exception:  # the border of the server: a defect of ours is one request's 500, with a trace in the log
            _log.exception("a request failed")
            await out.fail(LLMOError("the server made a mistake", hint="see its log"))
        finally:
            label = self._router.endpoint_of(out.model) or UNKNOWN
            self._metrics.seen(label, out.status, time.perf_counter() - began)

    async def _generate(self, parse: Callable[[bytes], Wanted], scope: Scope, receive: Receive, out: _Out) -> None:
        key = await self._access.check(scope["headers"], "predict")
        data = await read_body(scope, receive, BODY_LIMIT)
        if data is None:
            return
        wanted = parse(data)
        out.model = wanted.model
        self._quotas.take(key.id, wanted.ask.choices)
        await _while_there(receive, self._answer(wanted, key, out))

    async def _embed(self, scope: Scope, receive: Receive, out: _Out) -> None:
        key = await self._access.check(scope["headers"], "predict")
        data = await read_body(scope, receive, BODY_LIMIT)
        if data is None:
            return
        wanted = embeddings.parse(data)
        out.model = wanted.model
        self._quotas.take(key.id, len(wanted.inputs))
        await _while_there(receive, self._answer_embedded(wanted, key, out))

    async def _answer_embedded(self, wanted: embeddings.Wanted, key: Key, out: _Out) -> None:
        out.model, adapter = await self._router.find(wanted.model)
        reply = await self._router.embed(out.model, wanted.inputs, adapter=adapter, tenant=key.id)
        await out.json(200, await asyncio.to_thread(wanted.answer, reply.answers), {})

    async def _answer(self, wanted: Wanted, key: Key, out: _Out) -> None:
        out.model, adapter = await self._router.find(wanted.model)
        generating = await self._router.generate(out.model, wanted.ask, adapter=adapter, tenant=key.id)
        shape: Shape = wanted.shape(generating.model)
        try:
            if wanted.ask.stream:
                await out.stream(shape, generating.stream)
            else:
                await out.whole(shape, generating.stream)
        except ReplicaGone as left:
            raise UnreachableError(f"the replica ended in the middle of the answer: {left}", hint="ask again") from None
        finally:
            generating.stream.close()

    async def _models(self, scope: Scope, receive: Receive, out: _Out) -> None:
        await self._access.check(scope["headers"], "predict")
        found = []
        for endpoint in self._router.endpoints():
            if endpoint.task == "generation":
                adapters = self._router.adapters(endpoint.name)
                found += [_model(endpoint), *(_model(endpoint, adapter) for adapter in adapters)]
        await out.json(200, {"object": "list", "data": found}, {})

    async def _model(self, name: str, scope: Scope, receive: Receive, out: _Out) -> None:
        await self._access.check(scope["headers"], "predict")
        found, adapter = await self._router.find(name)
        endpoint = await self._router.endpoint(found)
        if endpoint.task != "generation":
            raise NotFoundError(f"the endpoint '{found}' does not generate", hint="see GET /v1/models")
        known = [other for other in self._router.adapters(found) if other.name == adapter]
        await out.json(200, _model(endpoint, *known), {})

    def routes(self) -> APIRouter:
        """The routes with their declarations and documentation, to include in an application."""
        router = APIRouter(tags=["openai"])
        needs = [Depends(require("predict"))]
        for path, about in _ABOUT.items():
            method = "GET" if path.startswith(_MODELS) else "POST"
            body = {} if method == "GET" else _body(path)
            router.add_api_route(
                path, self._documented, methods=[method], dependencies=needs, description=about, openapi_extra=body
            )
        return router

    async def _documented(self, request: Request) -> Response:
        found = self.find(request.method, request.url.path)
        if found is None:
            raise NotFoundError(f"no route at {request.url.path}")
        return Handled(found)


class _Out:
    """The answer of one request: whether it has begun, and what it is counted as."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._shape: Shape | None = None  # of a stream that has begun
        self.model = ""
        self.status = CLIENT_GONE

    async def json(self, status: int, body: Mapping[str, Any] | bytes, headers: Mapping[str, str]) -> None:
        self.status = status
        await send_json(self._send, status, body, headers)

    async def whole(self, shape: Shape, stream: Stream) -> None:
        parts: list[Mapping[str, Any]] = []
        while "done" not in (frame := await stream.next()):
            parts += frame["delta"]
        await self.json(200, shape.whole(parts, frame["done"]), {})

    async def stream(self, shape: Shape, stream: Stream) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEAD})
        self._shape = shape
        events = shape.begin()
        while "done" not in (frame := await stream.next()):
            for part in frame["delta"]:
                events += shape.part(part)
            await self._events(events)
            events = []
        await self._events([*events, *shape.end(frame["done"])], last=True)
        self.status = 200

    async def fail(self, error: LLMOError) -> None:
        """The error instead of an answer, or as the end of one that has begun."""
        if self._shape is None:
            await self.json(status_of(error), body_of(error), headers_of(error))
        else:
            self.status = status_of(error)
            await self._events(self._shape.broken(body_of(error)), last=True)

    async def _events(self, events: list[bytes], *, last: bool = False) -> None:
        if events or last:
            await self._send({"type": "http.response.body", "body": b"".join(events), "more_body": not last})


async def _while_there(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Answer, unless the client goes meanwhile: then the answer is given up."""
    answer = asyncio.ensure_future(answering)
    left = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            answer.result()
    finally:
        left.cancel()
        if not answer.done():
            answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer


def _model(endpoint: Endpoint, adapter: Adapter | None = None) -> dict[str, Any]:
    """As OpenAI has it; `root` is the version behind the name and `parent` the endpoint of an adapter, as in vLLM."""
    id, parent = (endpoint.name, None) if adapter is None else (f"{endpoint.name}:{adapter.name}", endpoint.name)
    known = {"id": id, "object": "model", "created": int((adapter or endpoint).created_at), "owned_by": "llmo"}
    return {**known, "root": (adapter or endpoint).model_ref, "parent": parent}


_ABOUT = {
    "/v1/chat/completions": "A chat completion, as OpenAI's clients ask for it. Beyond theirs: `top_k`, `min_p`, "
    "`repetition_penalty`, `regex` (also `guided_regex`) and `return_token_ids`. What is not known is ignored.",
    "/v1/completions": "A text completion: the prompt is gone on with as it is, without a template.",
    "/v1/responses": "A response, as far as creating and streaming one goes; nothing is stored.",
    _EMBEDDINGS: "Embeddings by an endpoint over an encoder: the mean of its last hidden states, at length 1, as "
    "numbers or in base64. An input of more tokens than the model reads is refused.",
    _MODELS: "The endpoints that generate, and their adapters as ENDPOINT:ADAPTER.",
    f"{_MODELS}/{{model}}": "One of them.",
}


def _body(path: str) -> dict[str, Any]:
    examples = {"/v1/chat/completions": chat.EXAMPLE, "/v1/completions": completions.EXAMPLE}
    example = (examples | {_EMBEDDINGS: embeddings.EXAMPLE}).get(path)
    schema = {"type": "object", "required": ["model"], "properties": {"model": {"type": "string"}}}
    about = {"description": example.removeprefix("send ")} if example else {}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}, **about}}
