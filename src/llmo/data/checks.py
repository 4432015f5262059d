"""Says whether something can be learnt from the rows, before anything is computed with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from llmo.data.chat.reasons import REASONS
from llmo.data.prepared import Prepared
from llmo.data.row import SPLITS, Drop, Row
from llmo.errors import DataError

_MANY = 50  # so many different labels, each of them rare, are not classes


def labels_of(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have each label, the commonest first."""
    counts = Counter(label for row in rows for label in row.labels or ())
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def learnable(prepared: Prepared, where: str) -> None:
    """Raises DataError when nothing is left, most rows lack a label, or the labels cannot be told apart."""
    reasons = Counter(d.reason for d in prepared.dropped)
    unlabelled = [d.row for d in prepared.dropped if d.reason == Drop.NO_LABEL]
    label = prepared.columns.get("label") or prepared.columns.get("tags") or prepared.columns.get("spans")
    if 2 * len(unlabelled) > prepared.read:
        raise DataError(
            f"{len(unlabelled)} of {prepared.read} rows have no label; the first is {unlabelled[0].place}",
            where=where,
            hint=f"the label is read from '{label}'; fill it, or name another: data.label: NAME",
        )
    if not prepared.rows:
        raise _nothing_left(reasons, where, "give rows with text and label")
    counts = labels_of(prepared.rows)
    if not counts:
        raise DataError(
            "no row has a label or an entity", where=where, hint=f"look at '{label}', or say data.label: NAME"
        )
    if len(counts) == 1 and "label" in prepared.columns:
        raise DataError(
            f"there is one class only: '{next(iter(counts))}'", where=where, hint="a classifier needs two or more"
        )
    if len(counts) > _MANY and 2 * len(counts) > len(prepared.rows):
        raise DataError(
            f"'{label}' has {len(counts)} different labels in {len(prepared.rows)} rows: it is not a label column",
            where=where,
            hint="name another: data.label: NAME; or, if these are answers, say task: generation",
        )


def answerable(prepared: Prepared, where: str) -> None:
    """Raises DataError when nothing is left, or most conversations have the same flaw: then the source has it."""
    reasons = Counter(d.reason for d in prepared.dropped)
    for reason, count in reasons.items():
        if reason in REASONS and 2 * count > prepared.read:
            words, hint = REASONS[reason]
            first = next(d for d in prepared.dropped if d.reason == reason)
            raise DataError(
                f"{count} of {prepared.read} rows {words}; the first is {first.row.place}: {first.detail}",
                where=where,
                hint=hint,
            )
    if not prepared.rows:
        raise _nothing_left(reasons, where, "give conversations with answers, or texts")


def mostly_there(prepared: Prepared, where: str) -> None:
    """Raises DataError when nothing is left, or most rows lack a text or a number."""
    reasons = Counter(d.reason for d in prepared.dropped)
    if 2 * len(prepared.dropped) > prepared.read:
        first = prepared.dropped[0]
        columns = ", ".join(f"{role}: '{name}'" for role, name in prepared.columns.items())
        raise DataError(
            f"{len(prepared.dropped)} of {prepared.read} rows lack something; the first is {first.row.place}: "
            f"{first.detail}",
            where=where,
            hint=f"fill the columns ({columns}), or name others: data.text, data.pair, data.label",
        )
    if not prepared.rows:
        raise _nothing_left(reasons, where, "give rows with all that the task needs")


def splits_agree(splits: Mapping[str, Sequence[Row]], where: str) -> None:
    """Raises DataError when train is empty, or dev or test has a label that train lacks."""
    if not splits["train"]:
        raise DataError("no rows are left to train on", where=where, hint="give more rows, or a smaller test share")
    known = labels_of(splits["train"])
    for name in SPLITS[1:]:
        for row in splits[name]:
            for label in row.labels or ():
                if label not in known:
                    raise DataError(
                        f"the label '{label}' is in {name} but not in train{_why(label, known)}",
                        where=row.place,
                        hint=f"add rows of it to train, or remove them from {name}",
                    )


def alike(counts: Mapping[str, int]) -> list[str]:
    """A note for each pair of labels that differ by case only."""
    first: dict[str, str] = {}
    notes = []
    for label in counts:
        other = first.setdefault(label.casefold(), label)
        if other != label:
            notes.append(f"the labels '{other}' and '{label}' differ by case only; they are learnt as two classes")
    return notes


def _nothing_left(reasons: Mapping[Drop, int], where: str, hint: str) -> DataError:
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return DataError(f"no rows are left after cleaning ({told})", where=where, hint=hint)


def _why(label: str, known: Mapping[str, int]) -> str:
    same = next((name for name in known if name.casefold() == label.casefold()), None)
    return f" (there it is '{same}')" if same else ""
