"""Turns the value of a cell into a number."""

from __future__ import annotations

import math
from typing import Any

from llmo.errors import DataError


def number(value: Any, name: str, place: str) -> float | None:
    """A finite number; None for an empty cell. Raises DataError for anything else, NaN included."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
    if not math.isfinite(found):
        raise DataError(
            f"'{name}' must be a finite number, this is {str(value)[:40]!r}",
            where=place,
            hint="write it as 3.5, leave the cell empty where it is not known, or name another column: data.label",
        )
    return found
