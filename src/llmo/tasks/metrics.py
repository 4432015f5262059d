"""Counts that add up over rows, the figures made of them, and their bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

RESAMPLES = 1000
CHUNK = 1 << 24  # numbers drawn at once: 128 MiB
MICRO = 1_000_000  # parts of one in which real numbers are summed: whole numbers add up alike in any order


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a set of rows, or over many resampled sets at once: `sums` is `[..., columns]`, `rows` `[...]`.

    For tasks with labels the columns are, per class, how often it was right (`hits`), given as an answer
    (`predicted`) and asked for (`gold`), and at the end how often a row was wholly right (`exact`).
    """

    sums: Floats
    rows: Floats

    @property
    def hits(self) -> Floats:
        return self._third(0)

    @property
    def predicted(self) -> Floats:
        return self._third(1)

    @property
    def gold(self) -> Floats:
        return self._third(2)

    @property
    def exact(self) -> Floats:
        return np.asarray(self.sums[..., -1])

    @property
    def present(self) -> NDArray[np.bool_]:
        """The classes that occur at all: the others have no F1."""
        return (self.predicted + self.gold) > 0

    def _third(self, number: int) -> Floats:
        return np.asarray(np.split(self.sums[..., :-1], 3, axis=-1)[number])


@dataclass(frozen=True, slots=True)
class Tally:
    """The counts of every row, kept once per distinct row: `counts` is `[distinct, columns]` (see `Totals`)."""

    counts: Counts
    times: Counts

    @classmethod
    def of_pairs(cls, gold: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> Tally:
        """One gold class and one answer per row."""
        codes, times = np.unique(gold * classes + predicted, return_counts=True)
        counts = np.zeros((len(codes), 3 * classes + 1), np.int64)
        row, right = np.arange(len(codes)), codes // classes == codes % classes
        counts[row[right], codes[right] % classes] = 1
        counts[row, classes + codes % classes] = 1
        counts[row, 2 * classes + codes // classes] = 1
        counts[right, -1] = 1
        return cls.merged([cls(counts, times.astype(np.int64))])  # rows in the order that every tally has

    @classmethod
    def of_counts(cls, hits: Counts, predicted: Counts, gold: Counts) -> Tally:
        """Any number of classes per row: three arrays `[rows, classes]`."""
        exact = (hits == predicted).all(1) & (hits == gold).all(1)
        return cls.of_sums(np.concatenate([hits, predicted, gold, exact[:, None]], axis=1).astype(np.int64))

    @classmethod
    def of_sums(cls, columns: Counts) -> Tally:
        """Any numbers that add up over rows, `[rows, columns]`; real ones are given in whole `MICRO` parts."""
        counts, times = np.unique(columns, axis=0, return_counts=True)
        return cls(counts, times.astype(np.int64))

    @classmethod
    def merged(cls, parts: Sequence[Tally]) -> Tally:
        """The tally of all rows of several; a split may be measured part by part."""
        counts, where = np.unique(np.concatenate([part.counts for part in parts]), axis=0, return_inverse=True)
        times = np.bincount(where.ravel(), np.concatenate([part.times for part in parts]), len(counts))
        return cls(counts, times.astype(np.int64))

    def totals(self) -> Totals:
        return self.summed(self.times.astype(np.float64))

    def draws(self, seed: int, resamples: int = RESAMPLES) -> Iterator[Floats]:
        """How often each distinct row is in sets drawn with replacement, each as large as the original: `resamples`
        of them, some at a time `[some, distinct]`."""
        rng = np.random.default_rng(seed)
        rows = int(self.times.sum())
        share = self.times / rows
        step = max(1, CHUNK // max(1, len(share)))
        for done in range(0, resamples, step):
            yield rng.multinomial(rows, share, min(step, resamples - done)).astype(np.float64)

    def summed(self, times: Floats) -> Totals:
        """Totals of each distinct row taken `times` `[..., distinct]`."""
        return Totals(times @ self.counts.astype(np.float64), times.sum(-1))


def with_intervals(
    tally: Tally,
    scores: Callable[[Totals], dict[str, Floats]],
    seed: int,
    ranked: Callable[[Tally, Floats], dict[str, Floats]] = lambda tally, times: {},
) -> dict[str, dict[str, float]]:
    """`{metric: {"value", "low", "high"}}`: the figure and its 95% percentile bootstrap interval over rows.

    `scores` are made of sums; `ranked` of the rows, each of them taken some number of times.
    """

    def both(times: Floats) -> dict[str, Floats]:
        return scores(tally.summed(times)) | ranked(tally, times)

    values = both(tally.times.astype(np.float64))
    resampled = [both(times) for times in tally.draws(seed)]
    found = {}
    for name, value in values.items():
        low, high = np.percentile(np.concatenate([part[name] for part in resampled]), [2.5, 97.5])
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found


def ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, and 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=np.asarray(whole) > 0)


def correlation(x: Floats, y: Floats, times: Floats) -> Floats:
    """Pearson's, of values `[rows]` (or `[..., rows]`) each of which is there `times` `[..., rows]`; 0 where either
    does not vary."""
    rows = times.sum(-1, keepdims=True)
    x, y = (values - (values * times).sum(-1, keepdims=True) / rows for values in (x, y))
    spread = np.sqrt((x * x * times).sum(-1) * (y * y * times).sum(-1))
    return ratio((x * y * times).sum(-1), spread)


def spearman(x: Floats, y: Floats, times: Floats) -> Floats:
    """As `correlation`, of the ranks; equal values share the mean of theirs."""
    return correlation(_ranks(x, times), _ranks(y, times), times)


def _ranks(values: Floats, times: Floats) -> Floats:
    """`[..., rows]`, from 1."""
    order = np.argsort(values, kind="stable")
    first = np.append(True, np.diff(values[order]) != 0)  # of equal ones
    sizes = np.add.reduceat(times[..., order], np.flatnonzero(first), axis=-1)
    ranks = np.empty(times.shape)
    ranks[..., order] = (np.cumsum(sizes, axis=-1) - (sizes - 1) / 2)[..., np.cumsum(first) - 1]
    return ranks


def f1(hits: Floats, predicted: Floats, gold: Floats) -> Floats:
    """Harmonic mean of precision and recall, from counts."""
    return ratio(2 * hits, predicted + gold)


def micro_f1(totals: Totals) -> Floats:
    return f1(totals.hits.sum(-1), totals.predicted.sum(-1), totals.gold.sum(-1))


def macro_f1(totals: Totals) -> Floats:
    """Mean of the classes' F1 over those that occur in gold or answers."""
    each = f1(totals.hits, totals.predicted, totals.gold)
    return ratio(each.sum(-1), totals.present.sum(-1).astype(np.float64))


def weighted_f1(totals: Totals) -> Floats:
    """Mean of the classes' F1, weighted by how often each is gold."""
    each = f1(totals.hits, totals.predicted, totals.gold)
    return ratio((each * totals.gold).sum(-1), totals.gold.sum(-1))


def per_class(totals: Totals, names: tuple[str, ...]) -> dict[str, Floats]:
    """`{"f1/NAME": ...}`."""
    each = f1(totals.hits, totals.predicted, totals.gold)
    return {f"f1/{name}": each[..., i] for i, name in enumerate(names)}


def softmax(logits: NDArray[np.float32]) -> Floats:
    """Over the last axis, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    exp = np.exp(shifted)
    return np.asarray(exp / exp.sum(-1, keepdims=True))


def sigmoid(logits: NDArray[np.float32]) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -60.0, 60.0))))
