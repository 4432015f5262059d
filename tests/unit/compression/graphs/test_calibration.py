"""Calibration texts: every length, none twice, and a clear word where they cannot do."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest

from llmo.compression.graphs.calibration import LEAST, activations, choose, logits
from llmo.errors import DataError


def test_every_length_is_there_and_no_text_twice(texts: list[list[int]]) -> None:
    many = [*texts, *texts, *([texts[0]] * 50), []]
    chosen = choose(many, 20)
    assert len({tuple(ids) for ids in chosen}) == len(chosen) == 20
    assert all(ids in texts for ids in chosen)
    lengths, all_lengths = [len(ids) for ids in chosen], sorted(len(ids) for ids in texts)
    assert lengths == sorted(lengths)
    assert lengths[0] <= all_lengths[2]
    assert lengths[-1] >= all_lengths[-3]
    assert abs(np.median(lengths) - np.median(all_lengths)) <= 3


def test_the_choice_follows_from_the_texts_and_the_seed_alone(texts: list[list[int]]) -> None:
    shuffled = random.Random(1).sample(texts, len(texts))
    assert choose(shuffled, 20, seed=7) == choose(texts, 20, seed=7) != choose(texts, 20, seed=8)


def test_all_are_taken_when_fewer_are_there_than_asked(texts: list[list[int]]) -> None:
    assert sorted(choose(texts[:LEAST], 500)) == sorted(texts[:LEAST])


def test_too_few_different_texts_are_refused(texts: list[list[int]]) -> None:
    with pytest.raises(DataError, match=f"{LEAST - 1} different texts are too few") as caught:
        choose(texts[: LEAST - 1] * 10, 64)
    assert "static" in caught.value.hint


def test_texts_that_differ_in_next_to_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="all alike: two of them share 9"):
        choose([[2, *range(100, 160), number, 3] for number in range(5, 45)], 32)


def test_activations_are_those_of_the_tokens_alone(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    outputs = len(model.graph.output)
    found = list(activations(model, ["hidden", "select"], texts[:3]))
    assert [one["hidden"].shape for one in found] == [(len(ids), 32) for ids in texts[:3]]
    assert np.array_equal(found[0]["select"][0], found[0]["hidden"][0])  # BERT reads its first token
    assert len(model.graph.output) == outputs
    assert [one.shape for one in logits(model, texts[:3])] == [(3,)] * 3
