"""Texts with the classes they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from llmo.data import checks, columns, stored
from llmo.data.clean import clean
from llmo.data.forms.base import text_of
from llmo.data.labels import class_names
from llmo.data.named import Columns
from llmo.data.prepared import Prepared
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row
from llmo.data.stored import Column
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec


class Labelled:
    """One label a text, or several: as told, else as seen."""

    documents: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    def __init__(self, spec: DataSpec, task: TaskSpec) -> None:
        self._spec = spec
        self._told = task.multi_label
        self._lists = False
        self.multi_label = False

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        return columns.for_labels(names, self._spec, where)

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        label = item.values.get(columns.label)
        self._lists = self._lists or (isinstance(label, list) and len(label) != 1)
        labels = class_names(label, self._spec.label_separator, item.place)
        return Row(text_of(item, columns.text), labels, item.place)

    def settle(self, rows: Sequence[Row]) -> None:
        several = next((row for row in rows if row.labels and len(row.labels) > 1), None)
        if self._told is False and several is not None:
            raise DataError(
                f"this row has {len(several.labels or ())} labels",
                where=several.place,
                hint="set task.multi_label: true",
            )
        seen = self._lists or several is not None or self._spec.label_separator is not None
        self.multi_label = seen if self._told is None else self._told

    def clean(self, row: Row, changed: Counter[str]) -> None:
        row.text = clean(row.text, self._spec.clean, changed)

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        if not row.text.strip() and self._spec.clean.drop_empty:
            return Drop.EMPTY, "no text after cleaning"
        if row.labels is None or (not row.labels and not self.multi_label):
            return Drop.NO_LABEL, "no label"
        return None

    def gather(self, rows: Sequence[Row]) -> list[str]:
        return []

    def check(self, prepared: Prepared, where: str) -> None:
        checks.learnable(prepared, where)

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        return list(rows), []

    def card(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {}

    def stored(self) -> Sequence[Column]:
        return stored.LABELS if self.multi_label else stored.ONE_LABEL
