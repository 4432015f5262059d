"""From a raw source to divided rows and their card: all of an import but the writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmo.context import Context
from llmo.data import checks, sequences
from llmo.data.built import Built
from llmo.data.chat.reasons import REASONS
from llmo.data.deduplicate import deduplicate
from llmo.data.forms.base import Form
from llmo.data.forms.known import form_of
from llmo.data.prepare import prepare, tick
from llmo.data.prepared import Prepared
from llmo.data.row import SPLITS, Drop, Dropped, Row
from llmo.data.split import FEW_DOCUMENTS, divide
from llmo.errors import DataError, SpecError
from llmo.specs import DataSpec, TaskSpec

NEXT_ITEM = "next-item"  # learns of users' histories, and of no text
TWO_TEXTS = ("extractive-qa", "sentence-embedding")
_SAMPLE_CHARACTERS = 300


def build(source: Path, data: DataSpec, task: TaskSpec, ctx: Context) -> Built:
    """Raises DataError, with the place, for what cannot be read, understood or learnt from."""
    _check_columns(data, task)
    if task.name == NEXT_ITEM:
        return sequences.build(source, data, task, ctx)
    form = form_of(data, task)
    prepared = prepare(source, data, form, ctx)
    form.check(prepared, source.name)
    splits, dropped = _divided(prepared, form, data, ctx)
    checks.splits_agree(splits, source.name)
    info = {"task": task.name, **_card(prepared, form, splits, dropped)}
    notes = [*prepared.notes, *_notes(prepared, dropped), *checks.alike(info["labels"])]
    return Built(splits, dropped, info, notes, [_sample(row) for row in _samples(splits["train"])], form.stored())


def _check_columns(data: DataSpec, task: TaskSpec) -> None:
    """Raises SpecError for a column that is told and would not be looked at."""
    acts, texts = ("user", "item", "time"), ("text", "label", "id", "split_column", "label_separator")
    known = acts if task.name == NEXT_ITEM else (*texts, "pair") if task.name in TWO_TEXTS else texts
    idle = next((r for r in (*acts, *texts, "pair") if r not in known and getattr(data, r) is not None), None)
    if idle is not None:
        raise SpecError(
            f"data.{idle} says nothing to {task.name}",
            hint=f"leave it out; {task.name} knows: {', '.join(f'data.{role}' for role in known)}",
        )


def _divided(
    prepared: Prepared, form: Form, data: DataSpec, ctx: Context
) -> tuple[dict[str, list[Row]], list[Dropped]]:
    """Copies go first, so that no text can be on two sides."""

    def progress(done: int) -> None:
        tick(ctx, done, len(prepared.rows), "comparing")

    rows, copies = deduplicate(prepared.rows, data.clean.drop_duplicates, data.clean.near_threshold, progress)
    if data.clean.drop_duplicates != "none":
        rows, asked = form.held_out(rows)
        copies += asked
    shares = {"dev": data.split.dev, "test": data.split.test}
    present = {row.split for row in rows}
    if prepared.fixed_splits and "train" not in present:
        raise DataError(
            f"the source has no train rows, only {' and '.join(sorted(map(str, present)))}",
            hint="add train rows, or remove the split names to have the rows divided",
        )
    missing = {name: share for name, share in shares.items() if name not in present}
    if sum(missing.values()) >= 1:
        raise SpecError("split.dev and split.test leave nothing to train on", hint="their sum must be below 1")
    free = [row for row in rows if row.split in (None, "train")]
    if missing:
        for row, split in zip(free, divide(free, missing, data.split.seed, form.whole_groups), strict=True):
            row.split = split
        documents = {row.group for row in free if row.group}
        if 0 < len(documents) < FEW_DOCUMENTS and not form.whole_groups:
            prepared.notes.append(f"only {len(documents)} documents: their sentences are divided, not they themselves")
        if prepared.fixed_splits:
            prepared.notes.append(f"the source has no {' and no '.join(missing)}: taken from its train rows")
    splits = {name: [row for row in rows if row.split == name] for name in SPLITS}
    prepared.notes += [
        f"there are too few rows for {name}: it is empty" for name in missing if missing[name] > 0 and not splits[name]
    ]
    return splits, [*prepared.dropped, *copies]


def _card(prepared: Prepared, form: Form, splits: Mapping[str, list[Row]], dropped: list[Dropped]) -> dict[str, Any]:
    rows = [row for name in SPLITS for row in splits[name]]
    labels = checks.labels_of(rows)
    return {
        "columns": prepared.columns,
        "rows": {
            "read": prepared.read,
            **{name: len(rows) for name, rows in splits.items()},
            "dropped": len(dropped),
        },
        "dropped": dict(Counter(d.reason.value for d in dropped)),
        "changed": {name: count for name, count in prepared.log.changed.items() if count},
        "labels": labels,
        "encodings": dict(prepared.log.encodings),
        "splits": "fixed" if prepared.fixed_splits else "stratified" if labels else "seeded",
        "multi_label": form.multi_label,
        **form.card(rows),
    }


def _notes(prepared: Prepared, dropped: list[Dropped]) -> list[str]:
    """What the user should look at: contradictions, leaks, lost annotations."""
    counts = Counter(d.reason for d in dropped)
    changed = prepared.log.changed
    told = {
        Drop.CONFLICT: "rows were dropped because the same text has other labels elsewhere",
        Drop.LEAK: "rows were dropped from train or dev because a copy of them is held out",
        Drop.NO_LABEL: "rows were dropped because they have no label",
        **{reason: f"rows were dropped because they {words}" for reason, (words, _) in REASONS.items()},
    }
    lost = {
        "trailing_turns": "conversations were cut after their last answer",
        "empty_system": "conversations lost a system message that says nothing",
        "message_keys": "keys of messages were left out: they are not of OpenAI's format",
        "overlapping_spans": "entities were left out because they overlap a longer one",
        "spans_emptied": "entities were left out because nothing of them is left after cleaning",
    }
    notes = [
        f"{counts[reason]} {text}; the first is {next(d.row.place for d in dropped if d.reason == reason)}"
        for reason, text in told.items()
        if counts[reason]
    ]
    return notes + [f"{changed[name]} {text}" for name, text in lost.items() if changed[name]]


def _samples(rows: list[Row]) -> list[Row]:
    """Three rows, of different labels where there are."""
    by_label: dict[tuple[str, ...] | None, Row] = {}
    for row in rows:
        by_label.setdefault(row.labels, row)
    return (list(by_label.values()) + [row for row in rows if by_label[row.labels] is not row])[:3]


def _sample(row: Row) -> dict[str, Any]:
    entities = [{"text": row.text[s.start : s.end], "label": s.label} for s in row.spans if row.pair is None]
    shown = {"pair": None if row.pair is None else _short(row.pair), "answers": row.answers, "value": row.value}
    return {
        "id": row.id,
        "text": _short(row.text),
        "labels": list(row.labels or ()),
        **({"entities": entities} if entities else {}),
        **{name: value for name, value in shown.items() if value is not None},
    }


def _short(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + "…"
