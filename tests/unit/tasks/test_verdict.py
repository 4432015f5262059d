"""Verdicts on single rows, and the calibration that is summed up of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmo.errors import DataError
from llmo.tasks.base import Encoding
from llmo.tasks.extractive_qa import ExtractiveQA
from llmo.tasks.masked_lm import MaskedLm
from llmo.tasks.next_item import NextItem
from llmo.tasks.regression import Regression
from llmo.tasks.sentence_embedding import SentenceEmbedding
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


def test_a_value_is_off_by_standard_deviations() -> None:
    task = Regression(mean=10.0, std=2.0)
    (found,) = task.verdicts([np.array([1.5], np.float32)], [{"value": 12.0}], [SEEN])
    assert found is not None
    assert (found.loss, found.gold, found.answer, found.decisions) == (0.25, "12", "13", None)


def test_a_span_that_is_wrong_and_certain_is_the_worst() -> None:
    task = ExtractiveQA(max_length=32, unanswerable=True)
    row = {"text": "who was there?", "pair": "bob smith was there", "answers": ["bob smith"], "answer_start": 0}
    (encoding,) = task.encode_rows(tiny_tokenizer(), [row])
    start, end = task.target(row, encoding)[:2]
    sure = np.zeros((len(encoding.input_ids), 2), np.float32)
    sure[start, 0] = sure[end, 1] = 12.0
    nothing = dict(row, answers=[], answer_start=None)
    found = task.verdicts([sure, sure, -sure], [row, nothing, row], [encoding] * 3)
    losses = [one.loss for one in found if one is not None]
    assert losses[0] < 0.01
    assert losses[1] > 4 > losses[2]
    assert [(one.gold, one.answer) for one in found if one is not None][:2] == [
        ("bob smith", "bob smith"),
        ("(none)", "bob smith"),
    ]
    assert [bool(one.decisions.right[0]) for one in found if one is not None and one.decisions] == [True, False, False]


def test_the_next_item_is_one_of_many() -> None:
    task = NextItem(["a", "b", "c"], 8)
    logits = np.log(np.array([0.5, 0.1, 0.4], np.float32))
    rows = [{"text": "a", "label": "c"}, {"text": "a", "label": "b"}, {"text": "a", "label": "new"}]
    right, wrong, unknown = task.verdicts([logits] * 3, rows, [SEEN] * 3)
    assert unknown is None
    assert right is not None
    assert wrong is not None
    assert (right.answer, wrong.answer) == ("c", "c"), "what was there already is not answered"
    assert (right.loss, wrong.loss) == (pytest.approx(-math.log(0.8)), pytest.approx(-math.log(0.2)))


def test_hidden_tokens_and_pairs_have_losses() -> None:
    hidden = np.array([[-1.0, 1.0], [-3.0, 0.0]], np.float32)
    some, none = MaskedLm((), 8, mask_id=1, special_ids=[1], vocabulary=9).verdicts([hidden, hidden[:0]], [{}] * 2, [])
    assert some is not None
    assert (some.loss, none) == (2.0, None)
    vectors = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    pair, score = (
        task.verdicts([vectors], [{"pair": "p", "score": 4.0}], [SEEN])[0]
        for task in (SentenceEmbedding(), SentenceEmbedding(scored=True, low=0.0, high=5.0))
    )
    assert pair is not None
    assert score is not None
    assert (pair.loss, pair.gold) == (pytest.approx(0.4), "p")
    assert (score.loss, score.gold, score.answer) == (pytest.approx(0.04), "4: p", "3")
