"""What a verification compares, one check a function: each gives a figure, its limit and one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmo.tasks.base import Encoding, Logits, Task

EXACT = 1e-4  # largest difference of logits between two runs of the same weights at fp32
LOSSY_SPREAD = 0.15  # of the reference's whole range of logits: a layer that is lost or wrong moves more
LOSSY_BATCH = 0.02  # of the same range: rounding may tip a step of an activation, and no more
LOSSY_AGREEMENT = 0.8  # borderline texts may be answered otherwise at int8; the loss itself is measured by compress


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `value` and `limit` are in the unit that `text` names; `hint` says what a failure means."""

    name: str
    passed: bool
    value: float | int | str
    limit: float | int | str
    text: str
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        if self.passed:
            del body["hint"]
        return body


def same_digest(name: str, what: str, found: str, expected: str, hint: str) -> Check:
    """A file or folder is the one that was recorded."""
    passed = found == expected
    text = f"{what} is the one of training" if passed else f"{what} is not the one of training"
    return Check(name, passed, found, expected, text, hint)


def same_tokens(name: str, where: str, found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> Check:
    """Token ids of every text are equal."""
    equal = sum(list(a) == list(b) for a, b in zip(found, expected, strict=True))
    text = f"token ids {where} equal those of training for {equal} of {len(expected)} texts"
    hint = "the tokeniser is not the one of training: train the model again, or put its tokenizer.json back"
    return Check(name, equal == len(expected), equal, len(expected), text, hint)


def same_texts(name: str, where: str, found: Sequence[str], expected: Sequence[str], hint: str) -> Check:
    """Texts are equal, byte for byte."""
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    text = f"conversations {where} are those of training for {equal} of {len(expected)}"
    return Check(name, equal == len(expected), equal, len(expected), text, hint)


def same_logits(
    name: str, pair: str, found: Sequence[Logits], expected: Sequence[Logits], limit: float = EXACT, hint: str = ""
) -> Check:
    """The largest difference of any logit is within `limit`."""
    worst = difference(found, expected)
    text = f"largest difference of logits, {pair}: {worst:.1e} (limit {limit:.1e})"
    return Check(name, worst <= limit, worst, limit, text, hint)


def same_answers(
    name: str,
    pair: str,
    task: Task,
    found: Sequence[Logits],
    expected: Sequence[Logits],
    encodings: Sequence[Encoding],
    share: float = 1.0,
    hint: str = "",
) -> Check:
    """At least `share` of the answers are the same."""
    count = len(expected)
    agreed = sum(task.agree(a, b, e) for a, b, e in zip(found, expected, encodings, strict=True))
    needed = int(np.ceil(share * count - 1e-9))
    text = f"same answer, {pair}: {agreed} of {count} texts (needed {needed})"
    return Check(name, agreed >= needed, agreed, needed, text, hint)


def difference(found: Sequence[Logits], expected: Sequence[Logits]) -> float:
    """The largest difference; infinite where shapes differ or a value is not a number, but still finite in JSON."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        one = float(np.abs(a - b).max()) if a.shape == b.shape else np.inf
        worst = max(worst, one if np.isfinite(one) else float(np.finfo(np.float32).max))
    return worst


def spread(logits: Sequence[Logits]) -> float:
    """The range from the smallest logit to the largest."""
    return float(max(one.max() for one in logits) - min(one.min() for one in logits))
