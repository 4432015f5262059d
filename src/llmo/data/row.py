"""One row on its way from the source to the data set, and the reasons for which it may be dropped."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from llmo.data.conversation import Conversation

SPLITS = ("train", "dev", "test")


class Drop(enum.StrEnum):
    """Why a row is not in the data set."""

    EMPTY = "empty"
    NO_LABEL = "no_label"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    LEAK = "leak"
    CONFLICT = "conflict"
    NO_ANSWER = "no_answer"
    EMPTY_CONTENT = "empty_content"
    UNKNOWN_ROLE = "unknown_role"
    BROKEN_TURNS = "broken_turns"
    BROKEN_TOOLS = "broken_tools"
    NOT_TEXT = "not_text"
    SAME_ANSWERS = "same_answers"
    PROMPT_LEAK = "prompt_leak"
    INCOMPLETE = "incomplete"
    ALONE = "one_interaction"


class Flawed(Exception):
    """Raised while a row is read or cleaned: it cannot be learnt from, and the others can."""

    def __init__(self, reason: Drop, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class Span:
    """An entity: characters `start` to `end` (code points, end excluded) of its row's text, or of its `pair` where the
    row is a question and that its context."""

    start: int
    end: int
    label: str


@dataclass(slots=True)
class Row:
    """A text with what is known of it.

    `labels` are the classes of the text, or the entity types of its spans; None when the source gives none.
    `place` is where the row came from (`file:line`); `group` names the document, or the question, that must not be
    divided. The text of a `conversation` is its transcript. Of two texts the second is `pair`: the context of a
    question, whose right `answers` begin with that of `spans`; or what belongs to the text, where `negative` does not,
    or `value` says how well. A `value` of a text alone is what is to be learnt. `flaw` is the reason for which the row
    must be dropped.
    """

    text: str
    labels: tuple[str, ...] | None
    place: str
    id: str = ""
    split: str | None = None
    spans: list[Span] = field(default_factory=list)
    group: str | None = None
    conversation: Conversation | None = None
    pair: str | None = None
    negative: str | None = None
    answers: list[str] | None = None
    value: float | None = None
    flaw: tuple[Drop, str] | None = None


@dataclass(slots=True)
class Dropped:
    """A row that was left out, and why."""

    row: Row
    reason: Drop
    detail: str = ""
