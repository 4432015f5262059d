"""The order of rows is a pure function, and padding is only as wide as it must be."""

from __future__ import annotations

import numpy as np
import pytest

from llmo.tasks.base import Task
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.training import batches
from support.tiny import span_rows, text_rows, tiny_tokenizer


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000])
def test_every_row_is_seen_once_an_epoch(count: int) -> None:
    found = batches.order(np.arange(count) % 37, 16, seed=1, epoch=0)
    assert len(found) == -(-count // 16)
    assert sorted(np.concatenate(found)) == list(range(count))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    lengths = np.random.default_rng(0).integers(3, 128, 500)
    first = batches.order(lengths, 16, seed=1, epoch=2)
    np.random.seed(99)
    again = batches.order(lengths, 16, seed=1, epoch=2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for seed, epoch in ((1, 3), (2, 2)):
        other = batches.order(lengths, 16, seed=seed, epoch=epoch)
        assert np.concatenate(first).tolist() != np.concatenate(other).tolist()


def test_batches_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 128, 1600)
    padded = sum(len(b) * lengths[b].max() for b in batches.order(lengths, 16, seed=1, epoch=0))
    assert padded < 1.05 * lengths.sum()
    assert 16 * sum(lengths[i : i + 16].max() for i in range(0, 1600, 16)) > 1.7 * lengths.sum()  # arrival order


@pytest.mark.parametrize(("longest", "limit", "width"), [(3, 128, 8), (8, 128, 8), (9, 128, 16), (99, 100, 100)])
def test_padding_is_rounded_up_within_the_limit(longest: int, limit: int, width: int) -> None:
    found = batches.padded([[7] * longest, [5]], pad_id=9, limit=limit)
    assert found["input_ids"].shape == (2, width)
    assert found["attention_mask"].sum(1).tolist() == [longest, 1]
    assert found["input_ids"][1].tolist() == [5] + [9] * (width - 1)


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        (TextClassification(["business", "sport", "tech"], 24), text_rows(70)),
        (TextClassification(["business", "sport", "tech"], 24, multi_label=True), text_rows(70, multi_label=True)),
        (TokenClassification.from_rows(span_rows(70), max_length=12, options={}), span_rows(70)),
    ],
    ids=["single", "multi", "tokens"],
)
def test_encoded_rows_come_back_in_batches(
    task: Task, rows: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK", 32)
    done: list[int] = []
    data = batches.encode(task, tiny_tokenizer(), rows, done.append)
    assert done == [32, 64, 70]
    direct = task.encode(tiny_tokenizer(), [str(r["text"]) for r in rows])
    assert data.lengths.tolist() == [len(e.input_ids) for e in direct]
    assert data.truncated == sum(e.truncated for e in direct) > 0
    picked = np.array([5, 40, 69])
    inputs, targets = batches.collate(data, picked, 0)
    for line, i in enumerate(picked):
        length = len(direct[i].input_ids)
        assert inputs["input_ids"][line, :length].tolist() == direct[i].input_ids
        assert inputs["input_ids"][line, length:].sum() == 0
        wanted = task.target(rows[i], direct[i])
        if wanted.ndim and wanted.dtype == np.int64:
            assert targets[line, :length].tolist() == wanted.tolist()
            assert (targets[line, length:] == -100).all()
        else:
            assert targets[line].tolist() == wanted.tolist()


def test_few_sizes_fill_up_little_where_a_gpu_is_busy() -> None:
    found = [batches.few(count) for count in range(1, 40_000)]
    assert all(size >= count for count, size in enumerate(found, 1))
    assert found == sorted(found)
    assert len(set(found)) < 60
    assert max(size / count for count, size in enumerate(found, 1) if count > batches.MULTIPLE) <= 1.8
    assert max(size / count for count, size in enumerate(found, 1) if count > batches.BUSY) <= 1.125
    assert [batches.few(100, rows) for rows in (1, 16, 100)] == [128, 128, 104]
