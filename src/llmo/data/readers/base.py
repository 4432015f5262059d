"""The contract of a reader: it turns one file or folder into rows of named values, each with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmo.specs import DataSpec

MAX_CELL = 10_000_000
"""Characters that one text, one line or one record may have; more is a mistake in the file, not a text."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """What the source says, before columns are chosen. `place` is `file:line`, `file#row` or a file's name."""

    values: Mapping[str, Any]
    place: str


@dataclass(slots=True)
class ReadLog:
    """What a reader has to tell besides its rows: files per encoding, things mended, lines for the user."""

    root: Path
    encodings: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """A path as places show it: relative to the source, never this machine's folders."""
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


class Reader(Protocol):
    """Registered under `llmo.readers` by the name of its format.

    Reads lazily and raises DataError, with the place, for the first thing that cannot be read.
    """

    def __call__(self, path: Path, spec: DataSpec, log: ReadLog) -> Iterator[RawRow]: ...
