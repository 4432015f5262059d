"""Texts with the entities in them, from tokens with tags or from spans of characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmo.data import columns, entities, stored
from llmo.data.clean import clean_spans
from llmo.data.forms.labelled import Labelled
from llmo.data.named import Columns
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Row
from llmo.data.stored import Column


class Tagged(Labelled):
    """The labels of a row are the types of its entities; a text may well have none."""

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        return columns.for_tags(names, self._spec, where)

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        text, spans = entities.read(item.values, columns, item.place)
        document = item.values.get(columns.document) if columns.document else None
        group = str(document) if document is not None else None
        if spans is None:
            return Row(text, None, item.place, group=group)
        kept, overlapping = entities.without_overlap(spans)
        log.changed["overlapping_spans"] += overlapping
        return Row(text, tuple(sorted({span.label for span in kept})), item.place, spans=kept, group=group)

    def settle(self, rows: Sequence[Row]) -> None:
        """Several types in one text are no several labels."""

    def clean(self, row: Row, changed: Counter[str]) -> None:
        row.text, row.spans = clean_spans(row.text, row.spans, self._spec.clean, changed)
        row.labels = None if row.labels is None else tuple(sorted({span.label for span in row.spans}))

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        if not row.text.strip() and self._spec.clean.drop_empty:
            return Drop.EMPTY, "no text after cleaning"
        return (Drop.NO_LABEL, "no label") if row.labels is None else None

    def stored(self) -> Sequence[Column]:
        return stored.SPANS
