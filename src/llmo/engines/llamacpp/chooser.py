"""Chooses the next token of one stream from its logits: penalties, filters, temperature, seed, grammar, logprobs."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from llmo.engines.generation import Sampling, TokenLogprob
from llmo.engines.llamacpp.constraint import Constraint
from llmo.errors import InputError, ModelError

FEW = 1024  # likeliest tokens sorted first; nearly always they are all that top_p lets through
SEEDS = 1 << 64  # any integer is a seed, also a negative one

Logits = NDArray[np.float32]


class Chooser:
    """One a stream: it remembers the answer so far and draws from its own random numbers, so that what is chosen
    depends on nothing but the prompt, the settings, the seed and the logits."""

    def __init__(self, sampling: Sampling, prompt: NDArray[np.int32], constraint: Constraint | None = None) -> None:
        """Raises InputError for settings that mean nothing."""
        _check(sampling)
        self._sampling = sampling
        self._constraint = constraint
        self._random = np.random.Generator(np.random.Philox(None if sampling.seed is None else sampling.seed % SEEDS))
        self._seen = np.unique(prompt)
        self._counts: Counter[int] = Counter()
        self._plain = sampling.temperature == 0 and not self._penalised() and constraint is None

    @property
    def complete(self) -> bool:
        """The grammar is fulfilled and lets nothing more follow."""
        return self._constraint is not None and self._constraint.complete

    def choose(self, logits: Logits, end_ids: frozenset[int]) -> int:
        """A token of `[vocabulary]`. Raises ModelError when the model's numbers are no numbers, InputError when the
        grammar allows no token."""
        if self._plain:
            token = int(logits.argmax())
            _finite(logits[token])
            return token
        scores = self._with_penalties(logits) if self._penalised() else logits.copy()
        _finite(scores.max())
        if self._constraint is not None:
            self._constraint.mask(scores, end_ids)
        token = int(scores.argmax()) if self._sampling.temperature == 0 else self._draw(scores)
        if self._constraint is not None and token not in end_ids:
            self._constraint.accept(token)
        self._counts[token] += 1
        return token

    def logprob(self, logits: Logits, token: int) -> TokenLogprob | None:
        """Of the model's own logits, as `Sampling.logprobs` asked; None when it did not."""
        wanted = self._sampling.logprobs
        if wanted is None:
            return None
        total = log_total(logits)
        top = _best(logits, wanted) if wanted else np.empty(0, np.int64)
        return TokenLogprob(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in top))

    def _penalised(self) -> bool:
        s = self._sampling
        return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0

    def _with_penalties(self, logits: Logits) -> Logits:
        scores = logits.copy()
        s = self._sampling
        answered = np.fromiter(self._counts, np.int64, len(self._counts))
        if s.repetition_penalty != 1:
            seen = np.union1d(self._seen, answered)
            values = scores[seen]
            scores[seen] = np.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if answered.size:
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            scores[answered] -= s.presence_penalty + s.frequency_penalty * times
        return scores

    def _draw(self, scores: Logits) -> int:
        """Temperature, then top_k, top_p and min_p, then one draw among the tokens that are left."""
        s = self._sampling
        scores /= s.temperature
        tokens = _best(scores, s.top_k) if 0 < s.top_k < len(scores) else np.arange(len(scores))
        if s.top_p < 1:
            tokens = _nucleus(scores, tokens, s.top_p)
        chances = np.exp(scores[tokens] - scores[tokens].max())
        if s.min_p > 0:
            keep = chances >= s.min_p
            tokens, chances = tokens[keep], chances[keep]
        steps = np.cumsum(chances, dtype=np.float64)
        place = int(np.searchsorted(steps, self._random.random() * steps[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])


def _nucleus(scores: Logits, tokens: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The fewest of the likeliest `tokens` that have `share` of their probability, likeliest first. Sorting a whole
    vocabulary takes as long as half a step of a small model, so a few are tried before all."""
    values = scores[tokens]
    total = log_total(values)
    for count in (FEW, len(tokens)):
        places = _best(values, count)
        steps = np.cumsum(np.exp(values[places] - total), dtype=np.float64)
        if steps[-1] >= share or len(places) == len(tokens):
            break
    return tokens[places[: int(np.searchsorted(steps, share)) + 1]]


def log_total(logits: Logits) -> float:
    """The logarithm of the sum of the exponentials of `[vocabulary]`: what turns a logit into a log-probability."""
    highest = float(logits.max())
    return highest + math.log(float(np.exp(logits - highest).sum(dtype=np.float64)))


def _best(values: Logits, count: int) -> NDArray[np.int64]:
    """The places of the `count` highest, best first; ties go to the lower token, so the order is one and the same."""
    if count < len(values):
        edge = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= edge)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count].astype(np.int64)


def _finite(value: np.float32) -> None:
    if not np.isfinite(value):
        raise ModelError("the model's logits are not numbers", hint="its weights may be broken: verify the model")


def _check(s: Sampling) -> None:
    numbers = (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    wrong = (
        not all(math.isfinite(number) for number in numbers)
        or s.max_tokens < 1
        or s.temperature < 0
        or not 0 < s.top_p <= 1
        or not 0 <= s.min_p <= 1
        or s.repetition_penalty <= 0
        or (s.logprobs is not None and s.logprobs < 0)
    )
    if wrong:
        raise InputError(
            "these sampling settings mean nothing",
            hint="max_tokens >= 1; temperature >= 0; 0 < top_p <= 1; 0 <= min_p <= 1; repetition_penalty > 0",
        )
