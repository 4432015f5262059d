"""Parts of a data set for cross-validation: each row is held out once, in shares, by content and seed alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmo.data.dataset import Dataset
from llmo.data.folds import Fold, held_out
from llmo.errors import DataError
from support.tiny import text_rows, tiny_dataset


def parts(rows: list[dict[str, Any]], of: int, seed: int = 1) -> list[list[int]]:
    return [held_out(rows, index=index, of=of, seed=seed) for index in range(of)]


def test_each_row_is_held_out_once_and_labels_in_their_shares() -> None:
    rows = text_rows(100)
    found = parts(rows, 4)
    assert sorted(number for part in found for number in part) == list(range(100))
    for label, count in Counter(row["label"] for row in rows).items():
        shares = [sum(rows[number]["label"] == label for number in part) for part in found]
        assert max(shares) - min(shares) <= 1, (label, count, shares)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_the_parts_go_by_content_and_seed_and_not_by_order() -> None:
    rows = text_rows(60)
    mixed = random.Random(5).sample(rows, 60)
    texts = [
        [{rows[n]["id"] for n in part} for part in parts(rows, 3)],
        [{mixed[n]["id"] for n in p} for p in parts(mixed, 3)],
    ]
    assert texts[0] == texts[1]
    assert parts(rows, 3, seed=2) != parts(rows, 3, seed=1)


def test_equal_texts_stay_together() -> None:
    rows = [{"text": f"text {number % 10}", "label": "ab"[number % 2]} for number in range(40)]
    for part in parts(rows, 3):
        assert not {rows[n]["text"] for n in part} & {rows[n]["text"] for n in set(range(40)) - set(part)}


def test_questions_on_one_context_stay_together() -> None:
    rows = [{"text": f"question {n}", "pair": f"context {n % 8}", "answers": [], "id": str(n)} for n in range(40)]
    for part in parts(rows, 3):
        assert not {rows[n]["pair"] for n in part} & {rows[n]["pair"] for n in set(range(40)) - set(part)}


def test_a_label_of_one_row_is_always_learnt_and_several_labels_too() -> None:
    rows: list[dict[str, Any]] = [{"text": f"t{n}", "labels": ["a"] if n % 2 else ["a", "b"]} for n in range(20)]
    rows += [{"text": "odd", "labels": ["b", "rare"]}]
    for part in parts(rows, 5):
        kept = {label for n in set(range(21)) - set(part) for label in rows[n]["labels"]}
        assert kept == {"a", "b", "rare"}
    assert 20 not in [number for part in parts(rows, 5) for number in part]


def test_rows_without_labels_and_spans_are_divided_too() -> None:
    chats = [{"text": f"chat {n}", "messages": "[]"} for n in range(9)]
    assert sorted(map(len, parts(chats, 2))) == [4, 5]
    spans = [{"text": f"t{n}", "spans": [{"start": 0, "end": 1, "label": "xy"[n % 2]}]} for n in range(8)]
    for part in parts(spans, 2):
        assert Counter(spans[n]["spans"][0]["label"] for n in part) == {"x": 2, "y": 2}


def test_fewer_rows_than_parts_are_refused() -> None:
    with pytest.raises(DataError, match="5 folds need at least 5 different rows"):
        held_out(text_rows(4), index=0, of=5, seed=1)


def test_a_fold_is_a_data_set_whose_test_rows_are_what_they_were(tmp_path: Path) -> None:
    whole = Dataset.open(tiny_dataset(tmp_path / "data"))
    folds = [Fold(whole, index=index, of=4, seed=1) for index in range(4)]
    for fold in folds:
        assert len(fold.split("train")) == 96
        assert len(fold.split("dev")) == 32
        assert list(fold.split("test")) == list(whole.split("test"))
        assert not {row["text"] for row in fold.split("train")} & {row["text"] for row in fold.split("dev")}
    texts = [row["text"] for split in ("train", "dev") for row in whole.split(split)]
    assert sorted(row["text"] for fold in folds for row in fold.split("dev")) == sorted(texts)
    assert not list((tmp_path / "data").glob("*fold*")), "nothing is copied"
