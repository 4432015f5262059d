"""Bounds on what one caller may cost: requests per key, bytes per body."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmo.errors import BusyError, TooLargeError

BODY_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Quota:
    """`rate` texts a second on average, `burst` at once."""

    rate: float
    burst: float


class TokenBucket:
    """Holds up to `burst` tokens and gains `rate` a second."""

    def __init__(self, quota: Quota, now: float) -> None:
        self.quota = quota
        self._tokens = quota.burst
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Take `amount` and return 0.0, or take nothing and return the seconds until it would be there.

        An amount above the burst is let through once the bucket is full, and leaves a debt.
        """
        self._tokens = min(self.quota.burst, self._tokens + (now - self._at) * self.quota.rate)
        self._at = now
        needed = min(amount, self.quota.burst)
        if self._tokens >= needed:
            self._tokens -= amount
            return 0.0
        return (needed - self._tokens) / self.quota.rate


class Quotas:
    """Texts per second of each key. A key has no quota until one is set, and `default` may set one for all."""

    def __init__(self, default: Quota | None = None) -> None:
        self._default = default
        self._own: dict[str, Quota] = {}
        self._buckets: dict[str, TokenBucket] = {}

    def set(self, key_id: str, quota: Quota | None) -> None:
        """Give a key its own quota; None returns it to the default."""
        self._buckets.pop(key_id, None)
        if quota is None:
            self._own.pop(key_id, None)
        else:
            self._own[key_id] = quota

    def take(self, key_id: str, texts: int, now: float | None = None) -> None:
        """Charge a key for `texts`; raises BusyError (429, `retry_after`) when its quota is used up."""
        quota = self._own.get(key_id, self._default)
        if quota is None:
            return
        at = time.monotonic() if now is None else now
        bucket = self._buckets.get(key_id)
        if bucket is None:
            bucket = self._buckets[key_id] = TokenBucket(quota, at)
        wait = bucket.take(texts, at)
        if wait > 0:
            raise BusyError(
                f"this key's quota of {quota.rate:g} texts a second is used up",
                hint=f"wait {wait:.1f} s, or ask an admin for a larger quota",
                retry_after=round(wait, 3),
            )


def too_large(limit: int) -> TooLargeError:
    """The error for a body over `limit` bytes."""
    return TooLargeError(
        f"the request body is over the limit of {limit} bytes", hint="send it in several requests", limit=limit
    )


def declared_length(scope: Scope) -> int | None:
    """The Content-Length of a request, or None when it has none that is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return None


class BodyLimit:
    """ASGI middleware: a body over the limit is answered 413 as soon as that is known, and never held in memory.

    `larger` maps path prefixes to their own limit in bytes (None: no limit), for uploads that are streamed.
    """

    def __init__(self, app: ASGIApp, limit: int = BODY_LIMIT, larger: Mapping[str, int | None] | None = None) -> None:
        self.app = app
        self._limit = limit
        self._larger = dict(larger or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._limit_of(scope["path"]) if scope["type"] == "http" else None
        if limit is None:
            await self.app(scope, receive, send)
        elif (declared_length(scope) or 0) > limit:
            await _refuse(limit, scope, receive, send)
        else:
            await self._counted(limit, scope, receive, send)

    async def _counted(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0
        started = refused = False

        async def counted() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen <= limit:
                return message
            if not started and not refused:
                refused = True
                await _refuse(limit, scope, receive, send)
            return {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, watched)
        except ClientDisconnect:
            if not refused:
                raise

    def _limit_of(self, path: str) -> int | None:
        for prefix, limit in self._larger.items():
            if path.startswith(prefix):
                return limit
        return self._limit


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    error = too_large(limit)
    response = JSONResponse({"error": error.to_json()}, error.status, headers={"connection": "close"})
    await response(scope, receive, send)
