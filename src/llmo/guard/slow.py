"""uvicorn's HTTP protocol with the bounds it lacks: slow or endless headers and stalled bodies are cut off."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_REFUSED = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """As uvicorn's own, with bounds it lacks.

    From the first byte (or the connection), headers must be complete within `request_timeout` seconds; a body
    must then bring at least `slowest` bytes in every such period until it is complete. The clock stands still
    while the application itself holds the reading back. Subclass to change the bounds.
    """

    request_timeout = 10.0
    slowest = 10 << 10
    largest_headers = 64 << 10

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_headers = True
        self._received = 0
        self._watch: asyncio.TimerHandle | None = None
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._watch is None and not self._awaiting_answer():
            self._arm()
        self._received += len(data)
        super().data_received(data)
        if self._in_headers and self._watch is not None and self._received > self.largest_headers:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        if self._watch is None:
            self._arm()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._disarm()

    def _awaiting_answer(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        self._received = 0
        self._watch = self.loop.call_later(self.request_timeout, self._overdue)

    def _disarm(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _overdue(self) -> None:
        if self.transport.is_closing():
            return
        moving = not self._in_headers and self._received >= self.slowest
        if moving or self.flow.read_paused:
            self._arm()
            return
        self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        self._disarm()
        if self.transport.is_closing():
            return
        if not self._awaiting_answer():
            self.transport.write(_REFUSED % status)
        self.transport.close()


def bounded(request_timeout: float, **bounds: Any) -> type[BoundedHttp]:
    """BoundedHttp with these bounds, as the class that uvicorn's `http=` wants."""
    return type("Bounded", (BoundedHttp,), {"request_timeout": request_timeout, **bounds})
