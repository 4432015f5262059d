"""Dynamic batching: which of the waiting texts the engine runs next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmo.engines.base import Engine
from llmo.types import Device


@dataclass(eq=False, slots=True)
class Item:
    """One encoded text. `tokens` is its length, `deadline` the time after which nobody wants it any more."""

    tokens: int
    deadline: float = math.inf
    payload: Any = None
    waiting: bool = False  # the batcher's mark: added, and neither taken nor cancelled


class Batcher:
    """Holds the waiting items in order of arrival and cuts batches from them; no clock, no threads, no waiting.

    A batch is padded to its longest item and holds at most `max_batch_tokens` padded tokens (a single item may
    be longer) and `max_items` items. The oldest item is in the next batch, so none starves. Others join it, the
    nearest in length first, as long as each adds at most `slack_tokens` of padding. Best is about half of what a
    run of its own costs beyond its tokens (simulated on mixed lengths): more padding costs more than it saves,
    because a text of a fitting length often comes while this batch runs. With `slack_tokens` None the engine pads
    nothing: batches hold what came first.
    """

    def __init__(self, max_batch_tokens: int, *, max_items: int = 64, slack_tokens: int | None = 8) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_items = max_items
        self.slack_tokens = slack_tokens
        self._items: list[Item] = []
        self._live = 0

    def __len__(self) -> int:
        """Items that wait."""
        return self._live

    def add(self, item: Item) -> None:
        item.waiting = True
        self._items.append(item)
        self._live += 1

    def cancel(self, item: Item) -> None:
        """Drop an item that still waits; its place is free at once. Does nothing for one already taken."""
        if item.waiting:
            item.waiting = False
            self._live -= 1

    def take(self, now: float) -> tuple[list[Item], list[Item]]:
        """The next batch, and the items whose deadline has passed; neither waits here any more.

        The batch is empty only when nothing that is still wanted waits.
        """
        live = [i for i in self._items if i.waiting]
        wanted = [i for i in live if i.deadline > now]
        expired = [i for i in live if i.deadline <= now]
        batch: list[Item] = []
        if wanted:
            batch = self._first(wanted) if self.slack_tokens is None else self._around(wanted, self.slack_tokens)
        for item in (*batch, *expired):
            item.waiting = False
        self._items = [i for i in wanted if i.waiting]
        self._live = len(self._items)
        return batch, expired

    def _first(self, wanted: Sequence[Item]) -> list[Item]:
        tokens = 0
        for count, item in enumerate(wanted[: self.max_items]):
            tokens += item.tokens
            if tokens > self.max_batch_tokens and count:
                return list(wanted[:count])
        return list(wanted[: self.max_items])

    def _around(self, wanted: Sequence[Item], slack_tokens: int) -> list[Item]:
        """Grow a window over the items in order of length, from the oldest one to its cheapest neighbours."""
        oldest = wanted[0]
        ordered = sorted(wanted, key=lambda i: i.tokens)  # stable: of equal lengths the older comes first
        low = high = next(n for n, i in enumerate(ordered) if i is oldest)
        while high - low + 1 < self.max_items:
            count, longest = high - low + 1, ordered[high].tokens
            shorter = longest - ordered[low - 1].tokens if low > 0 else math.inf
            longer = count * (ordered[high + 1].tokens - longest) if high + 1 < len(ordered) else math.inf
            if longer < shorter and (count + 1) * ordered[high + 1].tokens > self.max_batch_tokens:
                longer = math.inf
            if min(shorter, longer) > slack_tokens:
                break
            if longer < shorter:
                high += 1
            elif (count + 1) * longest <= self.max_batch_tokens:
                low -= 1
            else:
                break
        return list(ordered[low : high + 1])


def batcher_for(engine: Engine, device: Device, max_batch_tokens: int) -> Batcher:
    """What suits an engine on a device, within a bound.

    Measured with MiniLM on one and two CPU cores: a run costs as much as 12 to 17 tokens beyond its own, and
    past 1024 tokens a batch leaves the caches and gets 10 to 15% slower. A GPU has room for thousands.
    """
    if not getattr(engine, "pads", True):
        return Batcher(min(max_batch_tokens, 1024), slack_tokens=None)
    if device.kind == "cpu":
        return Batcher(min(max_batch_tokens, 1024))
    return Batcher(max_batch_tokens, max_items=256, slack_tokens=512)
