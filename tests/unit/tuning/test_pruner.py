"""Where the bars lie, and who takes which rungs."""

from __future__ import annotations

from collections import Counter

import pytest

from llmo.tuning import pruner


@pytest.mark.parametrize(
    ("reached", "bar"),
    [
        ([], None),
        ([0.9, 0.8], None),
        ([0.7, 0.9, 0.8], 0.9),
        ([0.5, 0.6, 0.7, 0.8, 0.9], 0.8),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 0.6),
        ([0.5, 0.5, 0.5], 0.5),
    ],
)
def test_the_bar_is_that_of_the_best_third(reached: list[float], bar: float | None) -> None:
    assert pruner.bar(reached) == bar


def test_a_trial_has_the_rungs_of_its_kind() -> None:
    assert pruner.shares("none", 0, 9.0) == []
    assert pruner.shares("asha", 7, 9.0) == [1 / 9, 1 / 3]
    assert pruner.shares("asha", 7, 3.0) == [1 / 3], "a third of an epoch is too little to tell"
    assert pruner.shares("asha", 7, 1.0) == []
    standings = {1 / 9: [0.1, 0.2, 0.3]}
    assert pruner.bars("asha", 7, 9.0, standings) == [(1 / 9, 0.3), (1 / 3, None)]


def test_hyperband_lets_some_pass_the_first_rungs_from_early_on() -> None:
    counted = Counter(pruner.bracket(number) for number in range(34))
    assert counted == {0: 18, 1: 10, 2: 6}
    assert {pruner.bracket(number) for number in range(6)} == {0, 1, 2}
    assert [len(pruner.shares("hyperband", n, 9.0)) for n in range(17)] == [2 - pruner.bracket(n) for n in range(17)]
