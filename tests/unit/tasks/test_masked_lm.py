"""Masked language modelling: which tokens are hidden, how, and what is measured of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmo.errors import InputError, ModelError
from llmo.tasks.base import IGNORED
from llmo.tasks.masked_lm import Hidden, MaskedLm
from support.tiny import text_rows, tiny_model, tiny_tokenizer
from support.tiny_chat import tiny_chat_model

MASK, SPECIAL = 4, {0, 1, 2, 3, 4}
ROWS = text_rows(60, 3)


@pytest.fixture
def task(tmp_path: Path) -> MaskedLm:
    return MaskedLm.from_rows(ROWS, max_length=32, options=MaskedLm.of_base(tiny_model(tmp_path / "base")))


def test_the_special_tokens_are_those_of_the_base(task: MaskedLm) -> None:
    assert (task.mask_id, task.special_ids) == (MASK, SPECIAL)
    assert MaskedLm.from_card(json.loads(json.dumps(task.to_card()))).to_card() == task.to_card()


def test_a_base_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no token to hide"):
        MaskedLm.of_base(tiny_chat_model(tmp_path / "base"))


def test_fifteen_percent_are_hidden_and_most_of_them_behind_the_mask(task: MaskedLm) -> None:
    ids = np.arange(5, 105, dtype=np.int64).repeat(100)
    shown, answers = task.hide(ids, ids, np.random.default_rng(0))
    there = answers != IGNORED
    assert there.sum() == 1500
    assert (answers[there] == ids[there]).all()
    assert (shown[~there] == ids[~there]).all()
    assert (shown[there] == MASK).mean() == pytest.approx(0.8, abs=0.04)
    assert (shown[there] == ids[there]).mean() == pytest.approx(0.1, abs=0.03)


def test_a_text_hides_the_same_tokens_every_time_and_no_special_ones(task: MaskedLm) -> None:
    one = task.encode_rows(tiny_tokenizer(), ROWS)
    assert one == list(reversed(task.encode_rows(tiny_tokenizer(), ROWS[::-1])))
    plain = task.encode(tiny_tokenizer(), [row["text"] for row in ROWS])
    for hidden, whole in zip(one, plain, strict=True):
        assert isinstance(hidden, Hidden)
        answers = np.array(hidden.answers)
        assert (answers != IGNORED).sum() == max(1, round(0.15 * (len(whole.input_ids) - 2)))
        assert not set(answers.tolist()) & SPECIAL
        assert task.target({}, hidden).tolist() == hidden.answers


def test_a_long_text_is_learnt_in_pieces(task: MaskedLm) -> None:
    row = {"text": "good time " * 50}
    lessons = task.lessons(tiny_tokenizer(), [row])
    assert [len(lesson.input_ids) for _, lesson in lessons] == [32, 32, 32, 12]
    assert sum((task.target(row, lesson) != IGNORED).sum() for _, lesson in lessons) == 100


def test_what_is_kept_of_logits_is_of_the_hidden_tokens(task: MaskedLm) -> None:
    encodings = task.encode_rows(tiny_tokenizer(), ROWS)
    logits = [np.full((len(e.input_ids), task.vocabulary), 0.0, np.float32) for e in encodings]
    even = task.measure([task.kept(x, e) for x, e in zip(logits, encodings, strict=True)], ROWS, encodings)
    assert even["masked_perplexity"] == pytest.approx(task.vocabulary, rel=1e-4)
    for x, e in zip(logits, encodings, strict=True):
        for place, answer in enumerate(e.answers):
            x[place, answer] = 50.0 if answer != IGNORED else x[place, answer]
    sure = task.measure([task.kept(x, e) for x, e in zip(logits, encodings, strict=True)], ROWS, encodings)
    assert (sure["masked_perplexity"], sure["masked_accuracy"]) == (pytest.approx(1.0), 1.0)
    assert task.drop(sure["masked_perplexity"], even["masked_perplexity"]) > 0


def test_evidence_is_of_every_token(task: MaskedLm) -> None:
    (encoding,) = task.encode(tiny_tokenizer(), ["good time"])
    rng = np.random.default_rng(0)
    a = task.kept(rng.normal(size=(4, task.vocabulary)).astype(np.float32), encoding)
    assert a.shape == (4, 1)
    assert task.agree(a, a)
    assert not task.agree(a, np.zeros_like(a))


def test_it_answers_nothing(task: MaskedLm) -> None:
    (encoding,) = task.encode(tiny_tokenizer(), ["good time"])
    with pytest.raises(InputError, match="a base for other tasks"):
        task.answer(np.zeros((4, task.vocabulary), np.float32), encoding, "good time")
