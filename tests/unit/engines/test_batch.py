"""Padding: every text keeps its own tokens, and its own logits come back."""

from __future__ import annotations

import numpy as np
import pytest

from llmo.engines.base import Request
from llmo.engines.batch import chunks, pad
from llmo.errors import InputError


def test_texts_are_padded_on_the_right_with_a_mask() -> None:
    ids, mask = pad([Request(0, [5, 6, 7]), Request(1, (8,))], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_a_text_without_tokens_is_named() -> None:
    with pytest.raises(InputError, match="request 41 holds no token"):
        pad([Request(40, [1]), Request(41, [])], 0)


def test_chunks_carry_ids_and_leave_the_padding() -> None:
    requests = [Request(7, [1, 2, 3]), Request(3, [1])]
    logits = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    first, second = chunks(requests, logits)
    assert (first.id, second.id) == (7, 3)
    assert first.data.shape == (3, 2)
    assert second.data.tolist() == [[6.0, 7.0]]
    logits[:] = -1
    assert second.data.tolist() == [[6.0, 7.0]]


def test_logits_of_whole_texts_are_rows() -> None:
    found = list(chunks([Request(0, [1, 2]), Request(1, [1])], np.array([[1, 2], [3, 4]], np.float32)))
    assert [chunk.data.tolist() for chunk in found] == [[1, 2], [3, 4]]
