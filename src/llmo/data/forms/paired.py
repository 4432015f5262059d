"""Pairs of texts that belong together, with a third that does not, or with a score of how alike the two are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from llmo.data import checks, stored
from llmo.data.chat import groups
from llmo.data.clean import clean
from llmo.data.deduplicate import text_key
from llmo.data.forms.base import text_of
from llmo.data.named import Columns, named, row_columns, two_texts, unless
from llmo.data.numbers import number
from llmo.data.prepared import Prepared
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row
from llmo.data.stored import Column
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

_TEXT = """anchor text sentence1 sentence_1 text1 text_1 a question query title premise sentence
    句子1 文本1 问题 标题"""
_PAIR = """positive pair sentence2 sentence_2 text2 text_2 b answer response passage document body hypothesis
    句子2 文本2 答案 正文"""
_NEGATIVE = "negative hard_negative"
_SCORE = "score similarity similarity_score label 分数 相似度"


class Paired:
    """Rows of one text stay on one side, as texts do. All rows have a score, or none has; so it is with negatives."""

    documents: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    def __init__(self, spec: DataSpec, task: TaskSpec) -> None:
        self._spec = spec
        self._scored = spec.label is not None
        self.multi_label = False

    def choose(self, names: Sequence[str], head: Sequence[RawRow], where: str) -> Columns:
        rest = row_columns(names, self._spec, where)
        text, pair, label = two_texts(names, self._spec, _TEXT, _PAIR, where)
        negative = named(names, _NEGATIVE, text, pair)
        label = label or ("" if negative else named(names, _SCORE, text, pair))
        return Columns(
            text=text, pair=pair, negative=negative, label=label, **unless(rest, text, pair, negative, label)
        )

    def read(self, item: RawRow, columns: Columns, log: ReadLog) -> Row:
        texts = [text_of(item, name, key) for name, key in ((columns.text, "text"), (columns.pair, "pair"))]
        row = Row(texts[0], None, item.place, pair=texts[1])
        if columns.negative:
            row.negative = text_of(item, columns.negative, "negative")
        if columns.label:
            row.value = number(item.values.get(columns.label), columns.label, item.place)
        return row

    def settle(self, rows: Sequence[Row]) -> None:
        """Raises DataError for a row without a negative among others that have one. A column that is empty in every
        row is none, unless it was told."""
        self._scored = self._scored or any(row.value is not None for row in rows)
        without = next((row for row in rows if not (row.negative or "").strip()), None)
        if without is not None and any((row.negative or "").strip() for row in rows):
            raise DataError(
                "this row has no negative, and others have one",
                where=without.place,
                hint="give every row a negative, or leave the column out",
            )
        if without is not None:
            for row in rows:
                row.negative = None

    def clean(self, row: Row, changed: Counter[str]) -> None:
        row.text = clean(row.text, self._spec.clean, changed)
        row.pair = clean(row.pair or "", self._spec.clean, changed)
        row.negative = None if row.negative is None else clean(row.negative, self._spec.clean, changed)

    def lacks(self, row: Row) -> tuple[Drop, str] | None:
        for name, text in (("text", row.text), ("pair", row.pair), ("negative", row.negative)):
            if text is not None and not text.strip():
                return Drop.EMPTY, f"no {name} after cleaning"
        return (Drop.NO_LABEL, "no score") if self._scored and row.value is None else None

    def gather(self, rows: Sequence[Row]) -> list[str]:
        return []

    def check(self, prepared: Prepared, where: str) -> None:
        checks.mostly_there(prepared, where)
        if self._scored and len({row.value for row in prepared.rows}) == 1:
            raise DataError(
                f"every pair has the score {prepared.rows[0].value:g}: there is nothing to learn",
                where=where,
                hint=f"leave the column '{prepared.columns['label']}' out, or name another: data.label: NAME",
            )

    def held_out(self, rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
        """A pair that is held out is learnt with no other negative either."""
        pairs = [text_key(f"{row.text}\n{row.pair}") for row in rows]
        return groups.apart(rows, pairs, "the same pair as", Drop.LEAK)

    def card(self, rows: Sequence[Row]) -> dict[str, Any]:
        kind = "scored pairs" if self._scored else "triples" if rows and rows[0].negative else "pairs"
        return {"shape": kind, "layout": "columns"}

    def stored(self) -> Sequence[Column]:
        return stored.PAIR
