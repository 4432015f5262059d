"""Conversations to answer in, preferences between answers, and plain text to go on writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar

from llmo.data import checks, stored
from llmo.data.chat import groups, layouts, messages, read, turns
from llmo.data.clean import clean_block
from llmo.data.conversation import Conversation
from llmo.data.named import Columns
from llmo.data.prepared import Prepared
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Flawed, Row
from llmo.data.stored import Column
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec


class Conversational:
    """All parts of a source have one shape; each may have a layout of its own."""

    documents: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    def __init__(self, spec: DataSpec, task: TaskSpec) -> None:
        self._spec = spec
        self._layouts: dict[str, Columns] = {}
        self._shape = ""
        self.multi_label = False

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        columns = layouts.choose(names, head, self._spec, where)
        shape = layouts.SHAPES[columns.layout]
        if self._shape and shape != self._shape:
            raise DataError(
                f"this is {shape}, and what was read before is {self._shape}",
                where=where,
                hint="import each by itself: conversations, preferences and plain text are learnt in different ways",
            )
        self._shape = shape
        self._layouts.setdefault(columns.layout, columns)
        return columns

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        row = Row("", None, item.place)
        try:
            if columns.layout == "text":
                row.text = messages.text_of(item.values.get(columns.text), f"'{columns.text}'")
            else:
                row.conversation = read.conversation(item.values, columns, log.changed)
                row.text = row.conversation.transcript()
        except Flawed as flaw:
            row.flaw = flaw.reason, flaw.detail
            row.text = _shown(item, columns)
        return row

    def settle(self, rows: Sequence[Row]) -> None:
        """No row says anything of another before it is cleaned."""

    def clean(self, row: Row, changed: Counter[str]) -> None:
        steps: set[str] = set()
        if row.conversation is None:
            row.text = clean_block(row.text, self._spec.clean, steps)
        else:
            self._clean(row.conversation, steps)
            try:
                turns.settle(row.conversation, changed, drop_empty=self._spec.clean.drop_empty)
            except Flawed as flaw:
                row.flaw = flaw.reason, flaw.detail
            row.text = row.conversation.transcript()
        changed.update(steps)

    def _clean(self, conversation: Conversation, steps: set[str]) -> None:
        for message in conversation.every():
            if message["content"]:
                message["content"] = clean_block(message["content"], self._spec.clean, steps)

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        if row.flaw is not None:
            return row.flaw
        if not row.text.strip() and self._spec.clean.drop_empty:
            return Drop.EMPTY, "no text after cleaning"
        return None

    def gather(self, rows: Sequence[Row]) -> list[str]:
        told = [
            f"read as {layout} ({', '.join(f'{role}: {name}' for role, name in columns.used().items())})"
            for layout, columns in self._layouts.items()
        ]
        return told + groups.gather(rows)

    def check(self, prepared: Prepared, where: str) -> None:
        checks.answerable(prepared, where)

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        return groups.held_out(rows)

    def card(self, rows: Sequence[Row]) -> dict[str, Any]:
        shape = {"shape": self._shape, "layout": ", ".join(self._layouts)}
        lengths = [_turns(row.conversation) for row in rows if row.conversation]
        if not lengths:
            return shape
        return {**shape, "turns": {"mean": round(fmean(lengths), 2), "longest": max(lengths)}}

    def stored(self) -> Sequence[Column]:
        return stored.PREFERENCE if self._shape == "preference" else stored.MESSAGES


def _turns(conversation: Conversation) -> int:
    """Messages, instructions aside; of two answers the chosen one counts."""
    every = [*conversation.messages, *(conversation.chosen or ())]
    return sum(message["role"] in ("user", "assistant", "tool") for message in every)


def _shown(item: RawRow, columns: Columns) -> str:
    """What could not be read, for whoever looks at the dropped rows."""
    return "\n".join(f"{name}: {item.values.get(name)!s:.2000}" for name in columns.used().values() if name)
