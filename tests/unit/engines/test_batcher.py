"""Batches hold what they may, waste little, and leave nobody behind, whatever comes."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmo.engines.batcher import Batcher, Item

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=200)


def filled(lengths: list[int], **options: Any) -> tuple[Batcher, list[Item]]:
    batcher = Batcher(options.pop("max_batch_tokens", 1024), **options)
    items = [Item(n) for n in lengths]
    for item in items:
        batcher.add(item)
    return batcher, items


@given(LENGTHS, st.integers(16, 4096), st.integers(1, 64), st.integers(0, 256))
@settings(max_examples=200, deadline=None)
def test_every_item_runs_once_within_the_bounds_and_the_oldest_first(
    lengths: list[int], max_tokens: int, max_items: int, overhead: int
) -> None:
    batcher, items = filled(lengths, max_batch_tokens=max_tokens, max_items=max_items, slack_tokens=overhead)
    left = list(items)
    while len(batcher):
        batch, expired = batcher.take(0.0)
        assert not expired
        assert left[0] in batch, "the oldest is in the next batch"
        assert len(batch) <= max_items
        assert len(batch) == 1 or len(batch) * max(i.tokens for i in batch) <= max_tokens
        for item in batch:
            left.remove(item)  # raises when an item comes twice
        assert len(batcher) == len(left)
    assert left == []


@given(LENGTHS, st.integers(16, 4096), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_where_nothing_is_padded_they_run_as_they_came(lengths: list[int], max_tokens: int, max_items: int) -> None:
    batcher, items = filled(lengths, max_batch_tokens=max_tokens, max_items=max_items, slack_tokens=None)
    left = list(items)
    while len(batcher):
        batch, _ = batcher.take(0.0)
        assert batch == left[: len(batch)]
        assert len(batch) <= max_items
        assert len(batch) == 1 or sum(item.tokens for item in batch) <= max_tokens
        left = left[len(batch) :]
        more = len(batch) < max_items and left
        assert not more or sum(item.tokens for item in batch) + left[0].tokens > max_tokens, "no fuller one would do"
    assert left == []


@given(LENGTHS, st.integers(1, 128))
@settings(max_examples=200, deadline=None)
def test_no_batch_costs_more_than_running_its_texts_apart(lengths: list[int], overhead: int) -> None:
    batcher, _ = filled(lengths, max_batch_tokens=4096, slack_tokens=overhead)
    while len(batcher):
        batch, _ = batcher.take(0.0)
        sizes = [i.tokens for i in batch]
        together = overhead + len(sizes) * max(sizes)
        assert together <= sum(sizes) + overhead * len(sizes)


@given(st.lists(st.tuples(st.integers(1, 64), st.sampled_from(["keep", "cancel", "late"])), min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_late_ones_are_handed_back_and_cancelled_ones_vanish(plan: list[tuple[int, str]]) -> None:
    batcher = Batcher(256)
    items = [Item(tokens, deadline=5.0 if fate == "late" else 100.0, payload=fate) for tokens, fate in plan]
    for item in items:
        batcher.add(item)
    for item in items:
        if item.payload == "cancel":
            batcher.cancel(item)
            batcher.cancel(item)
    assert len(batcher) == sum(fate != "cancel" for _, fate in plan)
    ran: list[Item] = []
    late: list[Item] = []
    while len(batcher):
        batch, expired = batcher.take(10.0)
        ran += batch
        late += expired
    assert {id(i) for i in ran} == {id(i) for i in items if i.payload == "keep"}
    assert {id(i) for i in late} == {id(i) for i in items if i.payload == "late"}


def test_equal_lengths_share_a_batch_up_to_its_tokens() -> None:
    batcher, items = filled([100] * 12, max_batch_tokens=1000)
    assert batcher.take(0.0)[0] == items[:10]
    assert batcher.take(0.0)[0] == items[10:]


def test_a_short_text_is_not_padded_to_a_long_one() -> None:
    batcher, items = filled([128, 8, 120, 10, 12], slack_tokens=8)
    assert {i.tokens for i in batcher.take(0.0)[0]} == {128, 120}
    assert batcher.take(0.0)[0] == [items[1], items[3], items[4]]


def test_one_text_longer_than_a_batch_still_runs_alone() -> None:
    batcher, items = filled([5000, 10], max_batch_tokens=1024)
    assert batcher.take(0.0)[0] == [items[0]]


def test_taken_items_cannot_be_cancelled() -> None:
    batcher, items = filled([10, 500])
    batch, _ = batcher.take(0.0)
    assert batch == [items[0]]
    batcher.cancel(items[0])
    assert len(batcher) == 1


def test_nothing_waits_nothing_comes() -> None:
    assert Batcher(100).take(0.0) == ([], [])
