"""From interactions to what next-item learns and is measured on: each user's items in order, the last ones held out."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from llmo.context import Context
from llmo.data.built import Built
from llmo.data.interactions import Action, Found, read
from llmo.data.row import SPLITS, Drop, Dropped, Row
from llmo.data.stored import SEQUENCES
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

HELD_OUT = 4  # interactions that a user needs to be measured on: two to learn from, one of dev, one of test
SAMPLES = 3


def build(source: Path, data: DataSpec, task: TaskSpec, ctx: Context) -> Built:
    """Leave-last-out (as Kang & McAuley 2018): of each user the last item is the test's, the one before it dev's.

    A row's text is the history, items with spaces between; its label the item that came next, none for training rows,
    in which each item is the next one of those before it. Raises DataError where nothing can be learnt.
    """
    found = read(source, data, ctx)
    users = _users(found, keep_repeats=data.clean.drop_duplicates == "none")
    splits = _divided(users, found)
    _check(splits, found, source.name)
    info = _card(splits, users, found, task)
    notes = [*found.log.notes, *_notes(splits, found)]
    return Built(splits, found.dropped, info, notes, [_sample(row) for row in splits["train"][:SAMPLES]], SEQUENCES)


def _users(found: Found, *, keep_repeats: bool) -> dict[str, list[Action]]:
    """The actions of each user in order, users by name; one that is written twice at the same time counts once."""
    users: dict[str, list[Action]] = defaultdict(list)
    timed = "time" in found.columns
    seen: set[tuple[str, str, float]] = set()
    for action in found.actions:
        name = (action.user, action.item, action.time)
        if timed and not keep_repeats and name in seen:
            detail = f"the same user, item and time as before: {action.user}"
            found.dropped.append(Dropped(Row(action.item, None, action.place), Drop.DUPLICATE, detail))
            continue
        seen.add(name)
        users[action.user].append(action)
    return {user: sorted(users[user], key=lambda action: (action.time, action.order)) for user in sorted(users)}


def _divided(users: dict[str, list[Action]], found: Found) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for user, actions in users.items():
        items, place = [action.item for action in actions], actions[0].place
        if len(items) == 1:
            detail = f"the user {user} has one interaction, after which nothing comes"
            found.dropped.append(Dropped(Row(items[0], None, place, user), Drop.ALONE, detail))
            continue
        if len(items) < HELD_OUT:
            splits["train"].append(Row(" ".join(items), None, place, user, "train"))
            continue
        splits["train"].append(Row(" ".join(items[:-2]), None, place, user, "train"))
        for split, end in (("dev", -2), ("test", -1)):
            splits[split].append(Row(" ".join(items[:end]), (items[end],), place, f"{user}:{split}", split))
    return splits


def _check(splits: dict[str, list[Row]], found: Found, where: str) -> None:
    if not splits["train"]:
        why = Counter(dropped.reason.value for dropped in found.dropped)
        raise DataError(
            f"no user has two interactions ({', '.join(f'{count} {reason}' for reason, count in why.items())})",
            where=where,
            hint=f"the user is read from '{found.columns.get('user', 'each row')}'; name another: data.user: NAME",
        )
    if len(_items(splits["train"])) < 2:
        raise DataError("there is one item only", where=where, hint="name the column of items: data.item: NAME")


def _card(splits: dict[str, list[Row]], users: dict[str, list[Action]], found: Found, task: TaskSpec) -> dict[str, Any]:
    held = [row for split in SPLITS[1:] for row in splits[split]]
    return {
        "task": task.name,
        "columns": found.columns,
        "rows": {
            "read": found.read,
            **{name: len(rows) for name, rows in splits.items()},
            "dropped": len(found.dropped),
        },
        "dropped": dict(Counter(dropped.reason.value for dropped in found.dropped)),
        "changed": {name: count for name, count in found.log.changed.items() if count},
        "labels": {},
        "encodings": dict(found.log.encodings),
        "splits": "leave-last-out",
        "multi_label": False,
        "shape": "histories of items",
        "users": len(splits["train"]),
        "items": len(_items(splits["train"])),
        "interactions": sum(len(actions) for actions in users.values()),
        "repeats": any(_next(row) in row.text.split() for row in held),
    }


def _notes(splits: dict[str, list[Row]], found: Found) -> list[str]:
    notes = []
    known = _items(splits["train"])
    fresh = {split: sum(_next(row) not in known for row in splits[split]) for split in SPLITS[1:]}
    if any(fresh.values()):
        notes.append(
            f"{fresh['test']} items to be found in test and {fresh['dev']} in dev are in no training row: they cannot "
            "be answered, and count as missed"
        )
    alone = sum(dropped.reason is Drop.ALONE for dropped in found.dropped)
    if alone:
        notes.append(f"{alone} users were dropped because they have one interaction, after which nothing comes")
    only = len(splits["train"]) - len(splits["test"])
    if only:
        notes.append(f"{only} users have fewer than {HELD_OUT} interactions: they are learnt from, not measured on")
    return notes


def _items(rows: list[Row]) -> set[str]:
    return {item for row in rows for item in row.text.split()}


def _next(row: Row) -> str:
    return (row.labels or ("",))[0]


def _sample(row: Row) -> dict[str, Any]:
    return {"id": row.id, "text": " ".join(row.text.split()[:30]), "labels": list(row.labels or ())}
