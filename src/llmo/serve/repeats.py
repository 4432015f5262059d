"""Answers to texts that were asked before: the same tenant's alone, within a bound, the longest unasked make room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from sys import getsizeof

_OVERHEAD = 400  # bytes of an entry beside its text and its answer


class Repeats:
    """`room` bytes at most; none at all keeps nothing. A key names all that an answer depends on, and whose it is: who
    asks learns nothing of what others asked, not even by the time it takes. Safe from any thread."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Hashable, ...], bytes] = OrderedDict()
        self._bytes = 0
        self._found = 0

    def __bool__(self) -> bool:
        return self._room > 0

    def get(self, key: tuple[Hashable, ...]) -> bytes | None:
        with self._lock:
            answer = self._kept.get(key)
            if answer is not None:
                self._kept.move_to_end(key)
                self._found += 1
            return answer

    def put(self, key: tuple[Hashable, ...], answer: bytes) -> None:
        """Keep an answer, unless it alone takes a good part of the room."""
        size = _size(key, answer)
        with self._lock:
            before = self._kept.pop(key, None)
            self._bytes -= _size(key, before) if before is not None else 0
            if size > self._room // 16:
                return
            self._bytes += size
            self._kept[key] = answer
            while self._bytes > self._room:
                oldest, gone = self._kept.popitem(last=False)
                self._bytes -= _size(oldest, gone)

    def snapshot(self) -> dict[str, int]:
        """`repeated`: how many texts were answered from here; `repeats_bytes`: what it holds."""
        with self._lock:
            return {"repeated": self._found, "repeats_bytes": self._bytes}


def _size(key: tuple[Hashable, ...], answer: bytes) -> int:
    return _OVERHEAD + len(answer) + sum(getsizeof(part) for part in key)
