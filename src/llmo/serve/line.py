"""The waiting line of prompts: who comes next when several tenants want to be served."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class FairLine(Generic[T]):
    """Each tenant's items in their order of arrival, and the tenants in turn: whoever has just been served goes to
    the end. So a tenant with a thousand prompts holds one with a single prompt up by one turn. No clock, no threads.
    """

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._tenants.values())

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def add(self, tenant: str, item: T) -> None:
        self._tenants.setdefault(tenant, OrderedDict())[item] = None

    def peek(self) -> T | None:
        """What `take` would return, or None when nothing waits."""
        for items in self._tenants.values():
            return next(iter(items))
        return None

    def take(self) -> T:
        """The next item; its tenant's turn comes again after all the others'. Raises KeyError when empty."""
        tenant, items = self._tenants.popitem(last=False)
        item, _ = items.popitem(last=False)
        if items:
            self._tenants[tenant] = items
        return item

    def remove(self, tenant: str, item: T) -> bool:
        """Take an item out of the line wherever it stands; False when it is not there."""
        items = self._tenants.get(tenant)
        if items is None or item not in items:
            return False
        del items[item]
        if not items:
            del self._tenants[tenant]
        return True
