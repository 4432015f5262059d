"""Turns between tenants, and what leaves the line."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.serve.line import FairLine


def test_tenants_take_turns_whatever_each_has_waiting() -> None:
    line: FairLine[str] = FairLine()
    for n in range(4):
        line.add("greedy", f"g{n}")
    line.add("small", "s0")
    line.add("other", "o0")
    line.add("small", "s1")
    assert [line.take() for _ in range(7)] == ["g0", "s0", "o0", "g1", "s1", "g2", "g3"]
    assert not line
    with pytest.raises(KeyError):
        line.take()


def test_whoever_was_served_last_stands_behind_those_who_wait() -> None:
    line: FairLine[str] = FairLine()
    line.add("a", "a0")
    assert line.take() == "a0"
    line.add("b", "b0")
    line.add("a", "a1")
    assert line.peek() == "b0"
    assert [line.take(), line.take()] == ["b0", "a1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.booleans()), max_size=60))
def test_nothing_is_lost_or_served_twice_and_order_within_a_tenant_is_kept(
    moves: list[tuple[str, int, bool]],
) -> None:
    line: FairLine[tuple[str, int]] = FairLine()
    waiting: list[tuple[str, int]] = []
    for tenant, number, add in moves:
        item = (tenant, number)
        if add and item not in waiting:
            line.add(tenant, item)
            waiting.append(item)
        elif not add:
            assert line.remove(tenant, item) == (item in waiting)
            waiting = [one for one in waiting if one != item]
    assert len(line) == len(waiting)
    served = [line.take() for _ in waiting]
    for tenant in "abc":
        assert [i for i in served if i[0] == tenant] == [i for i in waiting if i[0] == tenant]


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=2))
def test_while_two_wait_neither_is_served_twice_in_a_row(counts: dict[str, int]) -> None:
    line: FairLine[tuple[str, int]] = FairLine()
    for tenant, count in counts.items():
        for n in range(count):
            line.add(tenant, (tenant, n))
    left = Counter(counts)
    before = ""
    while line:
        tenant, _ = line.take()
        assert tenant != before or sum(n > 0 for n in left.values()) == 1
        left[tenant] -= 1
        before = tenant
