"""Our errors as the clients of OpenAI's API expect them."""

from __future__ import annotations

import math
from typing import Any

from llmo.errors import (
    BusyError,
    ForbiddenError,
    InputError,
    LLMOError,
    NotFoundError,
    TooLargeError,
    UnauthorizedError,
    UnreachableError,
)

_CODES: tuple[tuple[type[LLMOError], int, str, str | None], ...] = (
    (UnauthorizedError, 401, "invalid_request_error", "invalid_api_key"),
    (ForbiddenError, 403, "invalid_request_error", "insufficient_permissions"),
    (NotFoundError, 404, "invalid_request_error", "model_not_found"),
    (TooLargeError, 413, "invalid_request_error", "request_too_large"),
    (InputError, 400, "invalid_request_error", None),
    (BusyError, 429, "requests", "rate_limit_exceeded"),
)


def invalid(what: str, param: str, *, code: str | None = None, hint: str = "") -> InputError:
    """A request that cannot be answered because of `param`; `code` is one of OpenAI's, when it has one for this."""
    return InputError(what, where=param, hint=hint, **({"code": code} if code else {}))


def status_of(error: LLMOError) -> int:
    """400 for what the client got wrong, as OpenAI answers it; otherwise the error's own."""
    return next((status for kind, status, _, _ in _CODES if isinstance(error, kind)), error.status)


def body_of(error: LLMOError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind, code = next(
        ((kind, code) for cls, _, kind, code in _CODES if isinstance(error, cls)), ("server_error", error.code)
    )
    message = f"{error.what}; {error.hint}" if error.hint else error.what
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": error.where or None,
            "code": error.extra.get("code", code),
        }
    }


def headers_of(error: LLMOError) -> dict[str, str]:
    """When to come back, how to authenticate, and that an unread body ends the connection."""
    if isinstance(error, BusyError):
        return {"retry-after": str(max(1, math.ceil(float(error.extra.get("retry_after", 1.0)))))}
    if isinstance(error, UnreachableError):
        return {"retry-after": "1"}
    if isinstance(error, UnauthorizedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, TooLargeError):
        return {"connection": "close"}
    return {}
