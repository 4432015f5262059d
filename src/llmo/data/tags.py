"""Turns tags of words (BIO, IOB1, BIOES, BILOU) into spans of characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmo.data.row import Span

_TAG = re.compile(r"[BIESLU]-\S.*")
_BEGINS = "BSU"
_ENDS = "ESLU"
# Scripts that put no space between words: Han, kana, their signs and full-width forms.
UNSPACED = "\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_UNSPACED = re.compile(f"[{UNSPACED}]")


def problem(tag: str) -> str:
    """What is wrong with a tag, or an empty string."""
    if tag == "O" or _TAG.fullmatch(tag):
        return ""
    return f"'{tag}' is not a tag"


def join(tokens: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text that the tokens make up, and each token's characters in it.

    One space stands between tokens, and none between two characters of a script that is written without.
    """
    parts: list[str] = []
    places: list[tuple[int, int]] = []
    at = 0
    before = ""
    for token in tokens:
        if before and token and not (_UNSPACED.match(before[-1]) and _UNSPACED.match(token)):
            parts.append(" ")
            at += 1
        parts.append(token)
        places.append((at, at + len(token)))
        at += len(token)
        before = token or before
    return "".join(parts), places


def spans(tags: Sequence[str], places: Sequence[tuple[int, int]]) -> list[Span]:
    """Merge word tags into spans; an I- that follows no entity of its type begins one (IOB1)."""
    found: list[Span] = []
    open_label = ""
    for tag, (start, end) in zip(tags, places, strict=True):
        kind, label = tag[:1], tag[2:]
        if kind == "O":
            open_label = ""
            continue
        if kind in _BEGINS or label != open_label:
            found.append(Span(start, end, label))
        else:
            found[-1].end = end
        open_label = "" if kind in _ENDS else label
    return [span for span in found if span.end > span.start]
