"""Every error LLMO shows a user: one tree, each with a code, what happened, where, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class LLMOError(Exception):
    """Something LLMO can explain. `what` happened, `where` (file, line, key), `hint`: what to do next.

    `exit_code` is the CLI's, `status` the HTTP API's; both are part of the public contract.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500

    def __init__(self, what: str, *, hint: str = "", where: str = "", **extra: Any) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.where = where
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what

    def to_json(self) -> dict[str, Any]:
        """The error as it crosses a process or HTTP border; `from_json` is the inverse."""
        body: dict[str, Any] = {"code": self.code, "what": self.what}
        if self.where:
            body["where"] = self.where
        if self.hint:
            body["hint"] = self.hint
        if self.extra:
            body["extra"] = self.extra
        return body


class InputError(LLMOError):
    """What the user gave is wrong; nothing was computed."""

    code = "input"
    exit_code = 2
    status = 422


class SpecError(InputError):
    """A key or value of a specification (YAML, flag or API body) is wrong."""

    code = "spec"


class DataError(InputError):
    """The data cannot be read or cannot be learnt from."""

    code = "data"


class ModelError(InputError):
    """A model folder is incomplete, unsafe or of an unknown architecture."""

    code = "model"


class NoRoomError(ModelError):
    """An adapter fits into the memory that is set aside for adapters, but not beside those that are loaded."""

    code = "no_room"


class NeedsError(InputError):
    """A job needs more than the machine has."""

    code = "needs"


class NotFoundError(InputError):
    """No such job, data set, model or endpoint."""

    code = "not_found"
    status = 404


class ConflictError(InputError):
    """The request contradicts the present state (a name taken, a job already ended)."""

    code = "conflict"
    status = 409


class TooLargeError(InputError):
    """A body, a text or a batch is over its limit."""

    code = "too_large"
    status = 413


class UnauthorizedError(InputError):
    """No key, or a key this server does not know."""

    code = "unauthorized"
    status = 401


class ForbiddenError(InputError):
    """The key is known but its role does not allow this."""

    code = "forbidden"
    status = 403


class GateRefused(LLMOError):
    """A quality gate said no: the work was done, the result was not let through."""

    code = "gate"
    exit_code = 3
    status = 409


class JobFailed(LLMOError):
    """A job ended without a result."""

    code = "job_failed"
    exit_code = 4


class AttemptLost(JobFailed):
    """A process that the job needs died, as the job itself may: it is tried again, from its last checkpoint."""

    code = "attempt_lost"


class UnreachableError(LLMOError):
    """The server, or a replica behind it, cannot be reached."""

    code = "unreachable"
    exit_code = 5
    status = 503


class BusyError(LLMOError):
    """A bounded queue is full; `retry_after` seconds is in `extra`."""

    code = "busy"
    exit_code = 5
    status = 429


class DeadlineError(LLMOError):
    """The request's deadline passed before an answer was ready."""

    code = "deadline"
    exit_code = 5
    status = 504


class StorageError(LLMOError):
    """The disk is full, a folder cannot be written, or stored bytes are not what was stored."""

    code = "storage"
    status = 507


class EnvironmentProblem(LLMOError):
    """A package, device or port this needs is missing or taken."""

    code = "environment"


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Around imports of what `extra` of LLMO installs: where it is missing, `what` needs it, as EnvironmentProblem."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentProblem(
            f"{what} needs a package that is not installed: {error.name or error}",
            hint=f"pip install 'llmo-os[{extra}]'",
        ) from error


def _tree(cls: type[LLMOError]) -> dict[str, type[LLMOError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


def from_json(body: dict[str, Any]) -> LLMOError:
    """Rebuild the error that `LLMOError.to_json` wrote; an unknown code becomes a plain `LLMOError`."""
    cls = _tree(LLMOError).get(str(body.get("code")), LLMOError)
    return cls(
        str(body.get("what", "unknown error")),
        hint=str(body.get("hint", "")),
        where=str(body.get("where", "")),
        **dict(body.get("extra", {})),
    )


def nearest(word: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"` when a known word is close, else an empty string."""
    from difflib import get_close_matches  # 10 ms, and only on the way to an error

    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
