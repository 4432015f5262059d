"""Chooses the next token of one stream from its logits, in NumPy, the same for every engine that hands out logits.

Order: penalties, grammar, temperature, then min-p, top-k and top-p on what is left. Logarithms of probabilities are
of the logits as the model gave them. The random number is a hash of seed and position, so that it depends on neither
the batch nor what was drawn for others.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmo.engines.generation import Sampling, TokenLogprob
from llmo.errors import InputError, ModelError

Row = NDArray[np.float32]
MAX_LOGPROBS = 100
LEAST_TEMPERATURE = 1e-4  # what is colder overflows, and draws the likeliest all the same
RANGES = {
    "max_tokens": (1, math.inf),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}


def check(sampling: Sampling) -> None:
    """Raise InputError, naming the field, for a value outside its range; NaN is outside every range."""
    for name, (low, high) in RANGES.items():
        value = getattr(sampling, name)
        if not low <= value <= high:
            raise InputError(f"{name} must lie in [{low}, {high}], not {value}", where=name)
    if sampling.top_p == 0:
        raise InputError("top_p must be above 0", hint="temperature 0 takes the likeliest token", where="top_p")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise InputError(f"logprobs must lie in [0, {MAX_LOGPROBS}]", where="logprobs")


class Sampler:
    """The choices of one stream. Tell it the prompt once; every `choose` adds the token it gave."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        check(sampling)
        self._sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._given: Counter[int] = Counter()
        self._position = 0
        self._repeats = sampling.repetition_penalty != 1.0
        self._counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._seen = set(prompt) if self._repeats else set()
        self.adjusts = self._repeats or self._counts
        self.plain = sampling.temperature == 0 and not self.adjusts

    def choose(self, logits: Row, mask: NDArray[np.bool_] | None = None) -> int:
        """A token for these logits `[vocabulary]`; `mask` says which tokens a grammar allows.

        Raises ModelError where the logits are not finite, and InputError where the grammar allows nothing.
        """
        if not self.plain or mask is not None:
            logits = self._adjusted(logits, mask)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            if mask is not None and not mask.any():
                raise InputError("the grammar allows no token here", hint="it may contradict itself")
            raise ModelError("the model's logits are not finite", hint="its weights or its precision are broken")
        token = best if self._sampling.temperature == 0 else self._draw(logits, logits[best])
        self.chose(token)
        return token

    def chose(self, token: int) -> None:
        """Note a token that was chosen as `choose` would have."""
        self._position += 1
        if self._repeats:
            self._seen.add(token)
        if self._counts:
            self._given[token] += 1

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) that draws the next token, or one so many tokens ahead: of seed and position alone."""
        digest = hashlib.blake2b(f"{self._seed}/{self._position + ahead}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def _adjusted(self, logits: Row, mask: NDArray[np.bool_] | None) -> Row:
        """A copy with penalties and the grammar in it."""
        settings = self._sampling
        logits = logits.copy()
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values = logits[seen]
            factor = np.float32(settings.repetition_penalty)
            logits[seen] = np.where(values > 0, values / factor, values * factor)
        if self._given:
            given = np.fromiter(self._given, np.int64, len(self._given))
            counts = np.fromiter(self._given.values(), np.float32, len(self._given))
            logits[given] -= np.float32(settings.presence_penalty) + np.float32(settings.frequency_penalty) * counts
        if mask is not None:
            logits[~mask] = -np.inf
        return logits

    def _draw(self, logits: Row, best: np.float32) -> int:
        settings = self._sampling
        warmth = np.float32(max(settings.temperature, LEAST_TEMPERATURE))
        weights = np.exp((logits - best) / warmth)  # the likeliest has weight 1
        if settings.min_p > 0:
            weights[weights < np.float32(settings.min_p)] = 0
        if 0 < settings.top_k < weights.size:
            weights[weights < np.partition(weights, -settings.top_k)[-settings.top_k]] = 0
        if settings.top_p < 1:
            falling = np.sort(weights[weights > 0])[::-1]
            total = np.cumsum(falling, dtype=np.float64)
            last = int(np.searchsorted(total, settings.top_p * total[-1]))
            weights[weights < falling[min(last, falling.size - 1)]] = 0
        total = np.cumsum(weights, dtype=np.float64)
        point = self.uniform() * total[-1]
        return int(np.searchsorted(total, point, side="right"))


def token_logprob(logits: Row, token: int, alternatives: int) -> TokenLogprob:
    """The chosen token's natural log-probability and the likeliest `alternatives`, from raw logits `[vocabulary]`."""
    logs = log_softmax(logits)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        count = min(alternatives, logs.size)
        likely = np.argpartition(logs, -count)[-count:]
        likely = likely[np.argsort(-logs[likely], kind="stable")]
        top = tuple((int(i), float(logs[i])) for i in likely)
    return TokenLogprob(token, float(logs[token]), top)


def log_softmax(logits: Row) -> Row:
    """Over the last axis, at fp32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    out: Row = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out
