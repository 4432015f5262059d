"""Turns feedback into what models learn from: preference pairs, and conversations that people approved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from llmo.types import Feedback, canonical

Row = dict[str, Any]


def pairs(feedback: Iterable[Feedback]) -> list[Row]:
    """`{"messages", "chosen", "rejected"}`, the last two lists of one answer to `messages`; none twice.

    A comparison prefers one answer to the other, a correction the better text to what was said, and of ratings each
    good answer is preferred to a bad one to the same messages. Where somebody changed their mind, the last word counts.
    """
    found: list[Row] = []
    rated: dict[str, dict[str, list[Feedback]]] = defaultdict(lambda: {"good": [], "bad": []})
    for entry in _last_words(feedback):
        first, *others = (answer["content"] for answer in entry.answers)
        if entry.kind == "rating":
            rated[canonical(entry.messages)][entry.rating or "bad"].append(entry)
        if entry.rating == "first" and entry.kind == "comparison":
            found.append(_pair(entry, first, others[0]))
        elif entry.rating == "second" and entry.kind == "comparison":
            found.append(_pair(entry, others[0], first))
        if entry.correction is not None:
            found += [_pair(entry, entry.correction, answer) for answer in (first, *others)]
    for words in rated.values():
        good, bad = words["good"], words["bad"]
        for index in range(max(len(good), len(bad)) if good and bad else 0):
            chosen, rejected = good[index % len(good)], bad[index % len(bad)]
            found.append(_pair(chosen, chosen.answers[0]["content"], rejected.answers[0]["content"]))
    return _distinct(row for row in found if _said(row["chosen"]) and row["chosen"] != row["rejected"])


def conversations(feedback: Iterable[Feedback]) -> list[Row]:
    """`{"messages"}`: each conversation with the answer that somebody called good, or with their correction."""
    found = []
    for entry in _last_words(feedback):
        if entry.correction is not None:
            found.append(_whole(entry, entry.correction))
        elif entry.kind == "rating" and entry.rating == "good":
            found.append(_whole(entry, entry.answers[0]["content"]))
    return _distinct(row for row in found if _said(row["messages"][-1:]))


def _last_words(feedback: Iterable[Feedback]) -> list[Feedback]:
    """Of what one person said of the same answers in the same way, the last."""
    last: dict[str, Feedback] = {}
    for entry in feedback:
        said = [answer["content"] for answer in entry.answers]
        last[canonical([entry.owner, entry.kind, entry.messages, said])] = entry
    return sorted(last.values(), key=lambda entry: entry.id)


def _pair(entry: Feedback, chosen: str, rejected: str) -> Row:
    return {"messages": list(entry.messages), "chosen": _answer(chosen), "rejected": _answer(rejected)}


def _whole(entry: Feedback, answer: str) -> Row:
    return {"messages": [*entry.messages, *_answer(answer)]}


def _answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _said(messages: list[dict[str, str]]) -> bool:
    """Whether there is an answer to learn."""
    return any(message["content"].strip() for message in messages)


def _distinct(rows: Iterable[Row]) -> list[Row]:
    return list({canonical(row): row for row in rows}.values())
