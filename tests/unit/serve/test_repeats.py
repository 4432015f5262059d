"""Repeated texts: what is kept stays within its bound, and the longest unasked goes first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmo.serve.repeats import Repeats

ROOM = 1 << 16


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6000)), max_size=120))
def test_it_never_holds_more_than_its_room_and_what_it_says_is_what_was_put(asked: list[tuple[int, int]]) -> None:
    repeats, newest = Repeats(ROOM), dict[int, bytes]()
    for number, size in asked:
        answer = bytes([number]) * size
        before = repeats.get((number,))
        assert before is None or before == newest[number]
        repeats.put((number,), answer)
        newest[number] = answer
        assert repeats.snapshot()["repeats_bytes"] <= ROOM
        if size < ROOM // 16 - 500:
            assert repeats.get((number,)) == answer


def test_the_longest_unasked_makes_room() -> None:
    repeats = Repeats(ROOM)
    count = 0
    while repeats.snapshot()["repeats_bytes"] + 2500 < ROOM:
        repeats.put((count,), b"x" * 2000)
        count += 1
    assert repeats.get((0,)) is not None  # asked for again: it stays
    for more in range(3):
        repeats.put((count + more,), b"x" * 2000)
    assert repeats.get((0,)) is not None
    assert repeats.get((1,)) is None


def test_one_large_answer_does_not_push_out_the_others() -> None:
    repeats = Repeats(ROOM)
    repeats.put(("small",), b"x")
    repeats.put(("large",), b"x" * ROOM)
    assert repeats.get(("small",)) == b"x"
    assert repeats.get(("large",)) is None


def test_without_room_there_is_nothing() -> None:
    assert not Repeats(0)
