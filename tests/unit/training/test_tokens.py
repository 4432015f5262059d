"""Tokens that are kept are those that were made, and what cannot be read is made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmo import plugins
from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.tasks.base import Task
from llmo.training import batches, states, tokens
from support.tiny import tiny_dataset, tiny_tokenizer

KINDS = ("text-classification", "token-classification", "extractive-qa", "regression")


def no_progress(done: int) -> None:
    return


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(tokens, "WORTH", 0)
    rows = list(Dataset.open(tiny_dataset(tmp_path / "data", kind)).split("train"))
    cls: type[Task] = plugins.load("llmo.tasks", kind)
    task, ctx = cls.from_rows(rows, max_length=32, options={}), NullContext(1, tmp_path / "job")
    expected = batches.encode(task, tiny_tokenizer(), rows, no_progress)
    found = [tokens.encode(task, tiny_tokenizer(), rows, no_progress, ctx)]
    with monkeypatch.context() as patched:
        patched.delattr(batches, "encode")
        found.append(tokens.encode(task, tiny_tokenizer(), rows, no_progress, ctx))
    (kept,) = ctx.cache().glob(f"*/{states.FILE}")
    kept.write_bytes(kept.read_bytes()[:100])
    found.append(tokens.encode(task, tiny_tokenizer(), rows, no_progress, ctx))
    for one in found:
        assert (one.ids == expected.ids).all()
        assert (one.starts == expected.starts).all()
        assert [getattr(one, name) for name in tokens.NUMBERS] == [getattr(expected, name) for name in tokens.NUMBERS]
        for mine, theirs in zip(one.targets, expected.targets, strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert (mine == theirs).all()


def test_other_rows_have_tokens_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "WORTH", 0)
    rows = list(Dataset.open(tiny_dataset(tmp_path / "data")).split("train"))
    cls: type[Task] = plugins.load("llmo.tasks", "text-classification")
    task, ctx = cls.from_rows(rows, max_length=32, options={}), NullContext(1, tmp_path / "job")
    whole = tokens.encode(task, tiny_tokenizer(), rows, no_progress, ctx)
    part = tokens.encode(task, tiny_tokenizer(), rows[1:], no_progress, ctx)
    assert (len(part), len(whole)) == (len(rows) - 1, len(rows))
    changed = [{**rows[0], "label": next(row["label"] for row in rows if row["label"] != rows[0]["label"])}, *rows[1:]]
    other = tokens.encode(task, tiny_tokenizer(), changed, no_progress, ctx)
    assert not np.array_equal(other.targets[0], whole.targets[0])
