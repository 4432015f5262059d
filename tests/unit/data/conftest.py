"""Runs the real import on files that a test wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.data.operation import run
from llmo.specs import DataSpec, TaskSpec


class Listening(NullContext):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.reports: list[tuple[int, int | None, dict[str, Any]]] = []
        self._on_report = lambda step, total, metrics: self.reports.append((step, total, metrics))

    def note(self, message: str) -> None:
        self.notes.append(message)


@dataclass
class Imported:
    data: Dataset
    info: dict[str, Any]
    notes: list[str]
    reports: list[tuple[int, int | None, dict[str, Any]]]

    def texts(self, *splits: str) -> list[str]:
        return [text for name in splits or ("train", "dev", "test") for text in self.data.split(name).column("text")]

    def rows(self) -> list[dict[str, Any]]:
        return [dict(row) for name in ("train", "dev", "test") for row in self.data.split(name)]

    def dropped(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for row in self.data.dropped():
            found.setdefault(row["reason"], []).append(row["source"])
        return found


Import = Callable[..., Imported]


@pytest.fixture
def import_(tmp_path: Path) -> Import:
    count = 0

    def go(source: Path | str, task: str = "text-classification", multi_label: bool | None = None, **data: Any):
        nonlocal count
        count += 1
        out = tmp_path / f"out-{count}"
        out.mkdir()
        ctx = Listening()
        spec = DataSpec(source=str(source), **data).plain()
        spec |= {"task": TaskSpec(name=task, multi_label=multi_label).plain(), "source_digest": None, "uploads": None}
        info = run(spec, {}, out, ctx)
        return Imported(Dataset.open(out), info, ctx.notes, ctx.reports)

    return go
