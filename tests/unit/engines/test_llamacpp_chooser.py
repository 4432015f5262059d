"""Choosing a token: every filter against its definition, and random draws against their probabilities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmo.engines.generation import Sampling
from llmo.engines.llamacpp.chooser import FEW, Chooser, log_total

NONE: frozenset[int] = frozenset()
PROMPT = np.array([3, 4, 4, 5], np.int32)
LARGE = 2 * FEW + 5  # more than are sorted at first


def softmax(values: np.ndarray) -> np.ndarray:
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def allowed(logits: np.ndarray, s: Sampling) -> set[int]:
    """What may be drawn, by the plain definitions: temperature, then top_k, top_p and min_p."""
    scores = logits.astype(np.float64) / s.temperature
    order = np.argsort(-scores, kind="stable")
    if s.top_k > 0:
        order = order[: s.top_k]
    chances = softmax(scores[order])
    before = np.cumsum(chances) - chances
    keep = (before < s.top_p) & (chances >= s.min_p * chances[0])
    return set(order[keep].tolist())


def logits(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 2, 50, LARGE]),
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.sampled_from([0, 1, 3, 40, 1 << 20]),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
)
def test_only_what_the_filters_let_through_is_drawn(size, seed, temperature, top_k, top_p, min_p):
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    values = logits(size, seed)
    # a threshold that falls on a rounding error may go either way
    loose = allowed(values, Sampling(temperature=temperature, top_k=top_k, top_p=top_p + 1e-4, min_p=min_p * 0.999))
    chooser = Chooser(s, PROMPT)
    assert {chooser.choose(values, NONE) for _ in range(20)} <= loose


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_probabilities(top_p):
    values = logits(6)
    chances = softmax(values.astype(np.float64))
    inside = sorted(allowed(values, Sampling(top_p=top_p)))
    expected = np.zeros(6)
    expected[inside] = chances[inside] / chances[inside].sum()
    chooser = Chooser(Sampling(seed=1, top_p=top_p), PROMPT)
    drawn = np.bincount([chooser.choose(values, NONE) for _ in range(20_000)], minlength=6) / 20_000
    assert np.abs(drawn - expected).max() < 0.02


def test_the_wide_tail_is_sorted_when_the_first_few_do_not_reach_top_p():
    flat = np.zeros(LARGE, np.float32)
    chooser = Chooser(Sampling(seed=1, top_p=0.9), PROMPT)
    drawn = {chooser.choose(flat, NONE) for _ in range(4000)}
    assert max(drawn) > FEW
    assert max(drawn) <= int(0.9 * LARGE) + 1


def test_repetition_counts_the_prompt_and_the_others_only_the_answer():
    values = np.full(10, -1.0, np.float32)
    values[[4, 7]] = 2.0, 1.5
    assert Chooser(Sampling(temperature=0), PROMPT).choose(values, NONE) == 4
    assert Chooser(Sampling(temperature=0, repetition_penalty=2.0), PROMPT).choose(values, NONE) == 7
    repeated = Chooser(Sampling(temperature=0, frequency_penalty=0.3), PROMPT)
    assert [repeated.choose(values, NONE) for _ in range(4)] == [4, 4, 7, 4]
    present = Chooser(Sampling(temperature=0, presence_penalty=1.0), PROMPT)
    assert [present.choose(values, NONE) for _ in range(4)] == [4, 7, 4, 4]


def test_a_negative_logit_is_punished_downwards():
    values = np.full(6, -1.0, np.float32)
    assert Chooser(Sampling(temperature=0, repetition_penalty=1.5), PROMPT).choose(values, NONE) not in PROMPT


def test_the_library_s_logits_are_never_written_to():
    values = logits(50)
    values.flags.writeable = False
    everything = Sampling(
        temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, logprobs=3
    )
    chooser = Chooser(everything, PROMPT)
    for _ in range(5):
        chooser.logprob(values, chooser.choose(values, NONE))


def test_a_logprob_is_the_model_s_own_before_any_filter():
    values = logits(50)
    chooser = Chooser(Sampling(temperature=0.1, top_k=1, repetition_penalty=2.0, logprobs=2), PROMPT)
    entry = chooser.logprob(values, 9)
    assert entry is not None
    assert entry.logprob == pytest.approx(float(np.log(softmax(values.astype(np.float64))[9])), abs=1e-5)
    assert [token for token, _ in entry.top] == np.argsort(-values)[:2].tolist()
    assert Chooser(Sampling(), PROMPT).logprob(values, 9) is None
    assert log_total(np.zeros(8, np.float32)) == pytest.approx(np.log(8))


def test_no_seed_means_another_answer_each_time():
    values = np.zeros(LARGE, np.float32)
    draws = [[Chooser(Sampling(), PROMPT).choose(values, NONE) for _ in range(3)] for _ in range(2)]
    assert draws[0] != draws[1]
