"""Regression: one number per text, such as a rating, a price or a duration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from llmo.errors import DataError
from llmo.tasks.base import Encoding, Logits, Row, Task, seen
from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio, spearman
from llmo.tasks.verdict import Verdict
from llmo.types import Asked

if TYPE_CHECKING:
    import torch

FARTHEST = 1e6  # standard deviations: what a broken model answers must still add up
AGREED = 0.1  # standard deviations between two answers that count as the same


class Regression(Task):
    """Rows carry `value`. The model learns it as standard deviations from the training rows' mean (`mean` and `std`, on
    the scale of the rows); answers and errors are on the scale of the rows again."""

    name: ClassVar[str] = "regression"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    has_classes: ClassVar[bool] = False

    def __init__(
        self, labels: Sequence[str] = ("value",), max_length: int = 128, *, mean: float = 0.0, std: float = 1.0
    ) -> None:
        super().__init__(labels, max_length)
        self.mean, self.std = mean, std

    @property
    def metric(self) -> str:
        return "r2"

    @property
    def problem_type(self) -> str:
        return "regression"

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        values = np.array([row["value"] for row in rows], np.float64)
        if not len(values):
            raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
        mean, std = float(values.mean()), float(values.std())
        if values.min() == values.max() or not std > 0:
            raise DataError(
                f"all {len(values)} training rows have the value {values[0]:g}; there is nothing to learn",
                hint="check `data.label`, which names the column of the values",
            )
        return cls(max_length=max_length, mean=mean, std=std)

    def options(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        """The standardised value `[1]`."""
        return np.array([self._standard(row)], np.float32)

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Mean squared error of the standardised values."""
        return (logits.float() - targets).square().mean()

    def mass(self, targets: torch.Tensor, class_weights: torch.Tensor | None) -> float:
        return float(len(targets))

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        """Per row, in standard deviations: value, answer, squared and absolute error, squared value."""
        gold = np.array([self._standard(row) for row in rows])
        answers = np.array([float(one[0]) for one in logits])
        gold, answers = (np.clip(x, -FARTHEST, FARTHEST) for x in (gold, answers))
        errors = answers - gold
        columns = np.stack([gold, answers, errors**2, np.abs(errors), gold**2], axis=1)
        return Tally.of_sums(np.rint(columns * MICRO).astype(np.int64))

    def scores(self, totals: Totals) -> dict[str, Floats]:
        """`r2` is the share of the values' variance that is explained: 0 for whoever always answers their mean."""
        gold, _, squared, absolute, square = np.moveaxis(totals.sums / MICRO, -1, 0)
        variation = square - ratio(gold**2, totals.rows)
        return {
            "r2": np.where(variation > 0, 1.0 - ratio(squared, variation), 0.0),
            "rmse": self.std * np.sqrt(ratio(squared, totals.rows)),
            "mae": self.std * ratio(absolute, totals.rows),
        }

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        """Their losses are squared errors in standard deviations."""
        found: list[Verdict | None] = []
        for said, row in zip(logits, rows, strict=True):
            error = float(np.clip(float(said[0]) - self._standard(row), -FARTHEST, FARTHEST))
            answer = self.mean + self.std * float(said[0])
            found.append(Verdict(error**2, f"{float(row['value']):.6g}", f"{answer:.6g}"))
        return found

    def ranked(self, tally: Tally, times: Floats) -> dict[str, Floats]:
        gold, answers = tally.counts[:, :2].T.astype(np.float64)
        return {"spearman": spearman(gold, answers, times)}

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        return {"value": self.mean + self.std * float(logits[0]), **seen(encoding)}

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        """Within a tenth of a standard deviation."""
        return bool(abs(float(a[0]) - float(b[0])) <= AGREED)

    def _standard(self, row: Row) -> float:
        return (float(row["value"]) - self.mean) / self.std
