"""What an import would find, without writing anything: the data part of `llmo check`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmo import sources
from llmo.context import Context, NullContext
from llmo.data.build import build
from llmo.data.row import SPLITS
from llmo.specs import DataSpec, TaskSpec


@dataclass(frozen=True, slots=True)
class Profile:
    """`rows` counts read, train, dev, test and dropped; `dropped` counts by reason. Lengths are in characters.

    `splits` is "fixed" when the source has its own, else "stratified" by label, or "seeded" where there are none.
    `records` are the cleaned rows of all splits as an import stores them, for whoever wants to count tokens.
    `shape` is "messages", "preference" or "text", and empty for the other tasks.
    """

    rows: dict[str, int]
    labels: dict[str, int]
    dropped: dict[str, int]
    changed: dict[str, int]
    encodings: dict[str, int]
    columns: dict[str, str]
    splits: str
    multi_label: bool
    longest: int
    median: int
    shape: str
    samples: list[dict[str, Any]]
    notes: list[str]
    records: list[dict[str, Any]] = field(repr=False)

    @property
    def duplicates(self) -> int:
        """Rows that an import drops because another row says the same."""
        return sum(self.dropped.get(reason, 0) for reason in ("duplicate", "near_duplicate", "leak"))

    @property
    def empty(self) -> int:
        return self.dropped.get("empty", 0)


def profile(spec: DataSpec, task: TaskSpec, uploads: Path | None = None, ctx: Context | None = None) -> Profile:
    """Reads, cleans, compares and divides exactly as an import does. Raises the same DataErrors."""
    built = build(sources.resolve(spec.source, uploads), spec, task, ctx or NullContext())
    rows = [row for name in SPLITS for row in built.splits[name]]
    lengths = [len(row.text) for row in rows]
    known = ("rows", "labels", "dropped", "changed", "encodings", "columns", "splits", "multi_label")
    return Profile(
        **{name: built.info[name] for name in known},
        longest=max(lengths),
        median=int(median(lengths)),
        shape=built.info.get("shape", ""),
        samples=built.samples,
        notes=built.notes,
        records=[{column.name: column.value(row) for column in built.stored} for row in rows],
    )
