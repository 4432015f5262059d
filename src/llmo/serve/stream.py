"""The gateway's end of one generation: the frames of a replica as they come, bounded while nobody takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from llmo.errors import DeadlineError

UNREAD_BYTES = 1 << 20  # of frames that wait for a client; one that lets more pile up is cut off


class Stream:
    """Frames in their order: `{"delta": [...]}` any number of times, then `{"done": {...}}`.

    `take_back` is called when the answer is no longer wanted while the replica still writes it; `over` once it is
    out of the replica's hands, however that came. Nothing here waits for a slow client but its own frames: the
    replica's slot is free as soon as the answer is written or the client is cut off.
    """

    def __init__(self, take_back: Callable[[], None], over: Callable[[], None]) -> None:
        self._take_back = take_back
        self._over: Callable[[], None] | None = over
        self._frames: deque[tuple[Mapping[str, Any], int]] = deque()
        self._unread = 0
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, frame: Mapping[str, Any], size: int) -> None:
        """A frame of `size` bytes came."""
        if self._ended:
            return
        if self._unread > UNREAD_BYTES:
            self._take_back()
            self.fail(DeadlineError("the client reads more slowly than the answer is written", hint="read faster"))
            return
        self._frames.append((frame, size))
        self._unread += size
        self._arrived.set()
        if "done" in frame:
            self._end()

    def fail(self, error: Exception) -> None:
        """Nothing more comes, for this reason; the frames that came before are still there to take."""
        if not self._ended:
            self._error = error
            self._arrived.set()
            self._end()

    async def begun(self) -> None:
        """Wait for the first frame; raises the error that came instead of it."""
        await self._arrived.wait()
        if not self._frames and self._error is not None:
            raise self._error

    async def next(self) -> Mapping[str, Any]:
        """The next frame. Raises the error that ended the stream, once the frames before it are taken."""
        while not self._frames:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        frame, size = self._frames.popleft()
        self._unread -= size
        return frame

    def close(self) -> None:
        """Nobody wants the rest: the replica is told, unless it has said everything."""
        if not self._ended:
            self._take_back()
            self._end()

    def _end(self) -> None:
        self._ended = True
        if self._over is not None:
            self._over()
            self._over = None
