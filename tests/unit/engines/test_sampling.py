"""Tokens are chosen as the settings define it, from logits that the test knows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmo.engines.generation import Sampling
from llmo.engines.sampling import Sampler, check, log_softmax, token_logprob
from llmo.errors import InputError, ModelError

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], np.float32))
GREEDY = Sampling(temperature=0.0)


def drawn(sampling: Sampling, logits: np.ndarray = LOGITS, count: int = 600) -> Counter[int]:
    return Counter(Sampler(replace(sampling, seed=seed), []).choose(logits) for seed in range(count))


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.75}, {0, 1, 2}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.5}, {0, 1}),  # 0.4 / 0.85 is below a half
        ({"min_p": 0.2, "top_k": 5, "top_p": 0.99}, {0, 1, 2, 3}),
        ({"temperature": 0.01}, {0}),
        ({"temperature": 1e-320}, {0}),
    ],
)
def test_filters_keep_what_they_say(change: dict[str, float], kept: set[int]) -> None:
    assert set(drawn(Sampling(**change))) == kept  # type: ignore[arg-type]


def test_draws_have_the_probabilities_of_the_softmax_at_the_temperature() -> None:
    for temperature in (0.7, 1.0, 2.0):
        expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
        found = drawn(Sampling(temperature=temperature), count=4000)
        for token, chance in enumerate(expected):
            assert abs(found[token] / 4000 - chance) < 5 * math.sqrt(chance * (1 - chance) / 4000)


def test_every_position_draws_anew_and_every_seed_otherwise() -> None:
    flat = np.zeros(1000, np.float32)
    sequences = []
    for seed in (1, 1, 2):
        sampler = Sampler(Sampling(seed=seed), [])
        sequences.append([sampler.choose(flat) for _ in range(20)])
    assert sequences[0] == sequences[1] != sequences[2]
    assert len(set(sequences[0])) > 15


def test_penalties_are_their_definitions() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.5], np.float32)
    repetition = Sampler(replace(GREEDY, repetition_penalty=2.0), [0])
    assert [repetition.choose(logits) for _ in range(3)] == [1, 0, 0]  # 1 against 1.9; then 1 against 0.95
    negative = Sampler(replace(GREEDY, repetition_penalty=2.0), [2])
    assert negative.choose(np.array([-9.0, -9.0, -1.0, -1.5], np.float32)) == 3  # -1 became -2
    presence = Sampler(replace(GREEDY, presence_penalty=0.2), [0, 0, 1])
    assert [presence.choose(logits) for _ in range(4)] == [0, 1, 0, 0]  # once, however often; the prompt is no matter
    frequency = Sampler(replace(GREEDY, frequency_penalty=0.2), [0, 0, 1])
    assert [frequency.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 0]
    assert np.array_equal(logits, np.array([2.0, 1.9, -1.0, -1.5], np.float32))


def test_a_mask_holds_whatever_the_settings() -> None:
    mask = np.array([False, False, True, False, True, False])
    for sampling in (GREEDY, Sampling(seed=1), Sampling(seed=2, top_k=1), Sampling(top_p=0.01), Sampling(min_p=1.0)):
        assert Sampler(sampling, []).choose(LOGITS, mask) in (2, 4)
    with pytest.raises(InputError):
        Sampler(GREEDY, []).choose(LOGITS, np.zeros(6, bool))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.5, repetition_penalty=1.2)])
def test_logits_that_are_not_finite_are_an_error(bad: float, sampling: Sampling) -> None:
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(ModelError):
        Sampler(sampling, []).choose(logits)


@given(
    arrays(np.float32, 30, elements=st.floats(-50, 50, width=32)),
    st.builds(
        Sampling,
        temperature=st.floats(0, 5),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(0, 40),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.5, 2),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        seed=st.integers(),
    ),
)
def test_any_settings_give_a_token(logits: np.ndarray, sampling: Sampling) -> None:
    sampler = Sampler(sampling, [1, 2])
    assert all(0 <= sampler.choose(logits) < 30 for _ in range(3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logprobs", -1),
        ("logprobs", 10**9),
    ],
)
def test_a_value_outside_its_range_is_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field) as caught:
        check(replace(Sampling(), **{field: value}))  # type: ignore[arg-type]
    assert caught.value.where == field


def test_logprobs_are_of_the_logits_as_they_are() -> None:
    found = token_logprob(LOGITS + 3, 1, 3)
    assert found.token == 1
    assert found.logprob == pytest.approx(math.log(0.3), abs=1e-5)
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert [value for _, value in found.top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-5)
    assert len(token_logprob(LOGITS, 0, 99).top) == 6
    assert np.exp(log_softmax(np.float32(np.random.default_rng(0).normal(0, 30, (5, 7))))).sum(1) == pytest.approx(1)
