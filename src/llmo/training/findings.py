"""Gathers, while a split is measured, what its figures do not say: the worst errors and how sure the model was."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from llmo.tasks.base import Encoding, Logits, Row, Task
from llmo.tasks.metrics import Counts
from llmo.tasks.verdict import Calibration, Verdict

WORST = 20  # rows kept
SHOWN = 1000  # characters of a text


class Findings:
    """Of rows that are told of one chunk after another, in bounded memory; `each` gets every row's counts, if given."""

    def __init__(self, each: list[Counts] | None = None) -> None:
        self._each = each
        self._calibration = Calibration()
        self._worst: list[tuple[float, int, dict[str, Any]]] = []  # a heap whose first is the least bad
        self._rows = 0

    def add(self, task: Task, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> None:
        if self._each is not None:
            self._each += task.counted(logits, rows, encodings)
        for row, verdict in zip(rows, task.verdicts(logits, rows, encodings), strict=True):
            self._rows += 1
            if verdict is None:
                continue
            if verdict.decisions is not None:
                self._calibration.add(verdict.decisions)
            if len(self._worst) < WORST or verdict.loss > self._worst[0][0]:
                heapq.heappush(self._worst, (verdict.loss, -self._rows, _told(row, verdict)))
            if len(self._worst) > WORST:
                heapq.heappop(self._worst)

    def to_json(self) -> dict[str, Any]:
        """`{"worst": [{"id", "loss", "score", "gold", "answer", "text"}], "calibration": {...} | None}`."""
        worst = [told for _, _, told in sorted(self._worst, key=lambda one: one[:2], reverse=True)]
        return {"worst": worst, "calibration": self._calibration.to_json()}


def _told(row: Row, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": str(row.get("id", "")),
        "loss": verdict.loss,
        "score": verdict.score,
        "gold": _shortened(verdict.gold),
        "answer": _shortened(verdict.answer),
        "text": _shortened(str(row.get("text", ""))),
    }


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
