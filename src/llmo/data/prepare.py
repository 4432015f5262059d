"""From a raw source to clean rows: read, choose columns, clean, and set aside what has no text or no label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.context import Context, Stopped
from llmo.data import entities, ids
from llmo.data.clean import clean, clean_spans
from llmo.data.columns import Columns, choose
from llmo.data.detect import Part, parts
from llmo.data.encoding import too_long
from llmo.data.labels import class_names
from llmo.data.readers.base import MAX_CELL, RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row
from llmo.data.splitnames import split_name
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

_PEEK = 100  # rows whose keys make up the columns, since JSON objects may leave some out
_TICK = 1000
TAGGING = "token-classification"


@dataclass(slots=True)
class Prepared:
    """Rows that can be learnt from, rows set aside, and what was seen on the way. `read` counts all of them."""

    rows: list[Row]
    dropped: list[Dropped]
    log: ReadLog
    columns: dict[str, str]
    multi_label: bool
    read: int
    fixed_splits: bool
    notes: list[str]


def prepare(source: Path, spec: DataSpec, task: TaskSpec, ctx: Context) -> Prepared:
    """Raises DataError, with the place, for what cannot be read or understood."""
    log = ReadLog(source)
    rows: list[Row] = []
    given: list[Any] = []
    found: list[Columns] = []
    listed = False
    for part in parts(source, spec):
        for row, value, columns, is_list in _rows(part, spec, task, log):
            rows.append(row)
            given.append(value)
            listed = listed or is_list
            if not found or found[-1] is not columns:
                found.append(columns)
            if len(rows) % _TICK == 0:
                tick(ctx, len(rows), None, "reading")
    if not rows:
        raise DataError("there are no rows", where=source.name, hint="give a file with at least a few rows")
    columns = found[0]
    notes = _resolve_splits(rows, columns, spec)
    multi = _multi_label(rows, listed, spec, task)
    _clean(rows, spec, task, log, ctx)
    note = ids.assign(rows, given, columns.id, spec.id is not None)
    fixed = rows[0].split is not None
    notes = [*log.notes, *notes, *([note] if note else [])]
    prepared = Prepared([], [], log, columns.used(), multi, len(rows), fixed, notes)
    _set_aside(prepared, rows, spec, multi or task.name == TAGGING)
    return prepared


def _rows(part: Part, spec: DataSpec, task: TaskSpec, log: ReadLog) -> Iterator[tuple[Row, Any, Columns, bool]]:
    raw: Iterator[RawRow] = plugins.load("llmo.readers", part.format)(part.path, spec, log)
    head = list(islice(raw, _PEEK))
    names = list(dict.fromkeys(name for row in head for name in row.values))
    if not head:
        return
    columns = choose(names, spec, task.name, log.name(part.path))
    for item in chain(head, raw):
        row = _tagged(item, columns, log) if task.name == TAGGING else _classified(item, columns, spec)
        if len(row.text) > MAX_CELL:
            raise too_long(item.place)
        value = item.values.get(columns.split) if columns.split else None
        row.split = part.split or (str(value).strip() if value is not None else None)
        document = item.values.get(columns.document) if columns.document else None
        row.group = str(document) if document is not None else None
        label = item.values.get(columns.label)
        yield row, item.values.get(columns.id), columns, isinstance(label, list) and len(label) != 1


def _classified(item: RawRow, columns: Columns, spec: DataSpec) -> Row:
    labels = class_names(item.values.get(columns.label), spec.label_separator, item.place)
    return Row(_text(item.values, columns.text, item.place), labels, item.place)


def _tagged(item: RawRow, columns: Columns, log: ReadLog) -> Row:
    text, spans = entities.read(item.values, columns, item.place)
    if spans is None:
        return Row(text, None, item.place)
    kept, overlapping = entities.without_overlap(spans)
    log.changed["overlapping_spans"] += overlapping
    return Row(text, tuple(sorted({span.label for span in kept})), item.place, spans=kept)


def _text(values: Mapping[str, Any], name: str, place: str) -> str:
    value = values.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    raise DataError(
        f"the text is a {type(value).__name__}, not a string", where=place, hint="name another column: data.text: NAME"
    )


def _resolve_splits(rows: list[Row], columns: Columns, spec: DataSpec) -> list[str]:
    unknown = next((row for row in rows if row.split is not None and split_name(row.split) is None), None)
    if unknown is not None and spec.split_column:
        raise DataError(
            f"'{unknown.split}' is not the name of a split",
            where=unknown.place,
            hint=f"the column '{spec.split_column}' must say train, dev or test in every row",
        )
    for row in rows:
        row.split = split_name(row.split) if row.split and unknown is None else None
    named = [row for row in rows if row.split]
    if named and len(named) < len(rows):
        lost = next(row for row in rows if not row.split)
        raise DataError("this row names no split", where=lost.place, hint="write train, dev or test in every row")
    if unknown is None:
        return []
    return [f"the column '{columns.split}' is not used: '{unknown.split}' is not train, dev or test"]


def _multi_label(rows: list[Row], listed: bool, spec: DataSpec, task: TaskSpec) -> bool:
    if task.name == TAGGING:
        return False
    several = next((row for row in rows if row.labels and len(row.labels) > 1), None)
    if task.multi_label is False and several is not None:
        raise DataError(
            f"this row has {len(several.labels or ())} labels", where=several.place, hint="set task.multi_label: true"
        )
    if task.multi_label is not None:
        return task.multi_label
    return listed or several is not None or spec.label_separator is not None


def _clean(rows: list[Row], spec: DataSpec, task: TaskSpec, log: ReadLog, ctx: Context) -> None:
    changed: Counter[str] = log.changed
    for number, row in enumerate(rows, 1):
        if task.name == TAGGING:
            row.text, row.spans = clean_spans(row.text, row.spans, spec.clean, changed)
            row.labels = None if row.labels is None else tuple(sorted({span.label for span in row.spans}))
        else:
            row.text = clean(row.text, spec.clean, changed)
        if number % _TICK == 0:
            tick(ctx, number, len(rows), "cleaning")


def _set_aside(prepared: Prepared, rows: list[Row], spec: DataSpec, may_be_none: bool) -> None:
    for row in rows:
        if not row.text.strip() and spec.clean.drop_empty:
            prepared.dropped.append(Dropped(row, Drop.EMPTY, "no text after cleaning"))
        elif row.labels is None or (not row.labels and not may_be_none):
            prepared.dropped.append(Dropped(row, Drop.NO_LABEL, "no label"))
        else:
            prepared.rows.append(row)


def tick(ctx: Context, step: int, total: int | None, phase: str) -> None:
    if ctx.should_stop():
        raise Stopped
    ctx.report(step, total, phase=phase)
