"""Verdicts on single rows, and the calibration that is summed up of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmo.errors import DataError
from llmo.tasks.base import Encoding
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.verdict import Calibration, Decisions
from support.tiny import span_rows, tiny_tokenizer

SEEN = Encoding([1], 1, [], [])


def test_one_label() -> None:
    task = TextClassification(["a", "b"])
    logits = np.log(np.array([0.8, 0.2], np.float32))
    right, wrong = task.verdicts([logits] * 2, [{"label": "a"}, {"label": "b"}], [SEEN] * 2)
    assert right is not None
    assert wrong is not None
    assert (right.gold, right.answer, wrong.gold, wrong.answer) == ("a", "a", "b", "a")
    assert right.score == pytest.approx(0.8)
    assert right.loss == pytest.approx(-math.log(0.8))
    assert wrong.loss == pytest.approx(-math.log(0.2))
    assert right.decisions is not None
    assert wrong.decisions is not None
    assert right.decisions.brier[0] == pytest.approx(2 * 0.2**2)
    assert wrong.decisions.brier[0] == pytest.approx(2 * 0.8**2)
    assert (bool(right.decisions.right[0]), bool(wrong.decisions.right[0])) == (True, False)
    with pytest.raises(DataError, match="not one the model knows"):
        task.verdicts([logits], [{"label": "c"}], [SEEN])


def test_a_certain_mistake_has_a_finite_loss() -> None:
    task = TextClassification(["a", "b"])
    (found,) = task.verdicts([np.array([2000, -2000], np.float32)], [{"label": "b"}], [SEEN])
    assert found is not None
    assert math.isfinite(found.loss)
    assert found.loss > 100


def test_several_labels_are_each_yes_or_no() -> None:
    task = TextClassification(["a", "b", "c"], multi_label=True)
    logits = np.array([3.0, -3.0, 3.0], np.float32)
    (found,) = task.verdicts([logits], [{"labels": ["a"]}], [SEEN])
    assert found is not None
    assert found.decisions is not None
    assert (found.gold, found.answer) == ("a", "a, c")
    assert found.decisions.right.tolist() == [True, True, False]
    sure = 1 / (1 + math.exp(-3.0))
    assert found.decisions.confidence == pytest.approx([sure] * 3)
    assert found.decisions.brier == pytest.approx([2 * (1 - sure) ** 2, 2 * (1 - sure) ** 2, 2 * sure**2])
    (none,) = task.verdicts([-np.abs(logits)], [{"labels": []}], [SEEN])
    assert none is not None
    assert (none.gold, none.answer) == ("(none)", "(none)")


def test_words_of_a_text() -> None:
    from llmo.tasks.token_classification import TokenClassification

    rows = [row for row in span_rows(30) if row["spans"]][:4]
    task = TokenClassification.from_rows(rows, max_length=64, options={})
    encodings = task.encode_rows(tiny_tokenizer(), rows)
    perfect = []
    for row, encoding in zip(rows, encodings, strict=True):
        logits = np.full((len(encoding.input_ids), len(task.labels)), -9.0, np.float32)
        for token, label in enumerate(task.target(row, encoding)):
            logits[token, max(label, 0)] = 9.0
        perfect.append(logits)
    for verdict, row in zip(task.verdicts(perfect, rows, encodings), rows, strict=True):
        assert verdict is not None
        assert verdict.decisions is not None
        assert verdict.gold == verdict.answer
        assert row["spans"][0]["label"] in verdict.gold
        assert verdict.decisions.right.all()
        assert verdict.loss < 1e-6
    worst = task.verdicts([-logits for logits in perfect], rows, encodings)
    assert all(verdict is not None and verdict.loss > 5 for verdict in worst)


def test_calibration_by_hand() -> None:
    found = Calibration()
    assert found.to_json() is None
    confidence = np.array([0.95, 0.95, 0.65, 1.0])
    found.add(Decisions(confidence, np.array([True, False, True, True]), np.array([0.1, 0.9, 0.2, 0.0])))
    told = found.to_json()
    assert told is not None
    assert told["brier"] == pytest.approx(0.3)
    low, high = told["bins"]
    assert (low["low"], low["count"], low["accuracy"], low["confidence"]) == (0.6, 1, 1.0, pytest.approx(0.65))
    assert (high["high"], high["count"]) == (1.0, 3)
    assert told["ece"] == pytest.approx((abs(1 - 0.65) + abs(2 - 2.9)) / 4)


def test_probabilities_that_mean_what_they_say_have_no_error() -> None:
    rng = np.random.default_rng(0)
    found = Calibration()
    for _ in range(20):  # as rows come, part by part
        sure = rng.uniform(0.5, 1.0, 1000)
        found.add(Decisions(sure, rng.uniform(size=1000) < sure, np.zeros(1000)))
    told = found.to_json()
    assert told is not None
    assert told["ece"] < 0.02
    assert told["decisions"] == 20_000
