"""A context that remembers what an operation told it, and can ask it to stop at a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmo.context import NullContext


class Listening(NullContext):
    """Remembers what it was told, and asks to stop at a step."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        super().__init__(1, folder)
        self.reports: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._stop_at = stop_at

    def report(self, step: int, total: int | None = None, **metrics: float | str) -> None:
        self.reports.append({"step": step, "total": total, **metrics})

    def note(self, message: str) -> None:
        self.notes.append(message)

    def should_stop(self) -> bool:
        steps = [r["step"] for r in self.reports if "learning_rate" in r]
        return self._stop_at is not None and bool(steps) and steps[-1] >= self._stop_at
