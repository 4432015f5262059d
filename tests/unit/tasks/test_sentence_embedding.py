"""Sentence embedding: what is a negative and what is not, and ranks that nobody gets for free."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from llmo.errors import DataError
from llmo.tasks.sentence_embedding import SCALE, SentenceEmbedding
from llmo.training.against import differences
from support.tiny import pair_rows, tiny_tokenizer

PAIRS = [("how are you", "fine"), ("what is this", "a lamp"), ("who are you", "fine"), ("how are you", "well")]


def rows(pairs: list[tuple[str, str]], **more: Any) -> list[dict[str, Any]]:
    return [{"text": a, "pair": b, "negative": None, "score": None, **more} for a, b in pairs]


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def targets(task: SentenceEmbedding, some: list[dict[str, Any]]) -> torch.Tensor:
    lessons = task.lessons(tiny_tokenizer(), some)
    return torch.from_numpy(np.repeat(np.stack([task.target(*lesson) for lesson in lessons]), task.group, axis=0))


def test_the_loss_is_cross_entropy_over_the_true_negatives() -> None:
    task = SentenceEmbedding.from_rows(rows(PAIRS), max_length=16, options={})
    vectors = torch.from_numpy(unit(8))
    cosines = SCALE * vectors[::2] @ vectors[1::2].T
    # Not told apart: the same answer (0 and 2), and another answer to the same text (0 and 3).
    for i, j in ((0, 2), (2, 0), (0, 3), (3, 0)):
        cosines[i, j] = -torch.inf
    expected = functional.cross_entropy(cosines, torch.arange(4))
    assert float(task.loss(vectors, targets(task, rows(PAIRS)), None)) == pytest.approx(float(expected), abs=1e-5)


def test_negatives_of_all_rows_are_candidates() -> None:
    some = [{**row, "negative": "a lamp" if i != 1 else "a bed"} for i, row in enumerate(rows(PAIRS))]
    task = SentenceEmbedding.from_rows(some, max_length=16, options={})
    vectors = torch.from_numpy(unit(12, seed=1))
    anchors, pairs, negatives = (vectors[i::3] for i in range(3))
    cosines = SCALE * anchors @ torch.cat([pairs, negatives]).T
    for i, j in ((0, 2), (2, 0), (0, 3), (3, 0), (1, 4), (1, 6), (1, 7)):  # the last three are row 1's own pair
        cosines[i, j] = -torch.inf
    expected = functional.cross_entropy(cosines, torch.arange(4))
    assert float(task.loss(vectors, targets(task, some), None)) == pytest.approx(float(expected), abs=1e-5)
    assert task.mass(targets(task, some), None) == 4


def test_a_model_that_says_the_same_of_every_text_finds_nothing() -> None:
    task = SentenceEmbedding(max_length=16)
    some = pair_rows(30, seed=1)
    same = [np.stack([unit(1)[0]] * 2)] * 30
    assert task.measure(same, some, [])["recall_at_1"] == 0.0
    assert task.measure(same, some, [])["mrr"] == pytest.approx(1 / 30, abs=1e-6)


def test_ranks_leave_out_what_is_right_too() -> None:
    """The nearest of row 0 is the answer of row 2, which reads the same; row 3 asks the same."""
    task = SentenceEmbedding(max_length=16)
    basis = np.eye(4, dtype=np.float32)
    vectors = [np.stack([basis[0], basis[0] * 0.5]), np.stack([basis[1], basis[1]])]
    vectors += [np.stack([basis[2], basis[0]]), np.stack([basis[3], basis[0] * 0.9])]
    found = task.tally(vectors, rows(PAIRS), []).totals()
    assert found.sums[0] / 1e6 == 2  # rows 0 and 1; rows 2 and 3 have the others before them


@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_two_models_differ_by_what_each_is_measured_with(kind: str) -> None:
    """By ranks among all rows and by rank correlation, neither of which a row has by itself."""
    some = pair_rows(30, seed=2, kind=kind)
    task = SentenceEmbedding.from_rows(some, max_length=16, options={})
    said = [list(unit(60, seed).reshape(30, 2, 8)) for seed in (3, 4)]
    found = differences(*((task, task.counted(one, some, [])) for one in said))
    measured = [task.measure(one, some, []) for one in said]
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(
        {name: measured[0][name] - measured[1][name] for name in measured[0]}
    )
    assert found[task.metric]["low"] < found[task.metric]["value"] < found[task.metric]["high"]


def test_scores_of_any_scale_become_cosines() -> None:
    some = [{**row, "score": float(i)} for i, row in enumerate(rows(PAIRS))]
    task = SentenceEmbedding.from_rows(some, max_length=16, options={})
    assert (task.low, task.high, task.metric) == (0.0, 3.0, "spearman")
    assert targets(task, some)[::2, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    within = [{**row, "score": 0.2 * i - 0.3} for i, row in enumerate(rows(PAIRS))]
    task = SentenceEmbedding.from_rows(within, max_length=16, options={})
    assert targets(task, within)[::2, 0].tolist() == pytest.approx([-0.3, -0.1, 0.1, 0.3])


def test_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="have the score 2"):
        SentenceEmbedding.from_rows(rows(PAIRS, score=2.0), max_length=16, options={})
    with pytest.raises(DataError, match="one pair has nothing to be told apart from"):
        SentenceEmbedding.from_rows(rows(PAIRS[:1]), max_length=16, options={})
