"""Texts with a number each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from llmo.data import checks, stored
from llmo.data.clean import clean
from llmo.data.columns import TEXT
from llmo.data.forms.base import text_of
from llmo.data.named import Columns, needed, once, row_columns, told, unless
from llmo.data.numbers import number
from llmo.data.prepared import Prepared
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row
from llmo.data.stored import Column
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

_VALUE = "value score rating stars grade price target label y 值 分数 评分"


class Rated:
    """The number of a row is what the column `label` (by any of its names) holds."""

    documents: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    def __init__(self, spec: DataSpec, task: TaskSpec) -> None:
        self._spec = spec
        self.multi_label = False

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        spec, rest = self._spec, row_columns(names, self._spec, where)
        label = told(names, spec.label, "label", where)
        text = told(names, spec.text, "text", where) or needed(names, "text", TEXT, where, label)
        label = label or needed(names, "label", _VALUE, where, text)
        once(names, where, text=text, label=label)
        return Columns(text=text, label=label, **unless(rest, text, label))

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        value = number(item.values.get(columns.label), columns.label, item.place)
        return Row(text_of(item, columns.text), None, item.place, value=value)

    def settle(self, rows: Sequence[Row]) -> None:
        """Every row's number is its own."""

    def clean(self, row: Row, changed: Counter[str]) -> None:
        row.text = clean(row.text, self._spec.clean, changed)

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        if not row.text.strip() and self._spec.clean.drop_empty:
            return Drop.EMPTY, "no text after cleaning"
        return (Drop.NO_LABEL, "no value") if row.value is None else None

    def gather(self, rows: Sequence[Row]) -> list[str]:
        return []

    def check(self, prepared: Prepared, where: str) -> None:
        checks.mostly_there(prepared, where)
        values = {row.value for row in prepared.rows}
        if len(values) == 1:
            raise DataError(
                f"every row has the value {prepared.rows[0].value:g}: there is nothing to learn",
                where=where,
                hint=f"the value is read from '{prepared.columns['label']}'; name another: data.label: NAME",
            )

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        return list(rows), []

    def card(self, rows: Sequence[Row]) -> dict[str, Any]:
        values = [row.value for row in rows if row.value is not None]
        spread = {"lowest": min(values), "mean": sum(values) / len(values), "highest": max(values)}
        return {"shape": "values", "values": spread}

    def stored(self) -> Sequence[Column]:
        return stored.VALUE
