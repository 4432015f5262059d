"""Reads `.inter` files, RecBole's atomic files of interactions: tab-separated, with types behind the column names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmo.data.readers import delimited
from llmo.data.readers.base import RawRow, ReadLog
from llmo.specs import DataSpec

_TYPES = ("token", "float", "token_seq", "float_seq")


def read(path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]:
    """Rows as `{column: cell}`, `user_id:token` called `user_id`; cells stay text. Raises as the reader of TSV."""
    for row in delimited.read(path, spec, log):
        yield RawRow({_plain(name): cell for name, cell in row.values.items()}, row.place)


def _plain(name: str) -> str:
    head, _, kind = name.rpartition(":")
    return head if kind in _TYPES else name
