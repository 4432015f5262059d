"""SQuAD's own way to compare answers, on what its evaluation script says of them."""

from __future__ import annotations

import pytest

from llmo.tasks import spelled


@pytest.mark.parametrize(
    ("said", "answers", "exact", "f1"),
    [
        ("The Empire State Building.", ["empire state building"], True, 1.0),
        ("the  $76", ["76"], True, 1.0),
        ("Paris", ["Rome", "Paris, France"], False, 2 / 3),
        ("Paris", ["Rome", "paris"], True, 1.0),
        ("in in Paris", ["in Paris"], False, 0.8),
        ("the", ["a"], True, 1.0),
        ("the", ["Rome"], False, 0.0),
        ("北京市", ["北京"], False, 0.8),
        ("北京", ["「北京」"], True, 1.0),
        (None, [], True, 1.0),
        (None, ["Rome"], False, 0.0),
        ("Rome", [], False, 0.0),
    ],
)
def test_compare(said: str | None, answers: list[str], exact: bool, f1: float) -> None:
    assert spelled.compare(said, answers) == (exact, pytest.approx(f1))
