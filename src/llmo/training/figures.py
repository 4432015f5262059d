"""Measures the splits of a data set with the model that is being trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmo.context import Context
from llmo.data.dataset import Rows
from llmo.tasks.base import Task
from llmo.tasks.metrics import Counts, Tally
from llmo.training import scoring
from llmo.training.findings import Findings
from llmo.training.precision import Precision

Metrics = dict[str, dict[str, float]]
Splits = dict[str, Rows]


@dataclass(frozen=True, slots=True)
class Measured:
    """A split through a model: `metrics` with intervals, the task's own `details`, what `Findings` gathered."""

    metrics: Metrics
    rows: int = 0
    truncated: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)


def measure(
    task: Task,
    tokens: scoring.Tokens,
    predict: scoring.Predict,
    ctx: Context,
    phase: str,
    each: list[Counts] | None = None,
) -> Measured:
    """All that is told of a split; it has rows. `each` gets the counts of every row. Raises Stopped when the job is
    asked to stop."""
    findings, started = Findings(each), time.monotonic()
    scored = scoring.score(task, tokens, predict, ctx, phase, findings)
    seconds = time.monotonic() - started
    return Measured(
        task.intervals(scored.tally),
        scored.rows,
        scored.truncated,
        seconds,
        task.details(scored.tally),
        findings.to_json(),
    )


class Figures(Protocol):
    """`split` names one of the held-out splits, `phase` what the user is told is happening."""

    def full(self, split: str, phase: str, how: Precision) -> Metrics:
        """Metrics with intervals; none for a split without rows."""

    def measured(self, split: str, phase: str, how: Precision) -> Measured:
        """The same and all else that is told of a split; nothing for one without rows."""

    def plain(self, split: str, phase: str, how: Precision) -> dict[str, float]:
        """Metrics alone, of a split with rows."""


class TaskFigures:
    """The task's own metrics; `predictor` makes what runs the model in a given precision."""

    def __init__(
        self,
        task: Task,
        tokens: Mapping[str, scoring.Tokens],
        predictor: Callable[[Precision], scoring.Predict],
        ctx: Context,
    ) -> None:
        self._task, self._tokens, self._predictor, self._ctx = task, tokens, predictor, ctx

    def full(self, split: str, phase: str, how: Precision) -> Metrics:
        return self._task.intervals(self._tally(split, phase, how)) if len(self._tokens[split].rows) else {}

    def measured(self, split: str, phase: str, how: Precision) -> Measured:
        if not len(self._tokens[split].rows):
            return Measured({})
        return measure(self._task, self._tokens[split], self._predictor(how), self._ctx, phase)

    def plain(self, split: str, phase: str, how: Precision) -> dict[str, float]:
        return self._task.figures(self._tally(split, phase, how))

    def _tally(self, split: str, phase: str, how: Precision) -> Tally:
        return scoring.score(self._task, self._tokens[split], self._predictor(how), self._ctx, phase).tally
