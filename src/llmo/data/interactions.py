"""Reads who acted on which item when, from rows of single interactions or of whole sequences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llmo import plugins
from llmo.context import Context
from llmo.data.detect import Part, parts
from llmo.data.labels import class_names
from llmo.data.named import Columns, listed, named, told, unless
from llmo.data.prepare import tick
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.row import Drop, Dropped, Row
from llmo.errors import DataError
from llmo.specs import DataSpec

USER = """user user_id userid uid customer customer_id customerid client client_id session session_id sessionid
    visitor visitor_id visitorid reviewerid account account_id 用户 用户编号"""
ITEM = """item item_id itemid iid product product_id productid sku asin movie movie_id movieid article article_id
    track track_id song book isbn news_id event title 物品 商品 商品编号"""
TIME = """timestamp time ts date datetime created_at created unixreviewtime unix_time event_time when 时间 时间戳"""
SEQUENCE = "sequence history items item_ids item_id_list item_sequence 序列"
_PEEK = 100
_TICK = 10_000
_BETWEEN = re.compile(r"[\s,]+")


@dataclass(frozen=True, slots=True)
class Action:
    """`time` orders the actions of a user, `order` those of the same time."""

    user: str
    item: str
    time: float
    order: int
    place: str


@dataclass(slots=True)
class Found:
    """`actions` in the order of the source; `read` counts its rows."""

    actions: list[Action]
    dropped: list[Dropped]
    log: ReadLog
    columns: dict[str, str]
    read: int


def read(source: Path, spec: DataSpec, ctx: Context) -> Found:
    """Raises DataError, with the place, for columns that are not there, and for a time that is none."""
    found = Found([], [], ReadLog(source), {}, 0)
    for part in parts(source, spec):
        _read_part(part, spec, found, ctx)
    if not found.read:
        raise DataError("there are no rows", where=source.name, hint="give a file with at least a few rows")
    if "time" not in found.columns:
        found.log.notes.append("no column tells the time: the order of the rows is the order of events")
    return found


def _read_part(part: Part, spec: DataSpec, found: Found, ctx: Context) -> None:
    raw: Iterator[RawRow] = plugins.load("llmo.readers", part.format)(part.path, spec, found.log)
    head = list(islice(raw, _PEEK))
    if not head:
        return
    names = list(dict.fromkeys(name for row in head for name in row.values))
    columns = _choose(names, spec, found.log.name(part.path))
    whole = not columns.user or _is_sequence(columns.item) or _any_list(head, columns.item)
    found.columns = found.columns or columns.used()
    for row in chain(head, raw):
        found.read += 1
        if found.read % _TICK == 0:
            tick(ctx, found.read, None, "reading")
        user = class_names(row.values.get(columns.user), None, row.place) if columns.user else (row.place,)
        items = _items(row.values.get(columns.item), row.place, found.log, whole=whole)
        if not user or not items:
            lacks = "no user" if not user else "no item"
            found.dropped.append(Dropped(Row(" ".join(items), None, row.place), Drop.INCOMPLETE, lacks))
            continue
        time = _time(row, columns.time) if columns.time else 0.0
        begin = len(found.actions)
        found.actions += [Action(user[0], item, time, begin + i, row.place) for i, item in enumerate(items)]


def _choose(names: Sequence[str], spec: DataSpec, where: str) -> Columns:
    user = told(names, spec.user, "user", where) or named(names, USER)
    time = told(names, spec.time, "time", where) or named(names, TIME, user)
    item = told(names, spec.item, "item", where)
    item = item or named(names, SEQUENCE, user, time) or named(names, ITEM, user, time)
    if not item:
        raise DataError(
            "no column is called like an item column",
            where=where,
            hint=f"the columns are: {listed(names)}; say which: data.item: NAME, and data.user and data.time likewise",
        )
    if not user and not _is_sequence(item) and spec.item is None:
        raise DataError(
            "no column is called like a user column",
            where=where,
            hint=f"the columns are: {listed(names)}; say which: data.user: NAME; or, if each row is a whole sequence, "
            f"data.item: {item}",
        )
    return Columns(item=item, **unless({"user": user, "time": time}, item))


def _is_sequence(column: str) -> bool:
    return column.strip().casefold() in SEQUENCE.split()


def _any_list(head: Sequence[RawRow], column: str) -> bool:
    return any(isinstance(row.values.get(column), list) for row in head)


def _items(value: Any, place: str, log: ReadLog, *, whole: bool) -> list[str]:
    """Names of items; white space within one becomes `_`, since it divides items where they are asked for."""
    if whole and isinstance(value, str):
        return [part for part in _BETWEEN.split(value) if part]
    items = []
    for one in value if isinstance(value, list) else [value]:
        for name in class_names(one, None, place) or ():
            items.append("_".join(name.split()))
            log.changed["items_with_spaces"] += items[-1] != name
    return items


def _time(row: RawRow, column: str) -> float:
    """Seconds, or whatever unit the numbers of the source are in. Raises DataError for what is neither number nor
    date."""
    value = row.values.get(column)
    for read in (float, _seconds):
        try:
            found = read(str(value))
        except (ValueError, OverflowError):
            continue
        if math.isfinite(found):
            return found
    raise DataError(
        f"'{value}' is no time",
        where=row.place,
        hint=f"'{column}' must hold a number or a date like 2026-01-31 12:00:00 in every row; or name another column: "
        "data.time: NAME",
    )


def _seconds(text: str) -> float:
    """Of a date; one that names no zone is taken to be in UTC, so that the order is the same on every machine."""
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
