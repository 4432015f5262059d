"""Turns the value of a label cell into the names of classes."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

from llmo.errors import DataError

_MISSING = ("", "nan", "null", "<na>")


def class_names(value: Any, separator: str | None, place: str) -> tuple[str, ...] | None:
    """The classes a cell names, without repeats; None when it names nothing (empty, null, NaN).

    An empty list is not missing: it says that no class fits (multi-label).
    """
    if isinstance(value, (list, tuple)):
        found = [_name(item, place) for item in value]
        return None if value and not any(found) else _unique(found)
    if separator and isinstance(value, str):
        found = [_name(item, place) for item in value.split(separator)]
        return _unique(found) if any(found) else None
    name = _name(value, place)
    return (name,) if name else None


def _unique(found: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in found if name))


def _name(value: Any, place: str) -> str:
    """A class is a string: 1 and 1.0 become "1", true becomes "true"; "" means missing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        name = unicodedata.normalize("NFC", " ".join(value.split()))
        return "" if name.casefold() in _MISSING else name
    raise DataError(
        f"a label must be a string or a number, this is a {type(value).__name__}",
        where=place,
        hint='write "label": "NAME", or a list of names',
    )
