"""Requests to endpoints that are asleep: they wait until the endpoint is up, bounded in number, bytes and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmo.errors import BusyError, DeadlineError
from llmo.types import Endpoint

_DEADLINE_SECONDS, _PLACES = 30.0, 1024  # of an endpoint that does not say
_MOST_BYTES = 64 << 20  # of all requests that wait, as JSON: a thousand places alone would hold gigabytes
_SUPPOSED_SECONDS = 5.0  # that waking takes, before it was measured


@dataclass(slots=True)
class _Line:
    """Who waits for one endpoint: `size` texts or prompts."""

    size: int = 0
    since: float = field(default_factory=time.monotonic)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Waking:
    """`want` says, in a thread, that an endpoint is to wake; `woken` is told each that came up, and how many seconds
    after the first request for it."""

    def __init__(self, want: Callable[[str], None], woken: Callable[[str, float], None]) -> None:
        self._want = want
        self._woken = woken
        self._lines: dict[str, _Line] = {}
        self._took: dict[str, float] = {}
        self._bytes = 0

    def __contains__(self, name: str) -> bool:
        """Whether requests wait for that endpoint; any thread may ask."""
        return name in self._lines

    async def wait(self, endpoint: Endpoint, size: int, length: int, deadline: float) -> None:
        """Until `heard` says that it sleeps no more, for a call of `size` texts or prompts and `length` bytes;
        `deadline` in unix seconds.

        Raises BusyError when too many wait, DeadlineError when it takes too long (it goes on waking then).
        """
        name, places = endpoint.name, int(endpoint.deploy.get("queue", _PLACES))
        line = self._lines.get(name) or _Line()
        if line.size and line.size + size > places:
            raise self._busy(name, f"{line.size} texts or prompts wait for it")
        if self._bytes and self._bytes + length > _MOST_BYTES:
            raise self._busy(name, f"requests of {self._bytes >> 20} MiB wait for this and other endpoints")
        first = name not in self._lines
        self._lines[name] = line
        line.size += size
        self._bytes += length
        try:
            async with asyncio.timeout(max(0.0, deadline - time.time())):
                if first:
                    await asyncio.to_thread(self._want, name)
                await line.over.wait()
        except TimeoutError:
            raise DeadlineError(
                f"the endpoint '{name}' was asleep, and the deadline passed before it was up",
                hint="ask again, or allow it more time; `llmo endpoints` says what it waits for",
            ) from None
        finally:
            line.size -= size
            self._bytes -= length
            if line.size == 0 and self._lines.get(name) is line:
                del self._lines[name]

    def _busy(self, name: str, what: str) -> BusyError:
        wait = self._took.get(name, _SUPPOSED_SECONDS)
        return BusyError(
            f"the endpoint '{name}' is waking, and {what}",
            hint=f"send it again in {wait:.1f} s",
            retry_after=round(wait, 3),
        )

    def heard(self, endpoints: Mapping[str, Endpoint]) -> None:
        """How the endpoints are now: those who wait for one that sleeps no more, or is gone, go on."""
        for name, line in list(self._lines.items()):
            endpoint = endpoints.get(name)
            if endpoint is not None and endpoint.rests:
                continue
            del self._lines[name]
            line.over.set()
            if endpoint is not None and endpoint.state == "up":
                self._took[name] = time.monotonic() - line.since
                self._woken(name, self._took[name])


def patience(endpoint: Endpoint) -> float:
    """Seconds that a call waits for an endpoint when it says nothing of a deadline."""
    return float(endpoint.deploy.get("deadline_seconds", _DEADLINE_SECONDS))
