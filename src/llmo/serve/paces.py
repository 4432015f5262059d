"""What a replica that generates measures of itself: how soon answers begin, how fast they grow, what is shared."""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import Any

FIRST_TOKEN_EDGES = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
_NEWEST = 0.1  # weight of the newest measurement in those of late
_BEFORE_MEASURED = 1.0  # seconds


class Paces:
    """Counters since the start, and speeds of late; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {
            "prompts": 0,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "completion_tokens": 0,
            "steps": 0,
            "answered": 0,
            "failed": 0,
            "cancelled": 0,
        }
        self._engine_seconds = 0.0
        self._token_seconds = 0.0  # of late: seconds of the engine for a token
        self._prompt_seconds = 0.0  # of late: seconds of the engine for a whole answer
        self._since_prompt = 0.0
        self._first_tokens = [0] * (len(FIRST_TOKEN_EDGES) + 1)
        self._first_token_seconds = 0.0

    def stepped(self, tokens: int, finished: int, seconds: float) -> None:
        """One step of the engine took `seconds`, wrote `tokens` and finished so many answers."""
        with self._lock:
            self._counts["steps"] += 1
            self._counts["completion_tokens"] += tokens
            self._engine_seconds += seconds
            self._since_prompt += seconds
            if tokens:
                self._token_seconds = _of_late(self._token_seconds, seconds / tokens)
            if finished:
                self._prompt_seconds = _of_late(self._prompt_seconds, self._since_prompt / finished)
                self._since_prompt = 0.0

    def began(self, prompt_tokens: int, cached: int, seconds: float) -> None:
        """An answer began `seconds` after it was asked for; `cached` tokens of its prompt were not computed."""
        with self._lock:
            self._counts["prompts"] += 1
            self._counts["prompt_tokens"] += prompt_tokens
            self._counts["cached_tokens"] += cached
            self._first_tokens[bisect_left(FIRST_TOKEN_EDGES, seconds)] += 1
            self._first_token_seconds += seconds

    def ended(self, how: str) -> None:
        """One call ended: "answered", "failed" or "cancelled"."""
        with self._lock:
            self._counts[how] += 1

    def seconds_for(self, prompts: int) -> float:
        """How long that many prompts will take, as they went of late."""
        with self._lock:
            return prompts * self._prompt_seconds if self._prompt_seconds > 0 else _BEFORE_MEASURED

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return {
                **self._counts,
                "engine_seconds": self._engine_seconds,
                "tokens_per_second": round(1.0 / self._token_seconds, 3) if self._token_seconds else 0.0,
                "first_tokens": list(self._first_tokens),
                "first_token_seconds": self._first_token_seconds,
            }


def _of_late(before: float, newest: float) -> float:
    return newest if before == 0 else before + _NEWEST * (newest - before)
