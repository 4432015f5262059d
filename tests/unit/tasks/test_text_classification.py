"""Labels, loss, metrics and answers of text classification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmo.errors import DataError, InputError
from llmo.tasks.text_classification import TextClassification
from support.tiny import text_rows, tiny_tokenizer


def test_labels_are_found_and_sorted() -> None:
    task = TextClassification.from_rows(text_rows(50), max_length=16, options={})
    assert task.labels == ("business", "sport", "tech")
    assert (task.multi_label, task.metric) == (False, "accuracy")


def test_multi_label_is_seen_from_the_rows() -> None:
    task = TextClassification.from_rows(text_rows(50, multi_label=True), max_length=16, options={"multi_label": None})
    assert (task.multi_label, task.metric, task.problem_type) == (True, "micro_f1", "multi_label_classification")


def test_single_labels_may_be_learnt_as_multi_label() -> None:
    rows = text_rows(30)
    task = TextClassification.from_rows(rows, max_length=16, options={"multi_label": True})
    (encoding,) = task.encode(tiny_tokenizer(), [rows[0]["text"]])
    assert task.target(rows[0], encoding).sum() == 1.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no training rows"),
        ([{"text": "x", "label": "a"}] * 3, "only the label 'a'"),
        ([{"text": "x", "labels": []}], "no label at all"),
    ],
)
def test_nothing_to_learn_is_refused(rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextClassification.from_rows(rows, max_length=16, options={})


def test_several_labels_are_refused_where_one_is_asked_for() -> None:
    with pytest.raises(DataError, match="several labels"):
        TextClassification.from_rows(text_rows(5, multi_label=True), max_length=16, options={"multi_label": False})


def test_an_unknown_label_is_named_with_the_nearest() -> None:
    task = TextClassification(["sport", "tech"])
    (encoding,) = task.encode(tiny_tokenizer(), ["x"])
    with pytest.raises(DataError, match=r"'sports' is not one.*did you mean 'sport'"):
        task.target({"text": "x", "label": "sports"}, encoding)


def test_truncation_is_counted_and_said() -> None:
    task = TextClassification(["a", "b"], max_length=8)
    short, long = task.encode(tiny_tokenizer(), ["good time", "good " * 30])
    assert (short.length, short.truncated) == (4, False)
    assert (len(long.input_ids), long.length) == (8, 32)
    logits = np.array([0.0, 1.0], np.float32)
    assert task.answer(logits, long, "")["truncated"] is True
    assert task.answer(logits, long, "")["tokens"] == 32
    assert "truncated" not in task.answer(logits, short, "")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InputError, match="lone surrogate at character 2"):
        TextClassification(["a", "b"]).encode(tiny_tokenizer(), ["ok", "a \ud83d b"])


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
@pytest.mark.parametrize("multi_label", [False, True])
def test_parts_weighted_by_mass_add_up_to_the_whole(weights: torch.Tensor | None, multi_label: bool) -> None:
    task = TextClassification(["a", "b", "c"], multi_label=multi_label)
    torch.manual_seed(0)
    logits = torch.randn(7, 3)
    targets = (torch.rand(7, 3) > 0.5).float() if multi_label else torch.tensor([0, 1, 2, 1, 0, 0, 1])
    whole = task.loss(logits, targets, weights, 0.1)
    parts = sum(
        task.loss(logits[s], targets[s], weights, 0.1) * task.mass(targets[s], weights)
        for s in (slice(0, 2), slice(2, 7))
    )
    assert torch.allclose(torch.as_tensor(parts) / task.mass(targets, weights), whole, atol=1e-6)


def test_metrics_and_confusion() -> None:
    task = TextClassification(["a", "b"])
    rows = [{"text": "x", "label": label} for label in "aabb"]
    encodings = task.encode(tiny_tokenizer(), ["x"] * 4)
    logits = [np.array(v, np.float32) for v in ([2, 1], [0, 1], [0, 3], [1, 2])]
    found = task.measure(logits, rows, encodings)
    assert found["accuracy"] == 0.75
    assert found["f1/a"] == pytest.approx(2 / 3)
    assert found["f1/b"] == pytest.approx(0.8)
    assert task.details(task.tally(logits, rows, encodings))["confusion"] == [[1, 1], [0, 2]]


def test_multi_label_metrics_and_answer() -> None:
    task = TextClassification(["a", "b"], multi_label=True)
    rows = [{"text": "x", "labels": labels} for labels in (["a"], ["a", "b"], [])]
    encodings = task.encode(tiny_tokenizer(), ["x"] * 3)
    logits = [np.array(v, np.float32) for v in ([2, -1], [3, -1], [-1, -1])]
    found = task.measure(logits, rows, encodings)
    assert found["micro_f1"] == pytest.approx(0.8)
    assert found["subset_accuracy"] == pytest.approx(2 / 3)
    assert task.answer(logits[0], encodings[0], "x")["labels"] == ["a"]
    assert not task.agree(logits[0], logits[2])


def test_class_counts() -> None:
    task = TextClassification(["a", "b", "c"])
    assert task.class_counts([np.asarray(i) for i in (0, 0, 2)]).tolist() == [2, 0, 1]
