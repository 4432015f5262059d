"""The contract of a form: what one task makes of a source's rows, from their columns to what is stored of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from llmo.data.named import Columns
from llmo.data.prepared import Prepared
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row
from llmo.data.stored import Column
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec


class Form(Protocol):
    """One instance an import: it may remember what it saw. Its methods are called in the order they stand here.

    `documents`: text files are texts of their own, and folders no labels. `whole_groups`: rows of one group are never
    on two sides, however few groups there are.
    """

    documents: ClassVar[bool]
    whole_groups: ClassVar[bool]
    multi_label: bool

    def __init__(self, spec: DataSpec, task: TaskSpec) -> None: ...

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        """The columns of one part of the source. Raises DataError when they are not those of this task."""

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        """A row as the source has it. Raises DataError for what is certainly a mistake in the whole source."""

    def settle(self, rows: Sequence[Row]) -> None:
        """What only all rows together tell, before any is cleaned."""

    def clean(self, row: Row, changed: Counter[str]) -> None:
        """Mend the row's texts, and count in `changed` what was altered."""

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        """Why nothing can be learnt from the row; None when it can."""

    def gather(self, rows: Sequence[Row]) -> list[str]:
        """Set the groups of the rows that stay. Returns notes for the user."""

    def check(self, prepared: Prepared, where: str) -> None:
        """Raises DataError when nothing can be learnt from the source."""

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        """The rows that may stay in the splits the source gave them, and those that may not."""

    def card(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What the card says besides what every data set's does."""

    def stored(self) -> Sequence[Column]:
        """What is kept of a row."""


def text_of(item: RawRow, name: str, key: str = "text") -> str:
    """The text in a column, numbers included; "" when there is none. Raises DataError for a list or an object; `key` is
    what a user may name the column with."""
    value = item.values.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    raise DataError(
        f"the {key} is a {type(value).__name__}, not a string",
        where=item.place,
        hint=f"name another column: data.{key}: NAME",
    )
