"""Who may do what: API keys, roles with named permissions, and the declaration that every route must carry."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from llmo.errors import EnvironmentProblem, ForbiddenError, LLMOError, UnauthorizedError
from llmo.types import Key

PUBLIC = "public"
_PREDICT = frozenset({"predict", "endpoints.read"})
_MEMBER = _PREDICT | {
    "data.read",
    "data.write",
    "models.read",
    "models.write",
    "jobs.read",
    "jobs.submit",
    "jobs.stop",
    "endpoints.write",
    "devices.read",
    "metrics.read",
}
_ADMIN = _MEMBER | {"keys.read", "keys.write", "server.stop"}
ROLES: Mapping[str, frozenset[str]] = {"predict": _PREDICT, "member": _MEMBER, "admin": _ADMIN}
PERMISSIONS = _ADMIN | {PUBLIC}

_CACHED = 10_000  # keys remembered at once, known and unknown: a flood of wrong ones must not grow memory
_LONGEST_SECRET = 256
_audit = logging.getLogger("llmo.audit")


class Access:
    """Looks keys up and remembers them for `ttl` seconds, so that a request costs no query.

    `find` is `store.keys.find`: it looks the secret up by its SHA-256, as the memory here does, so neither takes
    a time that says how much of a guessed secret was right. Revoking a key takes effect at once in the process
    that calls `forget`, and within `ttl` elsewhere.
    """

    def __init__(self, find: Callable[[str], Key | None], *, ttl: float = 2.0, audit: Audit | None = None) -> None:
        self._find = find
        self._ttl = ttl
        self._known: OrderedDict[bytes, tuple[float, Key | None]] = OrderedDict()
        self.audit = audit or Audit()

    def forget(self) -> None:
        """Drop what is remembered; call it after a key was made or revoked."""
        self._known.clear()

    async def key(self, headers: Iterable[tuple[bytes, bytes]]) -> Key:
        """The key that these ASGI headers carry. Raises UnauthorizedError when there is none or it is unknown."""
        secret = secret_of(headers)
        if not secret:
            raise UnauthorizedError(
                "no API key was sent",
                hint="send the header 'Authorization: Bearer KEY'; `llmo up` prints an admin key once",
            )
        found = await self._lookup(secret) if len(secret) <= _LONGEST_SECRET else None
        if found is None or found.revoked_at is not None:
            raise UnauthorizedError(
                "this server does not know the API key", hint="check LLMO_KEY, or ask an admin for a new key"
            )
        return found

    async def check(self, headers: Iterable[tuple[bytes, bytes]], permission: str) -> Key:
        """The key, if its role has the permission; raises UnauthorizedError or ForbiddenError."""
        key = await self.key(headers)
        if permission not in ROLES.get(key.role, frozenset()):
            raise ForbiddenError(
                f"a key with the role '{key.role}' may not do this (it needs '{permission}')",
                hint=f"use a key with the role {_roles_with(permission)}",
            )
        return key

    async def _lookup(self, secret: str) -> Key | None:
        digest = _digest(secret)
        now = time.monotonic()
        entry = self._known.get(digest)
        if entry is not None and entry[0] > now:
            return entry[1]
        found = await run_in_threadpool(self._find, secret)
        self._known[digest] = (now + self._ttl, found)
        self._known.move_to_end(digest)
        while len(self._known) > _CACHED:
            self._known.popitem(last=False)
        return found


class Audit:
    """One structured log line per denied request, at most `per_second` of them; the rest are counted."""

    def __init__(self, per_second: float = 10.0) -> None:
        self._gap = 1.0 / per_second
        self._next = 0.0
        self._silent = 0

    def denied(self, scope: Scope, error: LLMOError) -> None:
        """Log who was refused what and why; never the key itself."""
        now = time.monotonic()
        if now < self._next:
            self._silent += 1
            return
        self._next = now + self._gap
        client = scope.get("client")
        line = {
            "event": "denied",
            "code": error.code,
            "what": error.what,
            "method": scope.get("method", ""),
            "path": scope.get("path", "")[:200],
            "client": client[0] if client else "",
            "more_not_logged": self._silent,
        }
        self._silent = 0
        _audit.warning(json.dumps(line))


class Require:
    """What a route needs. A FastAPI dependency (`Depends(require("jobs.read"))`) that returns the Key, or None
    for public routes; `app.state.access` holds the Access it asks."""

    def __init__(self, permission: str) -> None:
        if permission not in PERMISSIONS:
            raise EnvironmentProblem(
                f"a route needs the unknown permission '{permission}'", hint=f"known: {', '.join(sorted(PERMISSIONS))}"
            )
        self.permission = permission

    async def __call__(self, request: HTTPConnection) -> Key | None:
        if self.permission == PUBLIC:
            return None
        access: Access = request.app.state.access
        try:
            key = await access.check(request.scope["headers"], self.permission)
        except (UnauthorizedError, ForbiddenError) as error:
            access.audit.denied(request.scope, error)
            raise
        request.state.key = key
        return key


def require(permission: str) -> Require:
    """Declares what a route needs: one of PERMISSIONS, `"public"` for none. Raises for an unknown name."""
    return Require(permission)


class Guarded:
    """An ASGI app behind a requirement: for mounts and for routes that are not FastAPI's own."""

    def __init__(self, app: ASGIApp, requirement: Require) -> None:
        self.app = app
        self.requirement = requirement

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.requirement(HTTPConnection(scope))
        except LLMOError as error:
            await JSONResponse({"error": error.to_json()}, error.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def declare(routes: Iterable[BaseRoute], path: str, permission: str) -> None:
    """Put an existing route or mount (FastAPI's /docs and /openapi.json, static files) behind a requirement.

    Raises EnvironmentProblem when no route has that path.
    """
    found = [r for r in routes if getattr(r, "path", None) == path]
    if not found:
        raise EnvironmentProblem(f"no route at '{path}' to declare")
    for route in found:
        route.app = Guarded(route.app, require(permission))  # type: ignore[attr-defined]


def check_declared(app: Any) -> None:
    """Raise EnvironmentProblem naming every route of a FastAPI or Starlette app that declares no requirement."""
    missing = sorted({path for path, requirement in declarations(app) if requirement is None})
    if missing:
        raise EnvironmentProblem(
            f"the server does not start: these routes do not declare what they need: {', '.join(missing)}",
            hint='add dependencies=[Depends(require("..."))], or declare(app.routes, path, permission)',
        )


def declarations(app: Any) -> list[tuple[str, Require | None]]:
    """(methods and path, requirement or None) of every route, mounts and included routers as well."""
    return list(_walk(getattr(app, "router", app), "", None))


def _walk(router: Any, prefix: str, inherited: Require | None) -> Iterable[tuple[str, Require | None]]:
    # FastAPI keeps the pages of `frontend()` apart from its routes.
    for route in [*router.routes, *getattr(router, "_low_priority_routes", [])]:
        included = getattr(route, "original_router", None)  # FastAPI keeps an included router as one route
        if included is not None:
            context = route.include_context
            given = next((d.dependency for d in context.dependencies if isinstance(d.dependency, Require)), inherited)
            yield from _walk(included, prefix + context.prefix, given)
            continue
        requirement = _requirement(route)
        if requirement is None and hasattr(route, "dependant"):  # others do not run what a router depends on
            requirement = inherited
        path = prefix + str(getattr(route, "path", type(route).__name__))
        if requirement is None and getattr(route, "routes", None):
            yield from _walk(getattr(getattr(route, "app", None), "router", route), path, None)
        else:
            methods = sorted(getattr(route, "methods", None) or [])
            yield (f"{','.join(methods)} {path}".strip(), requirement)


def _requirement(route: BaseRoute) -> Require | None:
    app = getattr(route, "app", None)
    if isinstance(app, Guarded):
        return app.requirement
    dependant: Any = getattr(route, "dependant", None)
    waiting = list(dependant.dependencies) if dependant is not None else []
    while waiting:
        dependency = waiting.pop()
        if isinstance(dependency.call, Require):
            return dependency.call
        waiting.extend(dependency.dependencies)
    return None


def secret_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The key in `Authorization: Bearer KEY` or `X-API-Key: KEY`; an empty string when there is none."""
    other = ""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return rest.strip().decode("latin-1")
        elif name == b"x-api-key":
            other = value.strip().decode("latin-1")
    return other


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8")).digest()


def _roles_with(permission: str) -> str:
    return " or ".join(role for role, allowed in ROLES.items() if permission in allowed)
