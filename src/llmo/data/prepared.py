"""What reading and cleaning a source found, before copies go and rows are divided."""

from __future__ import annotations

from dataclasses import dataclass

from llmo.data.readers.base import ReadLog
from llmo.data.row import Dropped, Row


@dataclass(slots=True)
class Prepared:
    """Rows that can be learnt from, rows set aside, and what was seen on the way. `read` counts all of them."""

    rows: list[Row]
    dropped: list[Dropped]
    log: ReadLog
    columns: dict[str, str]
    read: int
    fixed_splits: bool
    notes: list[str]
