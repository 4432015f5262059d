"""What a replica measures of itself: how fast it is, what its batches look like, how long calls took."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

BATCH_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)
_NEWEST = 0.2  # weight of the newest batch in the measured rate
_BEFORE_MEASURED = 1.0  # seconds


class Gauge:
    """Counters since the start, and the rate of late; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rate = 0.0  # texts a second while the engine runs
        self._counts = {"texts": 0, "batches": 0, "tokens": 0, "padded_tokens": 0, "answered": 0, "failed": 0}
        self._batch_sizes = [0] * (len(BATCH_EDGES) + 1)
        self._engine_seconds = 0.0
        self._latency_seconds = 0.0

    def ran(self, lengths: Sequence[int], seconds: float, *, pads: bool = True) -> None:
        """One batch of texts with these token counts took `seconds` in an engine that pads them or does not."""
        size = len(lengths)
        with self._lock:
            self._counts["texts"] += size
            self._counts["batches"] += 1
            self._counts["tokens"] += sum(lengths)
            self._counts["padded_tokens"] += size * max(lengths) if pads else sum(lengths)
            self._batch_sizes[bisect_left(BATCH_EDGES, size)] += 1
            self._engine_seconds += seconds
            rate = size / max(seconds, 1e-6)
            self._rate = rate if self._rate == 0 else self._rate + _NEWEST * (rate - self._rate)

    def ended(self, seconds: float, answered: bool) -> None:
        """One call ended `seconds` after it came."""
        with self._lock:
            self._counts["answered" if answered else "failed"] += 1
            if answered:
                self._latency_seconds += seconds

    def seconds_for(self, texts: int) -> float:
        """How long that many texts will take at the measured rate."""
        with self._lock:
            return texts / self._rate if self._rate > 0 else _BEFORE_MEASURED

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return {
                **self._counts,
                "texts_per_second": round(self._rate, 3),
                "engine_seconds": self._engine_seconds,
                "latency_seconds": self._latency_seconds,
                "batch_sizes": list(self._batch_sizes),
            }
