"""Regression: its figures are those of the textbooks, on the scale of the rows, whatever that is."""

from __future__ import annotations

import numpy as np
import pytest

from llmo.errors import DataError
from llmo.tasks import metrics
from llmo.tasks.base import Encoding
from llmo.tasks.regression import Regression

NONE = Encoding([2, 3], 2, [(0, 0)] * 2, [None] * 2)


def rows(values: list[float]) -> list[dict[str, float | str]]:
    return [{"text": "a", "value": value} for value in values]


def made(values: list[float]) -> Regression:
    return Regression.from_rows(rows(values), max_length=16, options={})


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e9])
def test_figures_on_the_scale_of_the_rows(scale: float) -> None:
    rng = np.random.default_rng(1)
    gold = (rng.normal(3.0, 2.0, 300) * scale).tolist()
    task = made(gold)
    answers = np.array(gold) + rng.normal(0, 1, 300) * scale
    logits = [np.array([(x - task.mean) / task.std], np.float32) for x in answers]
    found = task.measure(logits, rows(gold), [NONE] * 300)
    errors = answers - np.array(gold)
    assert found["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-4)
    assert found["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert found["r2"] == pytest.approx(1 - (errors**2).sum() / ((gold - np.mean(gold)) ** 2).sum(), abs=1e-4)
    ranks = [np.argsort(np.argsort(x)) for x in (gold, answers)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-4)
    assert task.answer(logits[0], NONE, "a")["value"] == pytest.approx(answers[0], rel=1e-4)


def test_the_mean_explains_nothing_and_has_no_rank() -> None:
    task = made([1.0, 2.0, 3.0])
    found = task.measure([np.zeros(1, np.float32)] * 3, rows([1.0, 2.0, 3.0]), [NONE] * 3)
    assert (found["r2"], found["spearman"]) == (pytest.approx(0.0), 0.0)


def test_a_split_of_one_value_has_no_share_to_explain() -> None:
    task = made([1.0, 2.0, 3.0])
    found = task.measure([np.ones(1, np.float32)] * 2, rows([2.0, 2.0]), [NONE] * 2)
    assert (found["r2"], found["spearman"]) == (0.0, 0.0)
    assert found["rmse"] == pytest.approx(task.std)


def test_a_broken_answer_still_adds_up() -> None:
    found = made([1.0, 2.0]).measure([np.array([1e30], np.float32)] * 2, rows([1.0, 2.0]), [NONE] * 2)
    assert np.isfinite(list(found.values())).all()
    assert found["r2"] < -1e6


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.1, 0.1, 0.1]])
def test_nothing_to_learn(values: list[float]) -> None:
    with pytest.raises(DataError, match="there is nothing to learn"):
        made(values)


def test_agreement_is_a_tenth_of_a_deviation() -> None:
    task = made([0.0, 2.0])
    one = np.array([0.5], np.float32)
    assert task.agree(one, one + 0.09)
    assert not task.agree(one, one + 0.11)


def test_ranks_of_a_resampled_set_are_those_of_its_rows_written_out() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 5, 40).astype(float), rng.normal(size=40)
    times = rng.multinomial(40, np.full(40, 1 / 40), 3).astype(float)
    found = metrics.spearman(x, y, times)
    for each, value in zip(times, found, strict=True):
        index = np.repeat(np.arange(40), each.astype(int))
        assert value == pytest.approx(float(metrics.spearman(x[index], y[index], np.ones(40))))
    plain = [np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for v in x]) for x in (x, y)]
    assert float(metrics.spearman(x, y, np.ones(40))) == pytest.approx(np.corrcoef(*plain)[0, 1])
