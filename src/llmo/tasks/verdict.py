"""What a model said of single rows against what is right: worst errors and calibration are made of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmo.tasks.metrics import Floats

BINS = 10
_TINY = 1e-300  # the least probability that a logarithm is taken of


@dataclass(frozen=True, slots=True)
class Decisions:
    """Everything a row asked to decide (a label; each of several labels; each word), `[decisions]`: the probability of
    what was decided, whether it was right, and its Brier score."""

    confidence: Floats
    right: NDArray[np.bool_]
    brier: Floats

    @classmethod
    def among(cls, probabilities: Floats, gold: NDArray[np.int64]) -> Decisions:
        """One class of many each: `[decisions, classes]` and `[decisions]`."""
        best = probabilities.argmax(-1)
        wanted = np.eye(probabilities.shape[-1])[gold]
        return cls(probabilities.max(-1), best == gold, ((probabilities - wanted) ** 2).sum(-1))

    @classmethod
    def yes_or_no(cls, probabilities: Floats, gold: NDArray[np.bool_], threshold: float) -> Decisions:
        """`[decisions]` both; Brier's sum over the two classes."""
        said = probabilities > threshold
        return cls(np.where(said, probabilities, 1 - probabilities), said == gold, 2 * (probabilities - gold) ** 2)

    @classmethod
    def whether_right(cls, probability: float, *, right: bool) -> Decisions:
        """One answer that its model takes for right with this probability."""
        brier = 2 * (probability - right) ** 2
        return cls(np.array([probability]), np.array([right]), np.array([brier]))

    @property
    def surprise(self) -> float:
        """The mean natural loss of what turned out, of answers that are right or wrong."""
        return surprise(np.where(self.right, self.confidence, 1 - self.confidence))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one row: `loss` (natural, the mean over its decisions or tokens; what else it is a task says), what is right
    and what was answered in words, `score` the probability of that answer. `decisions` is None where answers carry no
    probability."""

    loss: float
    gold: str
    answer: str
    score: float | None = None
    decisions: Decisions | None = None


@dataclass(slots=True)
class Calibration:
    """Whether probabilities mean what they say, summed up over rows in `BINS` equal bins of confidence.

    The expected calibration error is that of Guo et al. 2017; the Brier score is Brier's own of 1950, from 0 to 2.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    right: Floats = field(default_factory=lambda: np.zeros(BINS))
    confidence: Floats = field(default_factory=lambda: np.zeros(BINS))
    brier: float = 0.0

    def add(self, decisions: Decisions) -> None:
        where = np.minimum((decisions.confidence * BINS).astype(np.int64), BINS - 1)
        self.counts += np.bincount(where, minlength=BINS)
        self.right += np.bincount(where, decisions.right, BINS)
        self.confidence += np.bincount(where, decisions.confidence, BINS)
        self.brier += float(decisions.brier.sum())

    def to_json(self) -> dict[str, Any] | None:
        """`{"ece", "brier", "decisions", "bins": [{"low", "high", "count", "confidence", "accuracy"}]}`; empty bins are
        left out, and None stands for no decision at all."""
        total = int(self.counts.sum())
        if not total:
            return None
        there = np.flatnonzero(self.counts)
        bins = [
            {
                "low": int(i) / BINS,
                "high": (int(i) + 1) / BINS,
                "count": int(self.counts[i]),
                "confidence": float(self.confidence[i] / self.counts[i]),
                "accuracy": float(self.right[i] / self.counts[i]),
            }
            for i in there
        ]
        error = float(np.abs(self.right - self.confidence).sum() / total)
        return {"ece": error, "brier": self.brier / total, "decisions": total, "bins": bins}


def surprise(probabilities: Floats) -> float:
    """The mean natural loss of what was right, from the probabilities it was given."""
    return float(-np.log(np.maximum(probabilities, _TINY)).mean())
