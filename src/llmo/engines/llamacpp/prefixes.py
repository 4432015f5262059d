"""Streams that have ended but whose keys and values are kept: the next prompt of the same tenant starts after them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
# llama.cpp looks at every cell in use for every token, its stream's or not: 8,000 kept tokens made a small model a
# quarter slower. The newest is kept however long it is.
MOST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Held:
    """A stream number of the cache, whose tokens it holds, and for whom."""

    stream: int
    tenant: str
    tokens: Ids


class Prefixes:
    """The kept ones, the one longest unused first. It only keeps the books: the cache's owner frees what it returns."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[int, Held] = {}

    @property
    def tokens(self) -> int:
        return sum(len(held.tokens) for held in self._kept.values())

    def keep(self, held: Held) -> list[int]:
        """The stream numbers that are now free: what the new one holds as well, and the oldest above the limit."""
        same = [
            k for k in self._kept.values() if k.tenant == held.tenant and common(k.tokens, held.tokens) == len(k.tokens)
        ]
        for old in same:
            del self._kept[old.stream]
        self._kept[held.stream] = held
        freed = [old.stream for old in same]
        while len(self._kept) > 1 and (len(self._kept) > self._most or self.tokens > MOST_TOKENS):
            freed.append(self.oldest())
        return freed

    def oldest(self) -> int:
        """Let go of the longest unused; its number is to be freed. KeyError when nothing is kept."""
        stream = next(iter(self._kept), None)
        if stream is None:
            raise KeyError("nothing is kept")
        del self._kept[stream]
        return stream

    def best(self, tenant: str, tokens: Ids, running: Iterable[Held] = ()) -> tuple[int, int]:
        """Who holds the longest beginning of `tokens` among the tenant's own, kept or running: (number, length)."""
        mine = (held for held in (*self._kept.values(), *running) if held.tenant == tenant)
        number, length = max(((h.stream, common(h.tokens, tokens)) for h in mine), key=lambda f: f[1], default=(-1, 0))
        if number in self._kept:
            self._kept[number] = self._kept.pop(number)  # used just now
        return number, length


def common(a: Ids, b: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if different.size else size
