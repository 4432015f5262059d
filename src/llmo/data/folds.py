"""Cross-validation without copies of the data: which rows of train and dev are held out in a part of so many."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from llmo.data.dataset import Dataset, Rows
from llmo.errors import DataError


class Fold(Dataset):
    """A data set whose train and dev rows are divided anew; its test rows are what they were."""

    def __init__(self, whole: Dataset, *, index: int, of: int, seed: int) -> None:
        """Raises DataError when there are fewer rows than parts."""
        super().__init__(whole.folder, whole.info)
        both = Rows.joined([whole.split("train"), whole.split("dev")])
        held = held_out(list(both), index=index, of=of, seed=seed)
        kept = sorted(set(range(len(both))) - set(held))
        self._divided = {"train": both.pick(kept), "dev": both.pick(held)}

    def split(self, name: str) -> Rows:
        return self._divided[name] if name in self._divided else super().split(name)


def held_out(rows: Sequence[Mapping[str, Any]], *, index: int, of: int, seed: int) -> list[int]:
    """The numbers of the rows of part `index` of `of`, a function of content and seed alone.

    Rows of one text, and questions on one context, are in one part; of each label every part has its share, to one
    row. What holds a label that no other part has is held out in none, so that whatever is asked for was learnt.
    Raises DataError for too few rows.
    """
    units: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        units[_key(row)].append(number)
    if len(units) < of:
        raise DataError(
            f"{of} folds need at least {of} different rows in train and dev together, and there are {len(units)}",
            hint="set tune.folds lower, or leave it out",
        )
    common = Counter(label for members in units.values() for label in _labels(rows[members[0]]))
    strata: dict[str, list[str]] = defaultdict(list)
    for key, members in units.items():
        rarest = min(_labels(rows[members[0]]), key=lambda label: (common[label], label), default="")
        strata[rarest].append(key)
    dealt = [key for name in sorted(strata) for key in sorted(strata[name], key=lambda key: _order(seed, key))]
    out = {key for place, key in enumerate(dealt) if place % of == index}
    learnt = {label for key in dealt if key not in out for label in _labels(rows[units[key][0]])}
    fit = (key for key in out if learnt.issuperset(_labels(rows[units[key][0]])))
    return sorted(number for key in fit for number in units[key])


def _key(row: Mapping[str, Any]) -> str:
    if "answers" in row:
        return str(row["pair"])
    return str(row.get("text") or row.get("messages") or row.get("id"))


def _labels(row: Mapping[str, Any]) -> list[str]:
    if row.get("spans") is not None:
        return sorted({str(span["label"]) for span in row["spans"]})
    several = row.get("labels")
    found = [row.get("label")] if several is None else several
    return [label for label in found if isinstance(label, str)]  # a number that is to be estimated is no class


def _order(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "replace")).hexdigest()
