"""Written answers against references: exact match, ROUGE-L and chrF, with 95% bootstrap intervals over rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llmo.tasks.metrics import MICRO, Floats, Tally, Totals, ratio, with_intervals

ORDER = 6  # of chrF: n-grams of one to six characters
BETA = 2  # chrF counts recall this many times as much as precision
_WORD = re.compile(r"[a-z0-9]+")


def measure(answers: Sequence[str], references: Sequence[str], seed: int = 0) -> dict[str, dict[str, float]]:
    """`{"exact_match", "rouge_l", "chrf"}`, each 0 to 1 as `{"value", "low", "high"}`.

    Exact match is of the texts without white space around them. ROUGE-L is the mean over rows of the F-measure of the
    longest common subsequence of words (Lin 2004; lower-cased runs of ASCII letters and digits, no stemming). chrF is
    of the whole set (Popovic 2015: six orders, no words, beta 2, white space left out).
    """
    return with_intervals(tally(answers, references), scores, seed)


def tally(answers: Sequence[str], references: Sequence[str]) -> Tally:
    """Of each row whether it is exact, its ROUGE-L in millionths, and the n-grams of answer, reference and both."""
    columns = np.zeros((len(answers), 2 + 3 * ORDER), np.int64)
    for i, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        columns[i, :2] = answer.strip() == reference.strip(), round(rouge_l(answer, reference) * MICRO)
        columns[i, 2:] = _ngram_counts(answer, reference)
    return Tally.of_sums(columns)


def scores(totals: Totals) -> dict[str, Floats]:
    return {
        "exact_match": ratio(totals.sums[..., 0], totals.rows),
        "rouge_l": ratio(totals.sums[..., 1] / MICRO, totals.rows),
        "chrf": _chrf(totals.sums[..., 2:]),
    }


def rouge_l(answer: str, reference: str) -> float:
    """The F-measure of one pair, 0 to 1."""
    ours, theirs = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    common = _longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    line = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, line[j] = line[j], diagonal + 1 if word == other else max(line[j], line[j - 1])
    return line[-1]


def _ngram_counts(answer: str, reference: str) -> list[int]:
    """Of each order the n-grams of the answer, of the reference, and how many they share."""
    ours, theirs = ("".join(text.split()) for text in (answer, reference))
    found = []
    for order in range(1, ORDER + 1):
        a, b = (Counter(t[i : i + order] for i in range(len(t) - order + 1)) for t in (ours, theirs))
        # An order that the reference is too short for says nothing of the answer.
        found += [a.total() if b else 0, b.total(), (a & b).total()]
    return found


def _chrf(sums: Floats) -> Floats:
    given, wanted, shared = (sums[..., i::3] for i in range(3))
    counted = ((given > 0) & (wanted > 0)).astype(np.float64)
    orders = counted.sum(-1)
    precision = ratio((ratio(shared, given) * counted).sum(-1), orders)
    recall = ratio((ratio(shared, wanted) * counted).sum(-1), orders)
    return ratio((1 + BETA**2) * precision * recall, BETA**2 * precision + recall)
