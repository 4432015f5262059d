"""Says which conversations ask the same, so that no question is learnt with one answer and tested with another."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from llmo.data.conversation import Conversation, said
from llmo.data.deduplicate import text_key
from llmo.data.row import Drop, Dropped, Row

_MANY = 10  # a group of fewer rows never needs dividing
_PRIORITY = {"test": 0, "dev": 1, "train": 2, None: 2}


def prompts(conversation: Conversation) -> list[str]:
    """A digest of what precedes each answer, the shortest first; case and white space do not count."""
    running = hashlib.sha256()
    found: list[str] = []
    before = ""
    for message in [*conversation.messages, *(conversation.chosen or ())[:1]]:
        if message["role"] == "assistant" and before != "assistant":
            found.append(running.hexdigest()[:32])
        running.update(text_key(said(message)).encode() + b"\x00")
        before = message["role"]
    return found


def gather(rows: Sequence[Row]) -> list[str]:
    """Set the group of every conversation: what was asked before its first answer. Returns notes for the user.

    A beginning that very many share (a greeting) would put them all on one side; those are grouped by what was asked
    before their second answer, and so on. Rows that answer the very same prompt are never parted.
    """
    paths = {i: prompts(row.conversation) for i, row in enumerate(rows) if row.conversation}
    many = max(_MANY, len(rows) // 10)
    left, depth, parted = list(paths), 0, 0
    while left:
        names = {i: paths[i][depth] for i in left}
        sizes = Counter(names.values())
        deeper = [i for i in left if sizes[names[i]] > many and len(paths[i]) > depth + 1]
        for i in left:
            rows[i].group = names[i]
        parted = parted or len(deeper)
        left, depth = deeper, depth + 1
    if not parted:
        return []
    return [f"{parted} conversations begin like many others: they are divided by their later questions"]


def held_out(rows: Sequence[Row]) -> tuple[list[Row], list[Dropped]]:
    """Rows whose last prompt another split holds out, with whatever answer, leave theirs: test stays, then dev."""
    last = [prompts(row.conversation)[-1] if row.conversation else "" for row in rows]
    return apart(rows, last, "the same question as")


def apart(
    rows: Sequence[Row], names: Sequence[str], why: str, reason: Drop = Drop.PROMPT_LEAK
) -> tuple[list[Row], list[Dropped]]:
    """Rows of one name ("" is none) stay in one of the splits that the source gave them, and the others are dropped."""
    first: dict[str, Row] = {}
    for row, name in sorted(zip(rows, names, strict=True), key=lambda pair: _PRIORITY[pair[0].split]):
        first.setdefault(name, row)
    kept, dropped = [], []
    for row, name in zip(rows, names, strict=True):
        other = first[name]
        if name and _PRIORITY[other.split] < _PRIORITY[row.split]:
            dropped.append(Dropped(row, reason, f"{why} {other.place} ({other.split})"))
        else:
            kept.append(row)
    return kept, dropped
