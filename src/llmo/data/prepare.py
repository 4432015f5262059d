"""From a raw source to clean rows: read, choose columns, clean, and set aside what nothing can be learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.context import Context, Stopped
from llmo.data import ids
from llmo.data.detect import Part, parts
from llmo.data.encoding import too_long
from llmo.data.forms.base import Form
from llmo.data.named import Columns
from llmo.data.prepared import Prepared
from llmo.data.readers.base import MAX_CELL, RawRow, ReadLog
from llmo.data.row import Dropped, Row
from llmo.data.splitnames import split_name
from llmo.errors import DataError
from llmo.specs import DataSpec

_PEEK = 100  # rows whose keys make up the columns, since JSON objects may leave some out
_TICK = 1000


def prepare(source: Path, spec: DataSpec, form: Form, ctx: Context) -> Prepared:
    """Raises DataError, with the place, for what cannot be read or understood."""
    log = ReadLog(source)
    rows: list[Row] = []
    given: list[Any] = []
    found: list[Columns] = []
    for part in parts(source, spec, documents=form.documents):
        for row, value, columns in _rows(part, spec, form, log):
            rows.append(row)
            given.append(value)
            if not found or found[-1] is not columns:
                found.append(columns)
            if len(rows) % _TICK == 0:
                tick(ctx, len(rows), None, "reading")
    if not rows:
        raise DataError("there are no rows", where=source.name, hint="give a file with at least a few rows")
    columns = found[0]
    notes = _resolve_splits(rows, columns, spec)
    form.settle(rows)
    _clean(rows, form, log, ctx)
    note = ids.assign(rows, given, columns.id, spec.id is not None)
    fixed = rows[0].split is not None
    notes = [*log.notes, *notes, *([note] if note else [])]
    prepared = Prepared([], [], log, columns.used(), len(rows), fixed, notes)
    _set_aside(prepared, rows, form)
    prepared.notes += form.gather(prepared.rows)
    return prepared


def _rows(part: Part, spec: DataSpec, form: Form, log: ReadLog) -> Iterator[tuple[Row, Any, Columns]]:
    raw: Iterator[RawRow] = plugins.load("llmo.readers", part.format)(part.path, spec, log)
    head = list(islice(raw, _PEEK))
    names = list(dict.fromkeys(name for row in head for name in row.values))
    if not head:
        return
    columns = form.choose(names, head, log.name(part.path))
    for item in chain(head, raw):
        row = form.read(item, columns, log)
        if len(row.text) > MAX_CELL:
            raise too_long(item.place)
        value = item.values.get(columns.split) if columns.split else None
        row.split = part.split or (str(value).strip() if value is not None else None)
        yield row, item.values.get(columns.id), columns


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


def _clean(rows: list[Row], form: Form, log: ReadLog, ctx: Context) -> None:
    for number, row in enumerate(rows, 1):
        if row.flaw is None:
            form.clean(row, log.changed)
        if number % _TICK == 0:
            tick(ctx, number, len(rows), "cleaning")


def _set_aside(prepared: Prepared, rows: list[Row], form: Form) -> None:
    for row in rows:
        lack = form.lacks(row)
        if lack is None:
            prepared.rows.append(row)
        else:
            prepared.dropped.append(Dropped(row, *lack))


def tick(ctx: Context, step: int, total: int | None, phase: str) -> None:
    if ctx.should_stop():
        raise Stopped
    ctx.report(step, total, phase=phase)
