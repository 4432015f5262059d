"""Columns by their role: those the user told, else those whose names say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from llmo.errors import DataError, nearest
from llmo.specs import DataSpec

_ID = "id _id uid guid doc_id row_id text_id key 编号 序号"
_SPLIT = "split subset partition fold set 划分"


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns by their role, empty where there is none; `layout` says how conversations are written."""

    text: str = ""
    pair: str = ""
    negative: str = ""
    label: str = ""
    tokens: str = ""
    tags: str = ""
    spans: str = ""
    messages: str = ""
    prompt: str = ""
    input: str = ""
    history: str = ""
    answer: str = ""
    start: str = ""
    chosen: str = ""
    rejected: str = ""
    system: str = ""
    tools: str = ""
    id: str = ""
    split: str = ""
    document: str = ""
    user: str = ""
    item: str = ""
    time: str = ""
    layout: str = ""

    def used(self) -> dict[str, str]:
        """What each role is read from, as the card keeps it."""
        roles = [field.name for field in fields(self) if field.name != "layout"]
        return {role: getattr(self, role) for role in roles if getattr(self, role)}


def told(names: Sequence[str], name: str | None, key: str, where: str) -> str:
    """The column the user named, or an empty string. Raises DataError when there is no such column."""
    if name is None or name in names:
        return name or ""
    raise DataError(
        f"there is no column '{name}'{nearest(name, list(names))}",
        where=where,
        hint=f"the columns are: {listed(names)}; change data.{key}",
    )


def named(names: Sequence[str], words: str, *taken: str) -> str:
    """The column whose name is one of `words`, in their order and compared without case; "" when there is none."""
    folded = {name.strip().casefold(): name for name in reversed(names) if name not in taken}
    return next((folded[word] for word in words.split() if word in folded), "")


def needed(names: Sequence[str], key: str, words: str, where: str, *taken: str) -> str:
    """As `named`. Raises DataError naming the columns there are, and the nearest, when there is none; `key` is what a
    user may name it with."""
    found = named(names, words, *taken)
    if found:
        return found
    close = [name for name in names if name not in taken and nearest(name.casefold(), words.split())]
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise DataError(
        f"no column is called like a {key} column{meant}",
        where=where,
        hint=f"the columns are: {listed(names)} (a CSV or TSV file names them in its first row); "
        f"say which: data.{key}: NAME",
    )


def two_texts(names: Sequence[str], spec: DataSpec, texts: str, pairs: str, where: str) -> tuple[str, str, str]:
    """The columns of a text, of its pair, and of the label where one is told. Raises DataError as `needed`."""
    label = told(names, spec.label, "label", where)
    pair = told(names, spec.pair, "pair", where)
    text = told(names, spec.text, "text", where) or needed(names, "text", texts, where, label, pair)
    pair = pair or needed(names, "pair", pairs, where, text, label)
    once(names, where, text=text, pair=pair, label=label)
    return text, pair, label


def once(names: Sequence[str], where: str, **roles: str) -> None:
    """Raises DataError for a column in two roles."""
    seen: dict[str, str] = {}
    for role, name in roles.items():
        if name and seen.setdefault(name, role) != role:
            raise DataError(
                f"the column '{name}' cannot be both {seen[name]} and {role}",
                where=where,
                hint=f"the columns are: {listed(names)}; change data.{seen[name]} or data.{role}",
            )


def row_columns(names: Sequence[str], spec: DataSpec, where: str) -> dict[str, str]:
    """The columns that identify a row and name its split, whatever the task."""
    return {
        "id": told(names, spec.id, "id", where) or named(names, _ID),
        "split": told(names, spec.split_column, "split_column", where) or named(names, _SPLIT),
    }


def unless(found: Mapping[str, str], *taken: str) -> dict[str, str]:
    """Columns by role without those that play another role already."""
    return {role: name for role, name in found.items() if name and name not in taken}


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first twenty of them."""
    shown = ", ".join(names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
