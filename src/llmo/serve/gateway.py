"""The public door of endpoints: POST /v1/endpoints/{name}/predict, /healthz, /readyz and /metrics; beside it
`openai/door.py`, the one that OpenAI's clients know."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llmo.errors import (
    BusyError,
    DeadlineError,
    ForbiddenError,
    LLMOError,
    NotFoundError,
    UnauthorizedError,
    UnreachableError,
)
from llmo.guard.access import Access, require
from llmo.guard.limits import BODY_LIMIT, BodyLimit, Quotas
from llmo.serve.adapters import AdapterTable
from llmo.serve.body import MAX_TEXTS, PredictBody, parse
from llmo.serve.http import CLIENT_GONE, UNKNOWN, Handled, gone, read_body, send_json
from llmo.serve.openai.door import Door
from llmo.serve.router import Reply, Router
from llmo.store import Store
from llmo.types import JobState
from llmo.watch.metrics import CONTENT_TYPE, Metrics

_PREFIX, _SUFFIX = "/v1/endpoints/", "/predict"
_GRACE = 0.25  # seconds a replica gets beyond the deadline to say so itself, with its own words
_log = logging.getLogger("llmo.serve")


class PredictRequest(BaseModel):
    """One text or many."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, description="one text; or use `texts`")
    pair: str | None = Field(None, description="sentence-embedding: a second text, to tell how alike they are")
    question: str | None = Field(None, description="extractive-qa: what is asked of the `context`")
    context: str | None = Field(None, description="extractive-qa: the text that holds the answer")
    texts: list[str | dict[str, str]] | None = Field(
        None, description=f"up to {MAX_TEXTS} texts, or objects of texts by these names; or use the names themselves"
    )
    history: list[str | int] | None = Field(None, description="next-item: a user's items, oldest first")
    logits: bool = Field(False, description="also return each text's logits and token ids")
    deadline_seconds: float | None = Field(None, description="answer 504 after this time; default: the endpoint's")


class PredictAnswer(BaseModel):
    """One answer a text, in their order."""

    endpoint: str
    model: str = Field(description="the version that answered, name@version")
    answers: list[dict[str, Any]] = Field(description="as the task defines them; `truncated` when a text was cut")


class Gateway:
    """Serves predictions over one Router. `include_gateway` puts it into an application."""

    def __init__(
        self,
        router: Router,
        access: Access,
        *,
        metrics: Metrics | None = None,
        quotas: Quotas | None = None,
        jobs: Callable[[], Mapping[str, int]] = dict,
        body_limit: int = BODY_LIMIT,
        max_texts: int = MAX_TEXTS,
    ) -> None:
        self.router = router
        self.access = access
        self.metrics = metrics or Metrics()
        self.quotas = quotas or Quotas()
        self._jobs = jobs
        self._body_limit = body_limit
        self._max_texts = max_texts
        self._heads: dict[tuple[str, str], bytes] = {}
        self.openai = Door(router, access, self.metrics, self.quotas)

    async def predict(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one predict request; every outcome, good or bad, is one JSON answer and one count."""
        began = time.perf_counter()
        self.metrics.began()
        status = CLIENT_GONE
        try:
            reply = await self._answer(name, scope, receive)
            if reply is not None:
                status = 200
                await send_json(send, 200, self._head(name, reply.model) + reply.answers + b"}", {})
        except LLMOError as error:
            status = error.status
            if isinstance(error, UnauthorizedError | ForbiddenError):
                self.access.audit.denied(scope, error)
            await error_response(error)(scope, receive, send)
        except Exception:  # the border of the server: a defect of ours is one request's 500, with a trace in the log
            _log.exception("predict failed")
            status = 500
            await error_response(LLMOError("the server made a mistake", hint="see its log"))(scope, receive, send)
        finally:
            label = self.router.endpoint_of(name) or UNKNOWN
            self.metrics.seen(label, status, time.perf_counter() - began)

    async def _answer(self, name: str, scope: Scope, receive: Receive) -> Reply | None:
        """The reply, or None when the client has gone."""
        key = await self.access.check(scope["headers"], "predict")
        data = await read_body(scope, receive, self._body_limit)
        if data is None:
            return None
        body = parse(data, self._max_texts)
        self.quotas.take(key.id, len(body.texts))
        endpoint, adapter = await self.router.find(name)
        return await self._call(endpoint, adapter, body, key.id, receive)

    async def _call(
        self, endpoint: str, adapter: str | None, body: PredictBody, tenant: str, receive: Receive
    ) -> Reply | None:
        """Ask the router, while watching for the client to go and the deadline to pass: both end the call."""
        deadline = None if body.deadline_seconds is None else time.time() + body.deadline_seconds
        timeout = None if body.deadline_seconds is None else body.deadline_seconds + _GRACE
        reply = asyncio.ensure_future(
            self.router.predict(
                endpoint, body.texts, adapter=adapter, deadline=deadline, logits=body.logits, tenant=tenant
            )
        )
        left = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait((reply, left), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                return reply.result()
            if left.done():
                return None
            raise DeadlineError("the deadline passed before the answer was ready", hint="allow it more time")
        finally:
            left.cancel()
            reply.cancel()

    def _head(self, name: str, model: str) -> bytes:
        head = self._heads.get((name, model))
        if head is None:
            if len(self._heads) > 1000:
                self._heads.clear()
            text = json.dumps({"endpoint": name, "model": model})
            head = self._heads[name, model] = text[:-1].encode() + b', "answers": '
        return head

    async def scrape(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return self.metrics.text(await self.router.stats(), await run_in_threadpool(self._jobs))

    def routes(self) -> APIRouter:
        """The gateway's routes with their declarations and their documentation, to include in an application."""
        router = APIRouter(tags=["endpoints"])

        @router.post(
            "/v1/endpoints/{name}/predict",
            dependencies=[Depends(require("predict"))],
            response_model=PredictAnswer,
            openapi_extra=_documented(PredictRequest),
            responses={code: {"description": text} for code, text in _PROBLEMS.items()},
        )
        async def predict(
            name: Annotated[str, Path(description="the endpoint, ENDPOINT:ADAPTER, or the version of either")],
            request: Request,
        ) -> Response:
            """Answers of the endpoint's model, or of one that was added to it, for one text or many."""
            return Handled(lambda scope, receive, send: self.predict(name, scope, receive, send))

        @router.get("/healthz", dependencies=[Depends(require("public"))])
        async def healthz() -> dict[str, bool]:
            """Whether the process answers."""
            return {"ok": True}

        @router.get("/readyz", dependencies=[Depends(require("public"))])
        async def readyz() -> Response:
            """Whether endpoints can be looked up: 200, or 503 while the store cannot be read."""
            return JSONResponse({"ready": self.router.ready}, 200 if self.router.ready else 503)

        @router.get("/metrics", dependencies=[Depends(require("metrics.read"))])
        async def metrics() -> Response:
            """Metrics of requests, replicas and jobs, for Prometheus."""
            return Response(await self.scrape(), headers={"content-type": CONTENT_TYPE})

        return router


class FastPath:
    """ASGI middleware: requests to models go straight to the gateway, all else to the application.

    The application's own route for them only documents them: passing through its layers would cost a third of
    what a small model takes. It also keeps the router running from start-up to shutdown.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self.app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            async with self._gateway.router.running():
                await self.app(scope, receive, send)
            return
        if scope["type"] == "http":
            path: str = scope["path"]
            handled = self._gateway.openai.find(scope["method"], path)
            if handled is not None:
                await handled(scope, receive, send)
                return
            if scope["method"] == "POST" and path.startswith(_PREFIX) and path.endswith(_SUFFIX):
                name = path[len(_PREFIX) : -len(_SUFFIX)]
                if name and "/" not in name:
                    await self._gateway.predict(name, scope, receive, send)
                    return
        await self.app(scope, receive, send)


def include_gateway(
    app: FastAPI,
    store: Store,
    *,
    quotas: Quotas | None = None,
    uploads: Mapping[str, int | None] | None = None,
    body_limit: int = BODY_LIMIT,
) -> Gateway:
    """Put predict, health and metrics into `app`, and what guards them.

    Adds the routes (each with its declaration), answers LLMOErrors of any route as `error_response` does, sets
    `app.state.access` (which `require` asks; call its `forget` after a key was made or revoked), bounds every
    body to `body_limit` bytes (`uploads` maps path prefixes to their own limits; None: unlimited), and runs the
    router for as long as the application runs.
    """
    active = [JobState.QUEUED, JobState.STARTING, JobState.RUNNING]

    def jobs() -> dict[str, int]:
        found = [job.state for job in store.jobs.list(states=active, limit=100_000)]
        return {state.value: found.count(state) for state in active}

    access, metrics = Access(store.keys.find), Metrics()
    router = Router(store.endpoints.list, AdapterTable(store).load, want=store.endpoints.want, woken=metrics.woken)
    gateway = Gateway(router, access, metrics=metrics, quotas=quotas, jobs=jobs, body_limit=body_limit)
    app.state.access = access
    app.add_exception_handler(LLMOError, _on_error)
    app.include_router(gateway.routes())
    app.include_router(gateway.openai.routes())
    app.add_middleware(BodyLimit, limit=body_limit, larger={"/v1/uploads/": None, **(uploads or {})})
    app.add_middleware(FastPath, gateway=gateway)  # added last, so outermost
    return gateway


def error_response(error: LLMOError) -> Response:
    """Any error as the API answers it: its status, `{"error": {...}}`, and Retry-After in whole seconds."""
    headers = {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(max(1, math.ceil(float(error.extra.get("retry_after", 1.0)))))
    elif isinstance(error, UnreachableError):
        headers["retry-after"] = "1"
    elif isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    elif error.status == 413:
        headers["connection"] = "close"  # the rest of the body, if any, is not read
    body = json.dumps({"error": error.to_json()}).encode()  # ASCII: what is quoted may hold half a surrogate pair
    return Response(body, error.status, headers, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, LLMOError):
        raise error
    return error_response(error)


_PROBLEMS: dict[int | str, str] = {
    401: UnauthorizedError.__doc__ or "",
    403: ForbiddenError.__doc__ or "",
    404: NotFoundError.__doc__ or "",
    413: "The body, a text or their number is over its limit.",
    422: "The body is not what it should be; `error.what` and `error.where` say how.",
    429: "The queue is full, or the key's quota is used up; Retry-After says when to come back.",
    503: UnreachableError.__doc__ or "",
    504: DeadlineError.__doc__ or "",
}


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
