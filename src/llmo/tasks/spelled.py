"""Whether two short answers say the same, as SQuAD's own evaluation has it (Rajpurkar et al. 2016): exact match and F1
of words, without case, punctuation and articles. Characters of scripts without spaces are words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from string import punctuation

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNSPACED = r"\u0e00-\u0e7f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words that are compared."""
    plain = "".join(c for c in text.lower() if c not in punctuation and unicodedata.category(c)[0] != "P")
    return _WORD.findall(_ARTICLES.sub(" ", plain))


def compare(said: str | None, answers: Sequence[str]) -> tuple[bool, float]:
    """Exact match and F1 with the best of the right answers; without any, the right one is to say nothing."""
    if said is None or not answers:
        right = said is None and not answers
        return right, float(right)
    mine = words(said)
    each = [(mine == words(answer), _f1(mine, words(answer))) for answer in answers]
    return any(exact for exact, _ in each), max(f1 for _, f1 in each)


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    return 2 * sum((Counter(said) & Counter(answer)).values()) / (len(said) + len(answer))
