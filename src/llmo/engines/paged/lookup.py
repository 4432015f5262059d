"""Prompt lookup: guesses an answer's next tokens from what followed the same words before, where that saves time.

A step over more tokens takes longer, and a guess that is wrong was computed for nothing. So the share of right guesses
is counted for every stream (also of those that are only made and not computed, which costs nothing), what a row costs
is measured at every step, and a guess is computed when its chance is worth more than its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

KEY = 3  # tokens that must be the same
MOST = 15  # guesses of one stream in one step
TOGETHER = 128  # guesses of all: each has a row of the vocabulary's size to be read
_FIRST_CHANCE = 0.3  # before a stream has shown how it goes
_NEWEST_GUESS = 0.2  # weight of the newest guess in a stream's share
_NEWEST_STEP = 0.05  # weight of the newest step in what a row costs
_BESIDE_ROWS = 7.0  # what a step costs beside its rows, in rows, as long as steps did not differ
_DOUBT = 1.0  # how far that counts against what was measured, in squared rows
_OUTLIER = 3.0  # a step that takes so many times as long as it should was disturbed
_LEAST_GAIN = 1.3  # by how much a step must become faster, as far as can be told


class Lookup:
    """Guesses for one stream, over its own list of `ids`; `grew` is to be called for every token it grows by."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        places = zip(zip(*(ids[i:] for i in range(KEY)), strict=False), range(KEY, len(ids)), strict=False)
        self._after: dict[tuple[int, ...], int] = dict(places)  # what follows these tokens, where they stood last
        self._next: int | None = None
        self._chance = _FIRST_CHANCE
        self._find()

    @property
    def chance(self) -> float:
        """Of a guess to be right, if those before it are; 0 where there is none to make."""
        return 0.0 if self._next is None else self._chance

    def grew(self) -> None:
        if self._next is not None:
            right = self._ids[self._next] == self._ids[-1]
            self._chance += _NEWEST_GUESS * (right - self._chance)
            self._next = self._next + 1 if right else None
        self._find()

    def guesses(self, count: int) -> list[int]:
        """None where there is no chance. What reaches its own end goes round."""
        if self._next is None:
            return []
        start, length = self._next, len(self._ids) - self._next
        return [self._ids[start + i % length] for i in range(count)]

    def _find(self) -> None:
        """Go on where the guesses were right, else where the last tokens stood before."""
        key = tuple(self._ids[-KEY:])
        if self._next is None:
            self._next = self._after.get(key)
        self._after[key] = len(self._ids)


class Costs:
    """What steps of late took, as a straight line over their rows."""

    def __init__(self) -> None:
        self._rows = self._seconds = self._spread = self._both = 0.0

    def saw(self, rows: int, seconds: float) -> None:
        if _OUTLIER * seconds < self.of(rows) or not self._seconds:  # those before were disturbed, or are none
            self._rows, self._seconds, self._spread, self._both = rows, seconds, 0.0, 0.0
        more, longer = rows - self._rows, min(seconds, _OUTLIER * self.of(rows)) - self._seconds
        self._rows += _NEWEST_STEP * more
        self._seconds += _NEWEST_STEP * longer
        self._spread = (1 - _NEWEST_STEP) * (self._spread + _NEWEST_STEP * more * more)
        self._both = (1 - _NEWEST_STEP) * (self._both + _NEWEST_STEP * more * longer)

    @property
    def row(self) -> float:
        """Seconds for one row more."""
        supposed = self._seconds / (self._rows + _BESIDE_ROWS)
        return max(0.0, (self._both + _DOUBT * supposed) / (self._spread + _DOUBT))

    def of(self, rows: int) -> float:
        """Seconds of a step."""
        return max(self._seconds + self.row * (rows - self._rows), self.row * rows)


def worth(chances: Sequence[float], rows: int, costs: Costs) -> list[int]:
    """How many guesses to compute for streams of these chances in a step of `rows`.

    A row is weighed by how much faster its own stream becomes against how much slower it makes all: so one stream that
    repeats itself does not hold up seven that do not. A step that would gain little is left as it is.
    """
    counts = [0] * len(chances)
    row, plain = costs.row, costs.of(rows)
    seconds, tokens = plain, float(rows)
    offers = [offer for stream, chance in enumerate(chances) for offer in _offers(chance, stream)]
    for faster, right, stream in sorted(offers, reverse=True)[:TOGETHER]:
        if faster * seconds <= row * rows:
            break
        counts[stream] += 1
        tokens += right
        seconds += row
    return counts if tokens * plain > _LEAST_GAIN * rows * seconds else [0] * len(chances)


def _offers(chance: float, stream: int) -> Iterator[tuple[float, float, int]]:
    """For each guess more: the share by which the stream becomes faster, the chance that it is right, the stream."""
    tokens, right = 1.0, chance
    for _ in range(MOST if chance else 0):
        yield right / tokens, right, stream
        tokens += right
        right *= chance
