"""The figures against definitions worked out row by row."""

from __future__ import annotations

import numpy as np
import pytest

from llmo.tasks import metrics
from llmo.tasks.metrics import Tally


def by_hand(gold: list[int], predicted: list[int], label: int) -> float:
    pairs = list(zip(gold, predicted, strict=True))
    right = sum(g == p == label for g, p in pairs)
    given, wanted = predicted.count(label), gold.count(label)
    precision, recall = (right / given if given else 0.0), (right / wanted if wanted else 0.0)
    return 2 * precision * recall / (precision + recall) if right else 0.0


def test_pairs_give_the_same_counts_as_sets_of_one() -> None:
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    hot = np.eye(5, dtype=np.int64)
    a = Tally.of_pairs(gold, predicted, 5).totals()
    b = Tally.of_counts(hot[gold] * hot[predicted], hot[predicted], hot[gold]).totals()
    for name in ("hits", "predicted", "gold", "exact", "rows"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_f1_scores_follow_their_definitions() -> None:
    gold, predicted = [0, 0, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 0, 2, 2]
    totals = Tally.of_pairs(np.array(gold), np.array(predicted), 4).totals()
    each = [by_hand(gold, predicted, label) for label in range(3)]
    weights = [gold.count(label) / len(gold) for label in range(3)]
    assert metrics.macro_f1(totals) == pytest.approx(np.mean(each))  # the fourth class never occurs
    assert metrics.weighted_f1(totals) == pytest.approx(np.dot(each, weights))
    assert metrics.micro_f1(totals) == pytest.approx(5 / 8)
    assert [float(v) for v in metrics.per_class(totals, ("a", "b", "c", "d")).values()] == pytest.approx([*each, 0.0])


def test_interval_covers_the_value_and_matches_the_binomial() -> None:
    gold = np.zeros(1000, np.int64)
    predicted = np.array([0] * 900 + [1] * 100)
    tally = Tally.of_pairs(gold, predicted, 2)
    found = metrics.with_intervals(tally, lambda t: {"accuracy": metrics.ratio(t.exact, t.rows)}, seed=1)["accuracy"]
    deviation = np.sqrt(0.9 * 0.1 / 1000)
    assert found["value"] == pytest.approx(0.9)
    assert found["low"] == pytest.approx(0.9 - 1.96 * deviation, abs=0.004)
    assert found["high"] == pytest.approx(0.9 + 1.96 * deviation, abs=0.004)


def test_interval_is_seeded_and_drawn_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally.of_pairs(np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 0, 1]), 2)
    whole = np.concatenate(list(tally.draws(3)))
    monkeypatch.setattr(metrics, "CHUNK", 7)
    parts = list(tally.draws(3))
    assert len(parts) > 1
    assert whole.shape == (metrics.RESAMPLES, len(tally.times))
    assert np.array_equal(whole, np.concatenate(parts))
    assert (tally.summed(whole).rows == 5).all()


def test_softmax_and_sigmoid_bear_extremes() -> None:
    assert metrics.softmax(np.array([1e4, -1e4], np.float32)).tolist() == [1.0, 0.0]
    assert np.isfinite(metrics.sigmoid(np.array([1e6, -1e6], np.float32))).all()
