"""Metrics of written answers, against values known from the metrics' own examples and from counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from llmo.tasks import written

# The example of sacrebleu's documentation: three answers, two references each, chrF2 59.73.
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
]


def value(found: dict[str, dict[str, float]], name: str) -> float:
    return found[name]["value"]


def test_chrf_is_sacrebleus() -> None:
    def alone(answer: str, reference: str) -> float:
        return value(written.measure([answer], [reference]), "chrf")

    best = [max(pair, key=lambda r, a=a: alone(a, r)) for a, *pair in zip(ANSWERS, *REFERENCES, strict=True)]
    assert 100 * value(written.measure(ANSWERS, best), "chrf") == pytest.approx(59.73, abs=0.005)


def test_rouge_l_counted_by_hand() -> None:
    # the, quick, brown, jumps, the: 5 of 8 words answered, 5 of 9 wanted
    found = written.rouge_l("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert found == pytest.approx(10 / 17)
    assert written.rouge_l("b a", "a b") == pytest.approx(0.5)
    assert written.rouge_l("", "x") == written.rouge_l("x", "") == written.rouge_l("...", "!") == 0.0


def test_the_same_text_is_all_right_and_another_all_wrong() -> None:
    same = written.measure(["Yes, it is. ", "no"], ["Yes, it is.", "no"])
    assert {name: value(same, name) for name in same} == {"exact_match": 1.0, "rouge_l": 1.0, "chrf": 1.0}
    other = written.measure(["abc", ""], ["xyz", "w"])
    assert {name: value(other, name) for name in other} == {"exact_match": 0.0, "rouge_l": 0.0, "chrf": 0.0}


def test_intervals_hold_their_values() -> None:
    found = written.measure(["a b c", "x", "q r"] * 10, ["a b d", "x", "z"] * 10)
    for interval in found.values():
        assert 0.0 <= interval["low"] < interval["value"] < interval["high"] <= 1.0
    assert value(found, "exact_match") == pytest.approx(1 / 3)
    assert np.isclose(value(found, "rouge_l"), (2 / 3 + 1 + 0) / 3)
