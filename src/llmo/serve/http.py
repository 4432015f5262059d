"""Small ends of ASGI that the gateway's doors share: a body within bounds, one JSON answer, a client that goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llmo.guard.limits import declared_length, too_large

CLIENT_GONE = 499  # what a request is counted as whose client went before the answer
UNKNOWN = "(unknown)"  # the label of requests for endpoints that do not exist


async def send_json(send: Send, status: int, body: Mapping[str, Any] | bytes, headers: Mapping[str, str]) -> None:
    """One answer, ASCII when it is written here: what an error quotes may hold half a surrogate pair."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    head += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, None when the client went meanwhile; TooLargeError as soon as it is known to be over."""
    if (declared_length(scope) or 0) > limit:
        raise too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Handled(Response):
    """Lets a door of ours answer where FastAPI expects a response."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
