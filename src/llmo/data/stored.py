"""What a data set keeps of a row, for each kind of target: Arrow columns and where their values come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from llmo.data.conversation import Conversation
from llmo.data.jsonvalue import dumped
from llmo.data.row import Row

_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("label", pa.string())])


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table: its name, its Arrow type, and its value in a row."""

    name: str
    type: pa.DataType
    value: Callable[[Row], Any]


def _of_conversation(name: str, part: Callable[[Conversation], Any]) -> Column:
    """A part of a conversation as JSON; null where a row has none of it."""

    def value(row: Row) -> str | None:
        found = part(row.conversation) if row.conversation else None
        return None if found is None else dumped(found)

    return Column(name, pa.string(), value)


_TEXT = (Column("id", pa.string(), lambda row: row.id), Column("text", pa.string(), lambda row: row.text))
ONE_LABEL = (*_TEXT, Column("label", pa.string(), lambda row: (row.labels or ("",))[0]))
SEQUENCES = (*_TEXT, Column("label", pa.string(), lambda row: row.labels[0] if row.labels else None))
LABELS = (*_TEXT, Column("labels", pa.list_(pa.string()), lambda row: list(row.labels or ())))
SPANS = (
    *_TEXT,
    Column(
        "spans",
        pa.list_(_SPAN),
        lambda row: [{"start": s.start, "end": s.end, "label": s.label} for s in row.spans],
    ),
)
_PAIR = (*_TEXT, Column("pair", pa.string(), lambda row: row.pair))
VALUE = (*_TEXT, Column("value", pa.float64(), lambda row: row.value))
PAIR = (
    *_PAIR,
    Column("negative", pa.string(), lambda row: row.negative),
    Column("score", pa.float64(), lambda row: row.value),
)
QUESTION = (
    *_PAIR,
    Column("answers", pa.list_(pa.string()), lambda row: row.answers),
    Column("answer_start", pa.int64(), lambda row: row.spans[0].start if row.spans else None),
)
MESSAGES = (
    *_TEXT,
    _of_conversation("messages", lambda conversation: conversation.messages),
    _of_conversation("tools", lambda conversation: conversation.tools),
)
PREFERENCE = (
    *MESSAGES,
    _of_conversation("chosen", lambda conversation: conversation.chosen),
    _of_conversation("rejected", lambda conversation: conversation.rejected),
)
