"""Measures the splits of a data set with the model that is being trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from llmo.context import Context
from llmo.data.dataset import Rows
from llmo.tasks.base import Row, Task
from llmo.tasks.metrics import Tally
from llmo.training import scoring
from llmo.training.precision import Precision

Metrics = dict[str, dict[str, float]]
Splits = dict[str, Rows]


class Figures(Protocol):
    """`split` names one of the held-out splits, `phase` what the user is told is happening."""

    def full(self, split: str, phase: str, how: Precision) -> Metrics:
        """Metrics with intervals; none for a split without rows."""

    def plain(self, split: str, phase: str, how: Precision) -> dict[str, float]:
        """Metrics alone, of a split with rows."""


class TaskFigures:
    """The task's own metrics; `predictor` makes what runs the model in a given precision."""

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        splits: Splits,
        predictor: Callable[[Precision], scoring.Predict],
        ctx: Context,
    ) -> None:
        self._task, self._tokenizer, self._splits, self._ctx = task, tokenizer, splits, ctx
        self._predictor = predictor

    def full(self, split: str, phase: str, how: Precision) -> Metrics:
        rows = self._splits[split]
        return self._task.intervals(self._tally(rows, phase, how)) if len(rows) else {}

    def plain(self, split: str, phase: str, how: Precision) -> dict[str, float]:
        return self._task.figures(self._tally(self._splits[split], phase, how))

    def _tally(self, rows: Sequence[Row], phase: str, how: Precision) -> Tally:
        return scoring.score(self._task, self._tokenizer, rows, self._predictor(how), self._ctx, phase).tally
