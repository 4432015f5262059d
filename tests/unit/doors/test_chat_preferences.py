"""Feedback as training rows: who is preferred to whom, whose last word counts, and what is no lesson at all."""

from __future__ import annotations

from itertools import count
from typing import Any

from llmo.doors.preferences import conversations, pairs
from llmo.types import Feedback

ASKED = [{"role": "user", "content": "Size?"}]
numbers = count(1)


def said(kind: str, *answers: str, rating: str | None = None, owner: str = "ann", **more: Any) -> Feedback:
    return Feedback(
        id=next(numbers),
        at=0.0,
        endpoint="chat",
        kind=kind,
        messages=more.pop("messages", ASKED),
        answers=[{"endpoint": "chat", "model": "m@1", "digest": "", "content": answer} for answer in answers],
        rating=rating,
        owner=owner,
        **more,
    )


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def preferred(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_a_comparison_and_a_correction_prefer_one_text_to_another() -> None:
    feedback = [
        said("comparison", "a", "b", rating="first"),
        said("comparison", "c", "d", rating="second"),
        said("comparison", "e", "f", rating="tie"),
        said("correction", "g", correction="better"),
        said("comparison", "h", "i", rating="tie", correction="both wrong"),
    ]
    assert preferred(pairs(feedback)) == [
        ("a", "b"), ("d", "c"), ("better", "g"), ("both wrong", "h"), ("both wrong", "i"),
    ]  # fmt: skip
    assert pairs(feedback)[0] == {"messages": ASKED, "chosen": answer("a"), "rejected": answer("b")}


def test_good_answers_are_preferred_to_bad_ones_to_the_same_messages_only() -> None:
    other = [{"role": "user", "content": "Colour?"}]
    feedback = [
        said("rating", "12", rating="good"),
        said("rating", "a lot", rating="bad"),
        said("rating", "none", rating="bad"),
        said("rating", "red", rating="good", messages=other),
    ]
    assert preferred(pairs(feedback)) == [("12", "a lot"), ("12", "none")]


def test_the_last_word_of_a_person_counts_and_others_keep_theirs() -> None:
    feedback = [
        said("rating", "12", rating="bad"),
        said("rating", "12", rating="good"),
        said("rating", "13", rating="bad"),
        said("comparison", "a", "b", rating="first"),
        said("comparison", "a", "b", rating="second"),
        said("comparison", "a", "b", rating="first", owner="bob"),
    ]
    assert sorted(preferred(pairs(feedback))) == [("12", "13"), ("a", "b"), ("b", "a")]


def test_what_teaches_nothing_is_left_out() -> None:
    feedback = [
        said("comparison", "same", "same", rating="first"),
        said("correction", "same", correction="same"),
        said("comparison", " ", "b", rating="first"),
        said("rating", "x", rating="good"),
        said("rating", "x", rating="bad", owner="bob"),
        said("correction", "g", correction="better"),
        said("correction", "g", correction="better", owner="bob"),
    ]
    assert preferred(pairs(feedback)) == [("better", "g")]


def test_conversations_are_those_that_were_approved_or_mended() -> None:
    feedback = [
        said("rating", "12", rating="good"),
        said("rating", "13", rating="bad"),
        said("rating", "", rating="good"),
        said("correction", "14", correction="15"),
        said("comparison", "a", "b", rating="first"),
    ]
    assert conversations(feedback) == [{"messages": [*ASKED, *answer("12")]}, {"messages": [*ASKED, *answer("15")]}]
