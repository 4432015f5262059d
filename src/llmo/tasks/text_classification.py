"""Text classification: one label per text, or any number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from llmo.errors import DataError, nearest
from llmo.tasks.base import Encoding, Logits, Row, Task, seen
from llmo.tasks.metrics import (
    Floats,
    Tally,
    Totals,
    macro_f1,
    micro_f1,
    per_class,
    ratio,
    sigmoid,
    softmax,
    weighted_f1,
)
from llmo.tasks.verdict import Decisions, Verdict, surprise
from llmo.types import Asked

if TYPE_CHECKING:
    import torch

THRESHOLD = 0.5


class TextClassification(Task):
    """Rows carry `label`, or with `multi_label` a list `labels` (possibly empty)."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(self, labels: Sequence[str], max_length: int = 128, multi_label: bool = False) -> None:
        super().__init__(labels, max_length)
        self.multi_label = multi_label
        self._index = {label: i for i, label in enumerate(self.labels)}

    @property
    def metric(self) -> str:
        return "micro_f1" if self.multi_label else "accuracy"

    @property
    def problem_type(self) -> str:
        return "multi_label_classification" if self.multi_label else "single_label_classification"

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, max_length: int, options: Mapping[str, Any]) -> Self:
        if not len(rows):
            raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
        multi_label = options.get("multi_label")
        if multi_label is None:
            multi_label = "labels" in rows[0]
        if multi_label and "labels" not in rows[0]:
            labels = {row["label"] for row in rows}
        else:
            labels = {label for row in rows for label in (row["labels"] if multi_label else [_single(row)])}
        if len(labels) < (1 if multi_label else 2):
            found = f"only the label '{next(iter(labels))}'" if labels else "no label at all"
            raise DataError(
                f"the training rows carry {found}; there is nothing to tell apart",
                hint="give rows of at least two labels, and check `data.label`",
            )
        return cls(sorted(labels), max_length, multi_label=bool(multi_label))

    def options(self) -> dict[str, Any]:
        return {"multi_label": self.multi_label}

    def target(self, row: Row, encoding: Encoding) -> NDArray[Any]:
        if not self.multi_label:
            return np.asarray(self._find(_single(row)), np.int64)
        hot = np.zeros(len(self.labels), np.float32)
        hot[[self._find(label) for label in _many(row)]] = 1.0
        return hot

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, smoothing: float = 0.0
    ) -> torch.Tensor:
        from torch.nn import functional  # a replica uses this file without torch

        if not self.multi_label:
            return functional.cross_entropy(logits.float(), targets, class_weights, label_smoothing=smoothing)
        smooth = targets * (1.0 - smoothing) + smoothing / 2.0
        return functional.binary_cross_entropy_with_logits(logits.float(), smooth, class_weights)

    def mass(self, targets: torch.Tensor, class_weights: torch.Tensor | None) -> float:
        if class_weights is None or self.multi_label:
            return float(len(targets))
        return float(class_weights[targets].sum())

    def class_counts(self, targets: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
        if self.multi_label:
            return np.asarray(np.stack(targets).sum(0), np.int64)
        return np.bincount(np.stack(targets), minlength=len(self.labels)).astype(np.int64)

    def tally(self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]) -> Tally:
        if not self.multi_label:
            gold = np.array([self._find(_single(row)) for row in rows], np.int64)
            predicted = np.stack(list(logits)).argmax(1).astype(np.int64)
            return Tally.of_pairs(gold, predicted, len(self.labels))
        wanted = np.stack([self.target(row, e) for row, e in zip(rows, encodings, strict=True)]).astype(np.int64)
        given = (sigmoid(np.stack(list(logits))) > THRESHOLD).astype(np.int64)
        return Tally.of_counts(wanted * given, given, wanted)

    def scores(self, totals: Totals) -> dict[str, Floats]:
        exact = ratio(totals.exact, totals.rows)
        if self.multi_label:
            named = {"micro_f1": micro_f1(totals), "macro_f1": macro_f1(totals), "subset_accuracy": exact}
        else:
            named = {"accuracy": exact, "macro_f1": macro_f1(totals), "weighted_f1": weighted_f1(totals)}
        return named | per_class(totals, self.labels)

    def details(self, tally: Tally) -> dict[str, Any]:
        """Single label: `confusion[gold][answer]`; multi label: right, answered and gold per label."""
        if self.multi_label:
            totals = tally.totals()
            columns = {"right": totals.hits, "answered": totals.predicted, "gold": totals.gold}
            return {"per_label": {x: {k: int(v[i]) for k, v in columns.items()} for i, x in enumerate(self.labels)}}
        size = len(self.labels)
        predicted, gold = (tally.counts[:, i * size : (i + 1) * size].argmax(1) for i in (1, 2))
        confusion = np.bincount(gold * size + predicted, tally.times, size * size).astype(np.int64)
        return {"labels": list(self.labels), "confusion": confusion.reshape(size, size).tolist()}

    def verdicts(
        self, logits: Sequence[Logits], rows: Sequence[Row], encodings: Sequence[Encoding]
    ) -> list[Verdict | None]:
        said = self._said_of_many if self.multi_label else self._said_of_one
        return [said(one, row) for one, row in zip(logits, rows, strict=True)]

    def _said_of_one(self, logits: Logits, row: Row) -> Verdict:
        gold, each = self._find(_single(row)), softmax(logits)
        best = int(logits.argmax())
        decided = Decisions.among(each[None], np.array([gold]))
        return Verdict(surprise(each[gold]), self.labels[gold], self.labels[best], float(each[best]), decided)

    def _said_of_many(self, logits: Logits, row: Row) -> Verdict:
        wanted = {self._find(label) for label in _many(row)}
        gold = np.isin(np.arange(len(self.labels)), list(wanted))
        each = sigmoid(logits)
        decided = Decisions.yes_or_no(each, gold, THRESHOLD)
        named = [
            ", ".join(label for label, there in zip(self.labels, mask, strict=True) if there) or "(none)"
            for mask in (gold, each > THRESHOLD)
        ]
        loss = surprise(np.where(gold, each, 1 - each))
        return Verdict(loss, named[0], named[1], float(decided.confidence.min()), decided)

    def answer(self, logits: Logits, encoding: Encoding, asked: Asked) -> dict[str, Any]:
        each = sigmoid(logits) if self.multi_label else softmax(logits)
        scores = {label: float(p) for label, p in zip(self.labels, each, strict=True)}
        if self.multi_label:
            chosen = [label for label, p in scores.items() if p > THRESHOLD]
            return {"labels": chosen, "scores": scores, **seen(encoding)}
        best = self.labels[int(logits.argmax())]
        return {"label": best, "score": scores[best], "scores": scores, **seen(encoding)}

    def agree(self, a: Logits, b: Logits, encoding: Encoding | None = None) -> bool:
        if self.multi_label:
            return bool(((sigmoid(a) > THRESHOLD) == (sigmoid(b) > THRESHOLD)).all())
        return bool(a.argmax() == b.argmax())

    def _find(self, label: str) -> int:
        found = self._index.get(label)
        if found is None:
            raise DataError(
                f"the label '{label}' is not one the model knows{nearest(label, list(self.labels))}",
                hint=f"known: {', '.join(self.labels[:20])}; every label needs rows in the training split",
            )
        return found


def _single(row: Row) -> str:
    if "label" not in row:
        raise DataError("the rows carry several labels each", hint="set task.multi_label to true, or leave it out")
    return str(row["label"])


def _many(row: Row) -> Sequence[str]:
    return row["labels"] if "labels" in row else [row["label"]]
