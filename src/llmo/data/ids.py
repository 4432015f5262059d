"""Gives every row an id: the source's own when they are unique, else one made from the row's content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from llmo.data.row import Row
from llmo.errors import DataError


def assign(rows: Sequence[Row], given: Sequence[Any], column: str, told: bool) -> str:
    """Set `row.id`. Returns a note for the user when a column that looked like ids could not be used.

    Raises DataError, with both places, when ids that the user told are missing or repeated.
    """
    trouble = _trouble(rows, given, column) if column else None
    if trouble is not None and told:
        raise trouble
    if column and trouble is None:
        for row, value in zip(rows, given, strict=True):
            row.id = str(value)
        return ""
    _number(rows)
    return f"the column '{column}' is not used as id: {trouble}; ids were made from the content" if trouble else ""


def _trouble(rows: Sequence[Row], given: Sequence[Any], column: str) -> DataError | None:
    seen: dict[str, str] = {}
    for row, value in zip(rows, given, strict=True):
        if value is None or isinstance(value, (list, dict)) or not str(value).strip():
            return DataError(
                "this row has no id", where=row.place, hint=f"fill the column '{column}', or leave out data.id"
            )
        before = seen.setdefault(str(value), row.place)
        if before is not row.place:
            return DataError(
                f"the id '{value}' is already that of {before}",
                where=row.place,
                hint=f"make the column '{column}' unique, or leave out data.id to have ids made",
            )
    return None


def _number(rows: Sequence[Row]) -> None:
    """The same content has the same id in every import; copies are numbered."""
    used: dict[str, int] = {}
    for row in rows:
        target = [(s.start, s.end, s.label) for s in row.spans] or row.labels
        name = hashlib.sha256(f"{row.text}\x00{target}".encode("utf-8", "replace")).hexdigest()[:16]
        used[name] = used.get(name, 0) + 1
        row.id = name if used[name] == 1 else f"{name}-{used[name]}"
