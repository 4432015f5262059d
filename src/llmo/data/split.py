"""Divides rows into train, dev and test: stratified by label, seeded, and the same whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmo.data.deduplicate import text_key
from llmo.data.row import SPLITS, Row

FEW_DOCUMENTS = 10  # with fewer, documents cannot be divided in proportion, and rows are divided instead
_NONE = "\x00none"  # the stratum of rows without any label


@dataclass(slots=True)
class _Unit:
    """Rows that must stay together: those of one document, or one text."""

    rows: list[int]
    labels: tuple[str, ...]
    key: str


def divide(rows: Sequence[Row], shares: Mapping[str, float], seed: int, whole_groups: bool = False) -> list[str]:
    """The split of each row. `shares` are the fractions of dev and test; the rest is train.

    Rows of one `group`, and rows with the same text, stay together. With one label a row, each label's share is
    exact to one row, and a label of three rows or more is in train. With several, rows are given in the order of
    their rarest label to the split that lacks it most (iterative stratification, Sechidis et al. 2011), and no
    label of dev or test is missing from train. Rows without any labels are divided by number alone. With
    `whole_groups`, groups stay together however few there are.
    """
    units = _units(rows, seed, whole_groups)
    held = {name: share for name, share in shares.items() if share > 0}
    single = all(len(unit.labels) == 1 and len(unit.rows) == 1 for unit in units)
    if all(unit.labels == (_NONE,) for unit in units):
        chosen = _by_number(units, held)
    else:
        chosen = _stratified(units, held) if single else _iterative(units, held)
    result = [""] * len(rows)
    for unit, split in zip(units, chosen, strict=True):
        for row in unit.rows:
            result[row] = split
    return result


def _units(rows: Sequence[Row], seed: int, whole_groups: bool) -> list[_Unit]:
    """In an order that only the content and the seed decide."""
    grouped = whole_groups or len({row.group for row in rows if row.group}) >= FEW_DOCUMENTS
    together: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        together[f"document {row.group}" if row.group and grouped else text_key(row.text)].append(i)
    units = []
    for name, members in together.items():
        labels = sorted({label for i in members for label in (rows[i].labels or ())})
        key = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "replace")).hexdigest()
        units.append(_Unit(members, tuple(labels) or (_NONE,), key))
    return sorted(units, key=lambda unit: unit.key)


def _by_number(units: Sequence[_Unit], shares: Mapping[str, float]) -> list[str]:
    """As many rows as each share asks for, taken unit by unit where one fits; train keeps a unit at least."""
    chosen = ["train"] * len(units)
    total = sum(len(unit.rows) for unit in units)
    left = len(units) - 1
    for split, share in sorted(shares.items(), reverse=True):  # test before dev
        wanted = max(1, round(total * share))
        for i, unit in enumerate(units):
            if left and chosen[i] == "train" and len(unit.rows) <= wanted:
                chosen[i] = split
                wanted -= len(unit.rows)
                left -= 1
    return chosen


def _stratified(units: Sequence[_Unit], shares: Mapping[str, float]) -> list[str]:
    strata: dict[str, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        strata[unit.labels[0]].append(i)
    chosen = ["train"] * len(units)
    free = {label: len(members) for label, members in strata.items()}
    begin = dict.fromkeys(strata, 0)
    for split, share in sorted(shares.items(), reverse=True):  # test before dev
        sizes = {label: len(members) for label, members in strata.items()}
        counts = _apportion(sizes, share, {label: left - 1 for label, left in free.items()})
        for label, count in counts.items():
            for i in strata[label][begin[label] : begin[label] + count]:
                chosen[i] = split
            begin[label] += count
            free[label] -= count
    return chosen


def _apportion(sizes: Mapping[str, int], share: float, most: Mapping[str, int]) -> dict[str, int]:
    """How many of each label make up the share of the whole, each within one of its own share and below `most`."""
    counts = {label: min(int(size * share), max(0, most[label])) for label, size in sizes.items()}
    wanted = max(1, round(sum(sizes.values()) * share)) - sum(counts.values())
    rest = sorted(sizes, key=lambda label: (int(sizes[label] * share) - sizes[label] * share, sizes[label], label))
    for label in rest:
        if wanted > 0 and counts[label] < most[label]:
            counts[label] += 1
            wanted -= 1
    return counts


def _iterative(units: Sequence[_Unit], shares: Mapping[str, float]) -> list[str]:
    portions = {"train": 1.0 - sum(shares.values()), **shares}
    sizes = Counter(label for unit in units for label in unit.labels)
    desired = {name: {label: n * portion for label, n in sizes.items()} for name, portion in portions.items()}
    room = {name: len(units) * portion for name, portion in portions.items()}
    members: dict[str, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        for label in unit.labels:
            members[label].append(i)
    chosen: dict[int, str] = {}
    left = dict(sizes)
    while left:
        label = min(left, key=lambda name: (left[name], name))
        for i in members[label]:
            if i in chosen:
                continue
            split = max(portions, key=lambda name: (desired[name][label], room[name], -SPLITS.index(name)))
            chosen[i] = split
            room[split] -= 1
            for own in units[i].labels:
                desired[split][own] -= 1
                left[own] = left.get(own, 0) - 1
        del left[label]
        left = {name: count for name, count in left.items() if count > 0}
    given = _all_in_train([chosen[i] for i in range(len(units))], units, members)
    return _none_empty(given, units, sorted(shares, reverse=True))


def _all_in_train(chosen: list[str], units: Sequence[_Unit], members: Mapping[str, list[int]]) -> list[str]:
    trained = Counter(label for i, unit in enumerate(units) if chosen[i] == "train" for label in unit.labels)
    for label in sorted(members):
        if label not in trained:
            chosen[members[label][0]] = "train"
            trained.update(units[members[label][0]].labels)
    return chosen


def _none_empty(chosen: list[str], units: Sequence[_Unit], splits: Sequence[str]) -> list[str]:
    """Give a split that got nothing the first unit of train whose labels train has elsewhere too."""
    for split in splits:
        trained = Counter(label for i, unit in enumerate(units) if chosen[i] == "train" for label in unit.labels)
        spare = (
            i for i, unit in enumerate(units) if chosen[i] == "train" and all(trained[own] > 1 for own in unit.labels)
        )
        at = next(spare, None) if split not in chosen else None
        if at is not None:
            chosen[at] = split
    return chosen
