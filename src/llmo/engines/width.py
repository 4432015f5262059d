"""How many answers an engine writes at once and on how many threads: what was measured, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STREAMS = 16  # where nothing was measured
ENOUGH = 0.95  # of the best throughput: more streams would only make each answer slower


@dataclass(frozen=True, slots=True)
class Width:
    streams: int
    threads: int


def choose(measured: Sequence[Mapping[str, Any]], cores: int) -> Width:
    """For a replica with so many cores; `measured` rows are `{"threads", "streams", "tokens_per_second"}`.

    Of the thread counts that it has cores for, the one that is best for a single answer and for many at once (the
    geometric mean of both); then the fewest streams with enough of its best throughput. A replica keeps cores idle only
    where a measurement says that they do not help.
    """
    speeds: dict[int, dict[int, float]] = {}
    for row in measured:
        if row["threads"] <= cores:
            speeds.setdefault(row["threads"], {})[row["streams"]] = row["tokens_per_second"]
    if not speeds:
        return Width(STREAMS, cores)
    best = {threads: max(found.values()) for threads, found in speeds.items()}
    threads = max(speeds, key=lambda count: math.sqrt(speeds[count][min(speeds[count])] * best[count]))
    streams = min(count for count, speed in speeds[threads].items() if speed >= ENOUGH * best[threads])
    return Width(streams, threads if threads < max(speeds) else cores)
