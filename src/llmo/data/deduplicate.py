"""Drops copies of texts, within and across splits, and texts whose copies contradict each other's labels."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from llmo.data.near import near_copies
from llmo.data.row import Drop, Dropped, Row

# Across splits the row that is held out stays, and its copy in the other split goes.
_PRIORITY = {"test": 0, "dev": 1, "train": 2, None: 3}
Target = tuple[object, ...]


def text_key(text: str) -> str:
    """What makes two texts the same: their words and signs, whatever the case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def deduplicate(
    rows: Sequence[Row],
    how: Literal["near", "exact", "none"],
    threshold: float,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[list[Row], list[Dropped]]:
    """The rows that stay, in their order, and those that do not.

    Which copy stays depends on the splits and on the content, never on the order of the rows. Identical texts
    (see `text_key`) with different labels: the labels of the majority stay once and the others go as `conflict`;
    without a majority all of them go. Near copies count as copies whatever their labels.
    """
    if how == "none":
        return list(rows), []
    keys = [text_key("\n".join(filter(None, (row.text, row.pair, row.negative)))) for row in rows]
    names = [digest(key) for key in keys]
    order = sorted(range(len(rows)), key=lambda i: (_PRIORITY[rows[i].split], names[i], rows[i].text, rows[i].place))
    dropped: dict[int, Dropped] = {}
    kept = _without_exact(rows, order, names, dropped)
    if how == "near":
        kept = [i for i in kept if rows[i].answers is None]  # two questions on one long context are no copies
        copies = near_copies([keys[i] for i in kept], threshold, tick)
        for at, (original, similarity) in copies.items():
            row, other = rows[kept[at]], rows[kept[original]]
            reason = Drop.NEAR_DUPLICATE if row.split == other.split else Drop.LEAK
            dropped[kept[at]] = Dropped(row, reason, f"{similarity:.2f} like {_at(other)}")
    stay = [row for i, row in enumerate(rows) if i not in dropped]
    return stay, [dropped[i] for i in sorted(dropped)]


def _without_exact(rows: Sequence[Row], order: list[int], names: list[str], dropped: dict[int, Dropped]) -> list[int]:
    copies: dict[str, list[int]] = defaultdict(list)
    for i in order:
        copies[names[i]].append(i)
    kept = []
    for same in copies.values():
        held_out = [i for i in same if rows[i].split == rows[same[0]].split]
        for i in same[len(held_out) :]:
            dropped[i] = Dropped(rows[i], Drop.LEAK, f"the same text as {_at(rows[same[0]])}")
        chosen = _majority([_target(rows[i]) for i in held_out])
        original = next((i for i in held_out if _target(rows[i]) == chosen), None)
        for i in held_out:
            if i == original:
                kept.append(i)
            elif original is None or _target(rows[i]) != chosen:
                dropped[i] = Dropped(rows[i], Drop.CONFLICT, _contradiction(rows, i, held_out))
            else:
                dropped[i] = Dropped(rows[i], Drop.DUPLICATE, f"the same text as {_at(rows[original])}")
    return kept


def _target(row: Row) -> Target:
    if row.spans:
        return tuple((span.start, span.end, span.label) for span in row.spans)
    return (*sorted(row.labels or ()), row.value)


def _majority(targets: list[Target]) -> Target | None:
    most = Counter(targets).most_common(2)
    return most[0][0] if len(most) == 1 or most[0][1] > most[1][1] else None


def _contradiction(rows: Sequence[Row], i: int, same: list[int]) -> str:
    other = next(j for j in same if _target(rows[j]) != _target(rows[i]))
    return f"the same text has other labels at {_at(rows[other])}"


def _at(row: Row) -> str:
    return f"{row.place} ({row.split})" if row.split else row.place
