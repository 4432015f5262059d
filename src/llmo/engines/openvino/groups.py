"""How a batch is cut into parts that are each padded on their own: few shapes, little padding, work for every stream.

OpenVINO prepares its kernels anew for every shape and keeps what it prepared, so lengths are rounded up to few values,
and a part has a power of two of texts and none that is padding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

_RUN = 10  # what a run costs beyond its tokens, in tokens: measured with MiniLM at int8 (7) and bf16 (12)
_MOST_ROWS, _MOST_TOKENS = 16, 512  # beyond them a run is no cheaper a token, and streams wait for the last part
_STEPS = ((64, 8), (128, 16), (512, 32))  # lengths up to the first number are multiples of the second
_LONG_STEP = 64


def rounded(length: int, limit: int | None) -> int:
    """The length that a text is padded to; `limit` is the most that the model reads."""
    step = next((step for most, step in _STEPS if length <= most), _LONG_STEP)
    up = -(-length // step) * step
    return up if limit is None else max(length, min(up, limit))


def cut(lengths: Sequence[int], streams: int, limit: int | None) -> list[list[int]]:
    """The numbers of the texts of each part, the most costly part first; texts of like length are together.

    Of all ways to cut the texts, sorted by length, into parts of 1, 2, 4, 8 or 16, the one with the least to compute,
    with a part for every stream as far as there are texts.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    padded = [rounded(lengths[number], limit) for number in order]
    most = max(1, min(_MOST_ROWS, len(order) // streams))
    costs, taken = [0.0], [0]
    for end in range(1, len(order) + 1):
        best, best_rows = inf, 1
        rows = 1
        while rows <= min(most, end):
            length = padded[end - rows]
            if rows > 1 and rows * length > _MOST_TOKENS:
                break
            cost = costs[end - rows] + _RUN + rows * length
            if cost <= best:
                best, best_rows = cost, rows
            rows *= 2
        costs.append(best)
        taken.append(best_rows)
    parts = []
    end = len(order)
    while end:
        parts.append(order[end - taken[end] : end])
        end -= taken[end]
    return sorted(parts, key=lambda part: -len(part) * lengths[part[0]])
