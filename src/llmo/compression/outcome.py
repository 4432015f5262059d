"""What a search among variants is given, what it found, and what becomes of the chosen one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmo.compression.choice import Limits, Table
from llmo.data.dataset import Dataset
from llmo.tasks.base import Row


@dataclass(frozen=True, slots=True)
class Order:
    """The model folder and its task, the data set, those of its dev rows that quality is measured on, and the variants
    to try within the limits; `work` is for what is built and for scratch files."""

    model: Path
    task: Any  # of the kind that is searched: a Generation for generators
    data: Dataset
    rows: Sequence[Row]
    variants: Sequence[str]
    limits: Limits
    work: Path


@dataclass(frozen=True, slots=True)
class Made:
    """The model folder that a variant was made from, what it brings beside that folder's small files, and what its card
    says more."""

    model: Path
    files: Sequence[Path]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row a candidate, the reference first, with empty verdicts but for those that cannot run or were not begun; by
    name their metrics with intervals; and `made(name)`."""

    table: Table
    metrics: Mapping[str, Any]
    made: Callable[[str], Made]
