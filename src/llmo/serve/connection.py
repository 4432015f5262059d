"""One replica as the router sees it: its address, the connection while there is one, and how many calls it has open."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from llmo.serve.protocol import Link, ReplicaGone
from llmo.serve.stream import Stream

_STATS_SECONDS = 1.0


class Replica:
    """One address, and the connection to it while there is one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.outstanding = 0
        self._link: Link | None = None
        self._connecting = asyncio.Lock()

    async def call(self, body: Mapping[str, Any]) -> Any:
        """As `Link.call`, over a connection made anew when the last one ended. Raises ReplicaGone."""
        self.outstanding += 1  # before the connection is there, so that a burst is divided as well
        try:
            return await (await self._connected()).call(body)
        finally:
            self.outstanding -= 1

    async def open(self, body: Mapping[str, Any]) -> Stream:
        """As `Link.open`, once the first frame is there; raises what came instead of it."""
        self.outstanding += 1
        try:
            stream = (await self._connected()).open(body, self._ended)
        except BaseException:
            self._ended()
            raise
        try:
            await stream.begun()
        except BaseException:
            stream.close()
            raise
        return stream

    async def _connected(self) -> Link:
        if self._link is None or self._link.closed:
            async with self._connecting:
                if self._link is None or self._link.closed:
                    self._link = await Link.connect(self.address)
        return self._link

    def _ended(self) -> None:
        self.outstanding -= 1

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


async def stats_of(replica: Replica) -> dict[str, Any] | None:
    """Its numbers; None when it does not tell them in a second."""
    try:
        async with asyncio.timeout(_STATS_SECONDS):
            answer = await replica.call({"op": "stats"})
    except (ReplicaGone, TimeoutError):
        return None
    numbers: dict[str, Any] = answer["stats"]
    return numbers
